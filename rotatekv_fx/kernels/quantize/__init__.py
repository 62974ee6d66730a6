"""Codes of 2, 3, 4 or 8 bits with a scale and an offset per group, and the packed token slots."""
