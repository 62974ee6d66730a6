"""What the ops on packed layers get of a layer, as one value."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Held:
    """A packed layer's tensors and how tokens become codes: arguments of the ops in `rotatekv_fx.ops.packed`,
    which describes them, in their order.
    """

    history: list[Tensor]
    recent: list[Tensor]
    sinks: list[Tensor]
    key_map: list[Tensor]
    position: Tensor
    count: Tensor | None
    number: int
    key_bits: int
    value_bits: int
    key_group: int
    value_group: int
    key_clip: float
    value_clip: float
    scheme: str
    window: int
    wraps: bool

    @property
    def start(self) -> Tensor | int:
        """Number of the first new token."""
        return self.number if self.count is None else self.count

    @property
    def capacity(self) -> int:
        """Slots of the history."""
        return self.history[0].shape[2]

    @property
    def units(self) -> int:
        """Units of heads that share rotations and quantization groups: one, of all heads, where channels are
        reordered.
        """
        return self.key_map[0].shape[0]

    def unit_heads(self, key: Tensor) -> int:
        """KV heads of a unit, for new keys [B, Hkv, S, D]."""
        return key.shape[1] // self.units

    def unit_groups(self, key: Tensor, value: Tensor) -> tuple[int, int]:
        """Key and value groups of a unit, for new keys and values [B, Hkv, S, D]."""
        heads = self.unit_heads(key)
        return heads * key.shape[3] // self.key_group, heads * value.shape[3] // self.value_group


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Which tokens an attention sees, and how its scores are made: arguments of the decoding ops, in their
    order.
    """

    mask: Tensor | None
    mask_offset: int
    sliding: int
    scale: float
    softcap: float
    sink_logits: Tensor | None


def arguments_with_held(first: int, *arguments: object) -> tuple[object, ...]:
    """An op's arguments with those of `Held`, from number `first` on, as one."""
    last = first + len(dataclasses.fields(Held))
    return *arguments[:first], Held(*arguments[first:last]), *arguments[last:]  # type: ignore[arg-type]


def arguments_of_decoding(*arguments: object) -> tuple[object, ...]:
    """A decoding op's arguments: query, key, value, `Held` and `Scoring`."""
    *first, held = arguments_with_held(3, *arguments[: 3 + len(dataclasses.fields(Held))])
    return *first, held, Scoring(*arguments[3 + len(dataclasses.fields(Held)) :])  # type: ignore[arg-type]
