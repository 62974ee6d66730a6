"""What a cache holds, measured, and what it would take at 16 bits an element."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from transformers import Cache

from rotatekv_fx import cache_nbytes


class KVShape(Protocol):
    """What an attention site tells about its keys and values."""

    @property
    def kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def value_dim(self) -> int: ...


def cache_elements(sites: Iterable[KVShape], tokens: int, batch: int = 1) -> int:
    """Numbers in the keys and values of `batch` sequences: Hkv (D + Dv) a token and site."""
    return sum(site.kv_heads * (site.head_dim + site.value_dim) for site in sites) * tokens * batch


def bits_per_element(cache: Cache, sites: Iterable[KVShape], tokens: int, batch: int = 1) -> float:
    """Every byte that `cache` holds (codes, scales, exact tokens, positions), in bits, per element."""
    return cache_nbytes(cache) * 8 / cache_elements(sites, tokens, batch)


def sixteen_bit_nbytes(sites: Iterable[KVShape], tokens: int, batch: int = 1) -> int:
    """Bytes of the same keys and values at 16 bits an element, whatever the model's dtype."""
    return 2 * cache_elements(sites, tokens, batch)
