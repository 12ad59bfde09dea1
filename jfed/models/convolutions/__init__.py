"""Convolutions whose gradients are fast inside loops, on a CPU too."""
