"""Sparse metadata in the network: rows as tensors, and the layers that read them."""
