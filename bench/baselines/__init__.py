"""Opponents of the engine: plain and strong PyTorch renderings of the methods, and what compares them."""
