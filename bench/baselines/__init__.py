"""Opponents of the engine: plain and strong PyTorch renderings, and MAE and iBOT on the engine's own blocks."""
