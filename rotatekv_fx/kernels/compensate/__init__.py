"""Rounding with error feedback, ahead of `quantize`."""
