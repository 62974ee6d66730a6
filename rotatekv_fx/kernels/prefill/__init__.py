"""Attention of a prompt's tokens over a packed layer."""
