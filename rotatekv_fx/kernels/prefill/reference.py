"""Attention of several new tokens over a packed layer, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from rotatekv_fx.kernels.attention.reference import extend
from rotatekv_fx.kernels.held import Held
from rotatekv_fx.kernels.quantize.reference import dequantize


def prefill(query: Tensor, key: Tensor, value: Tensor, held: Held, scale: float) -> Tensor:
    """Reference of the op `rotatekv::prefill` (`rotatekv_fx.ops` describes it)."""
    device, new, heads = key.device, key.shape[2], key.shape[1]
    number, window, recent = held.number, held.window, held.recent
    before = torch.arange(max(0, number - window), number, device=device)
    exact_keys, exact_values = key, value
    if recent and len(before):
        slots = before % recent[0].shape[2]
        exact_keys, exact_values = (
            torch.cat([ring[:, :, slots].to(x.dtype), x], 2)
            for ring, x in zip(recent, (key, value), strict=True)
        )
    exact_numbers = torch.arange(number + new - exact_keys.shape[2], number + new, device=device)
    extend(key, value, held)
    coded = max(0, number + new - window)
    coded_keys, coded_values = restored(held, held.position - (number + new - 1), coded, heads)
    asking = torch.arange(number, number + new, device=device)[:, None]
    seen = torch.cat(
        [
            torch.arange(coded, device=device) <= asking - window,
            (exact_numbers <= asking) & (exact_numbers > asking - window),
        ],
        1,
    )
    keys = torch.cat([coded_keys, exact_keys.float()], 2).repeat_interleave(query.shape[1] // heads, 1)
    values = torch.cat([coded_values, exact_values.float()], 2).repeat_interleave(query.shape[1] // heads, 1)
    scores = (query.float() @ keys.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, -1) @ values).transpose(1, 2).to(query.dtype).contiguous()


def restored(held: Held, shift: Tensor, length: int, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first `length` tokens as attention reads them, fp32 [B, Hkv, length, D].

    Args:
        shift: position less number of a token, [B or 1, 1].
        heads: Hkv.
    """
    history = [t[:, :, :length] for t in held.history]
    _, _, rotation, angles = held.key_map[:4]
    units = held.units
    numbers = torch.arange(length, device=shift.device)
    turned = (shift + numbers).double()[..., None] * angles
    waves = torch.cat([turned.cos(), turned.sin()], -1).float()[:, None]
    coded = dequantize(
        history[0], history[1].abs(), history[2], held.key_bits, held.key_group, units, torch.float32
    )
    coded = coded.repeat_interleave(heads // units, 1)
    whole = torch.cat([coded, waves.expand(*coded.shape[:3], -1)], -1)
    keys = torch.einsum("bhnc,hdc->bhnd", whole, rotation)
    values = dequantize(*history[3:], held.value_bits, held.value_group, heads, torch.float32)
    if held.sinks:
        exact_keys, exact_values, tokens = held.sinks
        chosen = (tokens.long()[:, :, None] == numbers).to(torch.float32)  # [B, count, length]
        free = 1.0 - chosen.sum(1)[:, None, :, None]
        keys = keys * free + torch.einsum("bcn,bhcd->bhnd", chosen, exact_keys.float())
        values = values * free + torch.einsum("bcn,bhcd->bhnd", chosen, exact_values.float())
    return keys, values
