"""Plumbing shared by the op folders."""
