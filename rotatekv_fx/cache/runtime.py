"""What a rewritten attention module holds: its constants, and the way to its packed cache layer."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from rotatekv_fx.cache import before_rope, keymap
from rotatekv_fx.cache.codec import Codec, Parts
from rotatekv_fx.cache.combined import COMBINED
from rotatekv_fx.cache.kinds import TWINS
from rotatekv_fx.cache.layers import LayerSpec, PackedLayer
from rotatekv_fx.cache.positions import PositionPlan
from rotatekv_fx.errors import StateError
from rotatekv_fx.rope import Rope

ops = torch.ops.rotatekv

_TWINS = TWINS | COMBINED
_OWNERS = "rotatekv_position_owners"  # on a Cache: which layer holds the positions of which inputs
_calls = threading.local()  # of each thread: block inputs of calls without a cache, by runtime


class AttentionRuntime(nn.Module):
    """The `rotatekv` child of a rewritten attention module.

    Its buffers are the constants of the rewritten graph; they follow the model's device and stay out of its
    state_dict. `update` is what the graph calls in place of the cache write.
    """

    def __init__(
        self,
        layer_index: int,
        spec: LayerSpec,
        positions: PositionPlan,
        buffers: dict[str, Tensor],
        rope: Rope | None,
        debug: bool = False,
        read_keys: before_rope.ReadKeys | None = None,
    ):
        """`debug` checks what is stored.

        `rope` is given where keys are transformed after RoPE: `update` then does it, with key_matrix,
        key_inverse and, where a mean is removed first, key_center of `buffers`. `read_keys` is given where
        they are stored before RoPE and `attend` has to turn them.
        """
        super().__init__()
        self.layer_index, self.spec, self.positions, self.rope = layer_index, spec, positions, rope
        self.read_keys = read_keys
        self.residual: Tensor | None = None  # the block's input, in compiled calls without a cache
        self.centers, self.debug = "key_center" in buffers, debug
        self.prefills = keymap.NAMES[0] in buffers
        self.decodes = self.prefills or before_rope.NAMES[0] in buffers
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> AttentionRuntime:
        """Follow the model's device, but keep constants in the precision they were computed in."""
        before = dict(self.named_buffers(remove_duplicate=False))
        super()._apply(fn, recurse)
        for name, after in list(self.named_buffers(remove_duplicate=False)):
            path, _, last = name.rpartition(".")
            self.get_submodule(path)._buffers[last] = before[name].to(after.device)
        return self

    def update(
        self,
        cache: Cache | None,
        key: Tensor,
        value: Tensor,
        positions: tuple[Tensor, ...],
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Any, ...]:
        """Store new tokens in the packed layer and return what the attention reads.

        Without a cache a layer lives for this call only, so that the numbers are those of the packed cache.

        Returns:
            mask, keys and values [B, Hkv, N, D], and the positional inputs of those N tokens.

        Raises:
            StateError: in debug mode, a key or value is not finite.
        """
        residual = self._received(key, value, residual)
        step = self.layer(cache).step(key, value, self.positions.encode(positions), residual, mask, self)
        if self.rope is not None:
            return step.mask, step.keys, step.values
        return (step.mask, step.keys, step.values, *self.positions.decode(step.positions))

    def attend(
        self,
        cache: Cache | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: tuple[Tensor, ...],
        residual: Tensor | None,
        mask: Tensor | None,
        scale: float,
        softcap: float,
        sink_logits: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """Store new tokens and attend to what the cache then holds: `update` and the op `attend` in one.

        One new token is attended to without unpacking anything, by the op `decode` or `decode_before_rope`; a
        prompt on a GPU by the op `prefill`.

        Returns:
            [B, S, Hq, Dv].

        Raises:
            StateError: in debug mode, a key or value is not finite.
        """
        residual = self._received(key, value, residual)
        layer, stored = self.layer(cache), self.positions.encode(positions)
        if self.decodes and layer.decodes(query, mask):
            op = ops.decode if self.prefills else ops.decode_before_rope
            return layer.decode(
                op, query, key, value, stored, mask, self.key_map, scale, softcap, sink_logits
            )
        plain = causal and softcap == 0.0 and sink_logits is None and cache is not None
        if self.prefills and plain and has_prefill_kernel(query):
            start = layer.prefill_start(query, value, mask)
            if start is not None:
                return layer.prefill(query, key, value, stored, residual, self.key_map, start, scale)
        step = layer.step(key, value, stored, residual, mask, self)
        keys = step.keys
        if self.read_keys is not None:
            keys = self.read_keys(keys, *self.positions.decode(step.positions))
        return ops.attend(query, keys, step.values, step.mask, scale, softcap, sink_logits, causal)

    @property
    def key_map(self) -> list[Tensor]:
        """The tensors that the decoding op takes; none where the layer is always read the general way."""
        names = keymap.NAMES if self.prefills else before_rope.NAMES
        return [getattr(self, name) for name in names] if self.decodes else []

    def to_codes(self, key: Tensor, positions: Parts) -> Tensor:
        """An exact key [B, Hkv, N, D] as it is quantized: without its mean, rotated, compensated."""
        if self.rope is None:
            return key
        centered = key - self._mean(key, positions) if self.centers else key
        rotated = ops.rotate(centered, self.key_matrix, None, False)
        return self._compensated(rotated, "key_feedback", self.spec.key)

    def values_to_codes(self, value: Tensor) -> Tensor:
        """An exact value [B, Hkv, N, Dv] as it is quantized: compensated."""
        return self._compensated(value, "value_feedback", self.spec.value)

    def _compensated(self, x: Tensor, feedback: str, codec: Codec) -> Tensor:
        if feedback not in self._buffers:
            return x
        q = codec.quantizer
        return ops.compensate(x, self._buffers[feedback], q.bits, q.group, q.clip)

    def from_codes(self, key: Tensor, positions: Parts) -> Tensor:
        """The inverse of `to_codes`."""
        if self.rope is None:
            return key
        turned = ops.rotate(key, self.key_inverse, None, True)
        return turned + self._mean(key, positions) if self.centers else turned

    def _mean(self, key: Tensor, positions: Parts) -> Tensor:
        """RoPE of the calibrated mean at each token's position, [B or 1, Hkv, N, D]."""
        batch = positions[0].shape[0] if positions else 1
        mean = self.key_center.to(key.dtype)[None, :, None].expand(batch, -1, key.shape[2], -1)
        return self.rope(mean, *self.positions.decode(positions)).to(key.dtype)

    def _received(self, key: Tensor, value: Tensor, residual: Tensor | None) -> Tensor | None:
        """The block's input, which may come from the last block's device; and the checks of debug mode."""
        if self.debug:
            self._check_finite(key=key, value=value)
        return None if residual is None else residual.to(key.device)

    def _check_finite(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            bad = ~tensor.isfinite().all(-1).all(1)  # [B, S]
            if bool(bad.any()):
                sequence, token = bad.nonzero()[0].tolist()
                raise StateError(
                    f"layer {self.layer_index}: the {name} of new token {token} of sequence {sequence} is "
                    f"not finite ({int(bad.sum())} of {bad.numel()} tokens); look for overflow before it."
                )

    def observe(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the enclosing block: keep its input [B, S, C] for the attention."""
        leaves = (*args, *kwargs.values())
        hidden = next(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())
        if hidden.shape[1] > 1:
            cache = next((c for c in leaves if isinstance(c, Cache)), None)
            self._holder(cache).residual = hidden

    def take_residual(self, cache: Cache | None) -> Tensor | None:
        """What `observe` kept for this call, once."""
        holder = self._holder(cache)
        residual, holder.residual = holder.residual, None
        return residual

    def _holder(self, cache: Cache | None) -> Any:
        """What keeps the block's input between hook and attention: the cache's layer, or this thread."""
        if cache is not None:
            return self.layer(cache)
        if torch.compiler.is_compiling():  # a trace is of one thread
            return self
        if not hasattr(_calls, "holders"):
            _calls.holders = weakref.WeakKeyDictionary()
        return _calls.holders.setdefault(self, SimpleNamespace(residual=None))

    def causal_mask(self, cache: Cache | None, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask [1, 1, S, N] that a module with inline attention expects where the model passed none."""
        layer = self.layer(cache)
        queries = hidden.shape[1]
        length, offset = layer.get_mask_sizes(queries)
        query = torch.arange(queries, device=hidden.device)[:, None] + layer.get_seq_length()
        key = torch.arange(length, device=hidden.device)[None] + offset
        visible = key <= query
        if window := getattr(layer, "sliding_window", None):
            visible &= key > query - window
        visible = visible[None, None]
        if dtype is torch.bool:
            return visible
        return torch.zeros((), dtype=dtype, device=hidden.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    def held(self, cache: Cache | None, device: torch.device) -> Tensor:
        """How many tokens the cache holds, int64 []."""
        length = 0 if cache is None else self.layer(cache).get_seq_length()
        return length if isinstance(length, Tensor) else torch.full((), length, device=device)

    def layer(self, cache: Cache | None) -> PackedLayer:
        """The packed layer of this module in `cache`, put in the place of an empty transformers layer.

        Raises:
            StateError: the layer already holds 16-bit keys, or is of a kind that has no packed twin.
        """
        if cache is None:
            return TWINS[DynamicLayer](DynamicLayer(), self.spec, None)
        layers = _layers_of(cache)
        while len(layers) <= self.layer_index:
            layers.append(DynamicLayer())
        layer = layers[self.layer_index]
        if isinstance(layer, PackedLayer):
            return layer
        if type(layer) not in _TWINS:
            raise StateError(
                f"cache layer {self.layer_index} is a {type(layer).__name__}, which has no packed twin; use "
                "a DynamicCache or a StaticCache."
            )
        # transformers may have allocated an empty static layer early
        if layer.is_initialized and int(layer.get_seq_length()):
            raise StateError(
                f"cache layer {self.layer_index} already holds 16-bit keys of an untransformed model; "
                "pass a new cache."
            )
        limit = getattr(layer, "sliding_window", None) or getattr(layer, "max_cache_len", None)
        key = (type(layer), limit, self.positions.key)
        owners = cache.__dict__.setdefault(_OWNERS, {})
        packed = _TWINS[type(layer)](layer, self.spec, owners.get(key))
        owners.setdefault(key, packed)
        layers[self.layer_index] = packed
        return packed


def has_prefill_kernel(query: Tensor) -> bool:
    """Whether the op `prefill` is worth its call: its reference holds all scores at once."""
    return query.is_cuda and torch.version.hip is None


def _layers_of(cache: Cache) -> list[Any]:
    if type(cache) not in (DynamicCache, StaticCache, Cache):
        raise StateError(f"the cache is a {type(cache).__name__}; use a DynamicCache or a StaticCache.")
    if getattr(cache, "offloading", False):
        raise StateError("the cache offloads to the CPU, which packed layers do not; use offloading=False.")
    return cache.layers


def cache_nbytes(cache: Cache) -> int:
    """Bytes that a KV cache holds: every tensor's storage once, packed or not.

    Args:
        cache: a cache filled by a transformed or an untransformed model.
    """
    storages = {}
    for layer in cache.layers:
        for tensor in _tensors(layer):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(layer: Any) -> list[Tensor]:
    values = [x for v in vars(layer).values() for x in (v.values() if isinstance(v, dict) else [v])]
    own = [t for t in values if isinstance(t, Tensor)]
    return own + (layer.stored_tensors() if isinstance(layer, PackedLayer) else [])
