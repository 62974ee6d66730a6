"""The ops of the namespace `rotatekv`: schema, shapes, checks, and what runs them on each device.

Every op ignores autocast, leaves the host alone (no synchronisation, no Python that depends on data), and is
for inference: its results carry no gradient. CPU tensors run the plain torch reference; CUDA tensors run the
Triton kernel named in `TRITON_KERNELS`, or the reference where none is named. `lowered_to` says which.

Shapes use B sequences, S tokens, N cache slots, H heads of D channels. "Flattened channels" of a token are
head-major: channel h * D + d.
"""

from __future__ import annotations

from rotatekv_fx.ops import attention, codes, packed
from rotatekv_fx.ops.registry import REFERENCES, TRITON_KERNELS, implementation, lowered_to

__all__ = ["REFERENCES", "TRITON_KERNELS", "attention", "codes", "implementation", "lowered_to", "packed"]
