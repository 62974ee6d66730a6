"""Attention over the cache, and the choice and restoring of sink tokens."""
