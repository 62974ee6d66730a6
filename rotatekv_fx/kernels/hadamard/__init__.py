"""Hadamard matrices and the rotation of grouped heads."""
