"""Packing, quantizing, and writes into packed slots, against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatekv_fx import ops  # noqa: F401  (registers the ops)
from rotatekv_fx.errors import ConfigError
from rotatekv_fx.kernels.quantize.reference import pack, packed_bytes, unpack

quantize = torch.ops.rotatekv.quantize
dequantize = torch.ops.rotatekv.dequantize
append = torch.ops.rotatekv.append
store = torch.ops.rotatekv.store

BITS = (2, 3, 4, 8)
GROUPS = (1, 7, 24, 36, 65, 128)
SCHEMES = ("zero_point", "midpoint")
TINY = 2.0**-14


def pack_by_loops(codes, bits):
    """The documented layout, one channel and one bit field at a time."""
    multiple = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    padded = list(codes) + [0] * (-len(codes) % multiple)
    width = len(padded)
    if bits == 8:
        return padded
    if bits == 4:
        return [padded[j] | padded[j + width // 2] << 4 for j in range(width // 2)]
    low = [sum((padded[j + p * width // 4] & 3) << 2 * p for p in range(4)) for j in range(width // 4)]
    if bits == 2:
        return low
    return low + [sum((padded[j + p * width // 8] >> 2) << p for p in range(8)) for j in range(width // 8)]


def quantize_group_by_loops(values, bits, clip, scheme):
    """Codes, scale and offset of one group, in the spelling of the formulas and in float32."""
    f = np.float32
    top, clip = f(2**bits - 1), f(clip)
    high, low = max(values), min(values)
    mid = (high + low) / f(2)

    def stored(scale):
        return f(np.float16(min(max(scale, f(TINY)), f(65504))))

    if high == low:
        if scheme == "midpoint":
            return [0] * len(values), TINY, f(np.float16(mid))
        scale = stored(abs(mid))
        return [0] * len(values), scale, -np.sign(mid) if abs(mid) > scale / 2 else 0
    if scheme == "midpoint":
        half = (high - low) / f(2)
        lo, scale = f(np.float16(mid - clip * half)), stored(f(2) * (clip * half) / top)
        codes = [int(min(max(np.round((v - lo) / scale), 0), top)) for v in values]
        return codes, scale, lo
    scale = stored((clip * high - clip * low) / top)
    zero = np.round(-(clip * low) / scale)
    if abs(zero) > 32767:
        scale = stored(abs(mid))
        return [0] * len(values), scale, -np.sign(mid)
    codes = [int(min(max(np.round(v / scale) + zero, 0), top)) for v in values]
    return codes, scale, zero


def quantize_by_loops(x, bits, group, clip, scheme):
    """Values as the packed cache returns them, bytes, scales and offsets."""
    x = x.float().numpy()
    batch, heads, tokens, dim = x.shape
    groups = heads * dim // group
    packed = np.zeros((batch, groups, tokens, packed_bytes(group, bits)), np.uint8)
    scales, offsets = np.zeros((2, batch, groups, tokens), np.float32)
    values = np.zeros_like(x)
    for b in range(batch):
        for s in range(tokens):
            flat = np.concatenate([x[b, h, s] for h in range(heads)])
            back = np.zeros_like(flat)
            for g in range(groups):
                part = slice(g * group, (g + 1) * group)
                codes, scale, offset = quantize_group_by_loops(list(flat[part]), bits, clip, scheme)
                packed[b, g, s] = pack_by_loops(codes, bits)
                scales[b, g, s], offsets[b, g, s] = scale, offset
                q = np.array(codes, np.float32)
                back[part] = scale * (q - offset) if scheme == "zero_point" else offset + scale * q
            values[b, :, s] = back.reshape(heads, dim)
    return values, packed, scales, offsets


def relative_rms(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def one_group(values):
    """[group] values as x [1, 1, 1, group]."""
    return torch.tensor(values, dtype=torch.float32)[None, None, None]


def round_trip(x, bits, group, clip, scheme, dtype=torch.float32):
    return dequantize(*quantize(x, bits, group, clip, scheme), bits, group, x.shape[1], dtype)


# Packing


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_pack_follows_the_documented_layout(bits, group):
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 2**bits, (3, 2, group), generator=generator, dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 2, packed_bytes(group, bits))
    for row, expected in zip(packed.flatten(0, 1), codes.flatten(0, 1), strict=True):
        assert row.tolist() == pack_by_loops(expected.tolist(), bits)


@pytest.mark.parametrize(
    ("group", "bits", "size"),
    [
        (128, 2, 32),
        (128, 3, 48),
        (128, 4, 64),
        (128, 8, 128),
        (65, 2, 17),
        (65, 3, 27),
        (65, 4, 33),
        (65, 8, 65),
    ],
)
def test_packed_bytes(group, bits, size):
    assert packed_bytes(group, bits) == size


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pack_round_trip(data):
    bits = data.draw(st.sampled_from(BITS))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70)
    codes = torch.tensor(data.draw(row), dtype=torch.int32)
    assert torch.equal(unpack(pack(codes, bits), bits, len(codes)), codes)


# Quantizing


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("heads", "dim", "group"),
    [(4, 18, 24), (3, 24, 36), (2, 65, 65), (1, 128, 128), (4, 64, 128), (2, 7, 14)],
)
def test_quantize_matches_loops(heads, dim, group, bits, scheme):
    torch.manual_seed(bits)
    clip = 0.8 if bits == 2 else 1.0
    x = torch.randn(2, heads, 3, dim) * 3 + torch.randn(heads, 1, dim) * 5
    x[0, :, 1] = 7.3  # constant groups
    codes, scale, offset = quantize(x, bits, group, clip, scheme)
    values, packed, scales, offsets = quantize_by_loops(x, bits, group, clip, scheme)
    assert torch.equal(codes, torch.from_numpy(packed))
    assert scale.dtype == torch.float16
    assert torch.equal(scale.float(), torch.from_numpy(scales))
    assert offset.dtype == (torch.int16 if scheme == "zero_point" else torch.float16)
    assert torch.equal(offset.float(), torch.from_numpy(offsets))
    back = dequantize(codes, scale, offset, bits, group, heads, torch.float32)
    assert relative_rms(back, torch.from_numpy(values)) < 1e-6
    in_bf16 = dequantize(codes, scale, offset, bits, group, heads, torch.bfloat16)
    assert torch.equal(in_bf16, back.to(torch.bfloat16))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_falls_as_bits_rise(scheme):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 50, 32)
    errors = [relative_rms(round_trip(x, bits, 128, 1.0, scheme), x) for bits in BITS]
    # Uniform noise of a step over a range of about 5.2 standard deviations: step / sqrt(12).
    for bits, error in zip(BITS, errors, strict=True):
        assert 0.6 < error / (5.2 / (2**bits - 1) / 12**0.5) < 1.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quantize_computes_in_fp32(dtype, scheme):
    x = torch.randn(1, 2, 4, 64).to(dtype)
    for actual, expected in zip(
        quantize(x, 3, 64, 0.9, scheme), quantize(x.float(), 3, 64, 0.9, scheme), strict=True
    ):
        assert torch.equal(actual, expected)


finite = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=150, deadline=None)
@given(st.lists(finite, min_size=1, max_size=40), st.sampled_from(BITS), st.sampled_from(SCHEMES))
def test_error_is_at_most_half_a_step(values, bits, scheme):
    x = one_group(values)
    codes, scale, offset = quantize(x, bits, len(values), 1.0, scheme)
    back = dequantize(codes, scale, offset, bits, len(values), 1, torch.float32)
    step, top = scale.double().item(), 2**bits - 1
    # Beyond half a step: fp16 rounding moves the ends of the range (step and lo), fp32 the arithmetic.
    ends = 2.0**-11 * (step * top + (abs(offset.double().item()) if scheme == "midpoint" else 0.0))
    slack = ends + 4e-7 * x.abs().max().item() + TINY
    if scheme == "zero_point" and abs(offset.item()) == 1 and not codes.any():
        slack += 2.0**-11 * x.abs().max().item()  # maybe a constant group, stored as one fp16 number
    error = (back.double() - x.double()).abs().max().item()
    assert torch.isfinite(back).all()
    # A group too narrow for its zero point is stored as its middle.
    narrow = scheme == "zero_point" and (x.max() - x.min()).item() <= x.abs().max().item() * top / 32000
    assert error <= step / 2 + slack or (narrow and error <= 2.0**-10 * x.abs().max().item())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_inside_the_range_of_the_codes_is_strictly_bounded(scheme, bits):
    torch.manual_seed(bits)
    x = torch.randn(1, 1, 400, 32) * 10.0 ** torch.randint(-2, 3, (1, 1, 400, 1))
    _, scale, offset = (t[0, 0].double() for t in quantize(x, bits, 32, 0.5, scheme))
    back = round_trip(x, bits, 32, 0.5, scheme)[0, 0].double()
    low = -offset * scale if scheme == "zero_point" else offset
    values = x[0, 0].double()
    inside = (values >= low[:, None]) & (values <= (low + scale * (2**bits - 1))[:, None])
    assert 0.5 < inside.double().mean() < 1.0  # the clip leaves some outside
    error = (back - values).abs() / scale[:, None]
    assert error[inside].max() <= 0.5 + 1e-4
    assert error[~inside].max() > 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 3.14159, -0.001, 1e-4, -777.7, 6e4, -65504.0])
@pytest.mark.parametrize("bits", BITS)
def test_constant_group_decodes_to_its_value(value, bits, scheme):
    x = torch.full((1, 2, 1, 12), value)
    codes, scale, offset = quantize(x, bits, 24, 0.8, scheme)
    assert not codes.any()
    assert scale.item() >= TINY
    assert torch.equal(
        dequantize(codes, scale, offset, bits, 24, 2, torch.float32), x.to(torch.float16).float()
    )


def test_constant_group_below_the_smallest_scale_decodes_to_its_nearest():
    assert round_trip(torch.full((1, 1, 1, 4), 0.4 * TINY), 2, 4, 1.0, "zero_point").eq(0.0).all()
    assert round_trip(torch.full((1, 1, 1, 4), -0.6 * TINY), 2, 4, 1.0, "zero_point").eq(-TINY).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_narrow_group_far_from_zero_does_not_overflow_its_zero_point(sign):
    x = one_group([sign * 1000.0, sign * 1000.01, sign * 1000.02])
    _, scale, offset = quantize(x, 8, 3, 1.0, "zero_point")
    assert (scale.item(), offset.item()) == (1000.0, -sign)
    torch.testing.assert_close(round_trip(x, 8, 3, 1.0, "zero_point"), x, rtol=2.0**-10, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_beyond_fp16_stay_finite(scheme):
    x = torch.tensor([[-3e38, 3e38, 1e38], [2e38, 3e38, 3e38], [-2e5, -1e5, 0.0]])[None, :, None]
    _, scale, offset = quantize(x, 2, 3, 1.0, scheme)
    assert scale.isfinite().all()
    assert offset.float().isfinite().all()
    assert round_trip(x, 2, 3, 1.0, scheme).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_group(bad, scheme):
    x = torch.randn(2, 4, 3, 16)
    clean = quantize(x, 2, 32, 0.8, scheme)
    x[1, 2, 1, 5] = bad
    for dirty, before in zip(quantize(x, 2, 32, 0.8, scheme), clean, strict=True):
        same = torch.ones(2, 2, 3, dtype=torch.bool)
        same[1, 1, 1] = False
        assert torch.equal(dirty[same], before[same])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_nan_group_reads_as_nan(scheme):
    assert round_trip(one_group([1.0, float("nan"), 2.0]), 3, 3, 1.0, scheme).isnan().all()


# Packed slots


def poisoned_buffers(batch, groups, slots, group, bits, scheme):
    offset = torch.full((batch, groups, slots), -12345.0)
    return (
        torch.full((batch, groups, slots, packed_bytes(group, bits)), 0xAB, dtype=torch.uint8),
        torch.full((batch, groups, slots), torch.nan, dtype=torch.float16),
        offset.to(torch.int16 if scheme == "zero_point" else torch.float16),
    )


@pytest.mark.parametrize(("bits", "group"), [(2, 8), (3, 16), (4, 32)])
def test_codes_may_lie_in_another_order(bits, group):
    """Groups, scales and offsets stay; place p holds the code of channel order[p]."""
    g = torch.Generator().manual_seed(0)
    x, order = torch.randn(2, 4, 5, 16, generator=g), torch.randperm(64, generator=g)
    plain, placed = (quantize(x, bits, group, 0.8, "zero_point", o) for o in (None, order))
    levels, moved = (unpack(parts[0], bits, group).transpose(1, 2).flatten(2) for parts in (plain, placed))
    assert torch.equal(moved, levels[..., order])
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], placed[1:], strict=True))
    read = dequantize(*placed, bits, group, 4, torch.float32, order)
    assert torch.equal(read, dequantize(*plain, bits, group, 4, torch.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("bits", "heads", "dim", "group"), [(2, 4, 18, 24), (3, 2, 65, 65), (4, 3, 24, 36), (8, 2, 64, 128)]
)
def test_append_fills_its_slots_and_no_other(bits, heads, dim, group, scheme):
    x = torch.randn(2, heads, 3, dim)
    buffers = poisoned_buffers(2, heads * dim // group, 9, group, bits, scheme)
    before = [b.clone() for b in buffers]
    slots = torch.tensor([7, 0, 4])
    assert append(*buffers, x, slots, bits, group, 0.8, scheme) is None
    _, *expected = quantize_by_loops(x, bits, group, 0.8, scheme)
    others = torch.tensor([1, 2, 3, 5, 6, 8])
    for buffer, old, new in zip(buffers, before, expected, strict=True):
        assert torch.equal(buffer[:, :, slots].float(), torch.from_numpy(new).float())
        torch.testing.assert_close(buffer[:, :, others], old[:, :, others], rtol=0, atol=0, equal_nan=True)
    back = dequantize(*(b[:, :, slots] for b in buffers), bits, group, heads, torch.float32)
    assert (
        relative_rms(back, x) < {2: 0.5, 3: 0.3, 4: 0.2, 8: 0.2}[bits]
    )  # clip 0.8 cuts the tails at any width


def test_store_writes_values_unchanged_in_the_buffer_dtype():
    x = torch.randn(2, 3, 2, 5)
    buffer = torch.full((2, 3, 6, 5), torch.nan, dtype=torch.bfloat16)
    assert store(buffer, x, torch.tensor([5, 1])) is None
    assert torch.equal(buffer[:, :, [5, 1]], x.to(torch.bfloat16))
    assert buffer[:, :, [0, 2, 3, 4]].isnan().all()


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 2, 3, 8), 5, 8, 1.0, "midpoint"), "bits is 5"),
        ((torch.zeros(1, 2, 3, 8), 2, 6, 1.0, "midpoint"), "group 6 does not divide 16"),
        ((torch.zeros(1, 2, 3, 8), 2, 0, 1.0, "midpoint"), "group is 0"),
        ((torch.zeros(1, 2, 3, 8), 2, 8, 1.5, "midpoint"), "clip is 1.5"),
        ((torch.zeros(1, 2, 3, 8), 2, 8, 1.0, "nearest"), "scheme is 'nearest'"),
        ((torch.zeros(2, 3, 8), 2, 8, 1.0, "midpoint"), "use 4 dimensions"),
        ((torch.zeros(1, 2, 3, 8, dtype=torch.int32), 2, 8, 1.0, "midpoint"), "x is torch.int32"),
    ],
)
def test_quantize_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message):
        quantize(*arguments)


def test_dequantize_refuses_buffers_of_other_settings():
    packed = quantize(torch.zeros(1, 2, 3, 8), 2, 8, 1.0, "midpoint")
    with pytest.raises(ConfigError, match=r"use 4 x torch\.uint8 for groups of 8 at 4 bits"):
        dequantize(*packed, 4, 8, 2, torch.float32)
    with pytest.raises(ConfigError, match="heads is 3 for 16 channels"):
        dequantize(*packed, 2, 8, 3, torch.float32)
    with pytest.raises(ConfigError, match=r"offset is torch\.float32"):
        dequantize(packed[0], packed[1], packed[2].float(), 2, 8, 2, torch.float32)


def test_writes_refuse_buffers_that_do_not_fit():
    x, slots = torch.zeros(1, 2, 3, 8), torch.arange(3)
    buffers = poisoned_buffers(1, 2, 5, 8, 2, "zero_point")
    with pytest.raises(ConfigError, match="tokens of x and slots are 3 and 2"):
        append(*buffers, x, slots[:2], 2, 8, 1.0, "zero_point")
    with pytest.raises(ConfigError, match=r"slots is torch\.int32"):
        append(*buffers, x, slots.int(), 2, 8, 1.0, "zero_point")
    with pytest.raises(ConfigError, match=r"offset is torch\.int16 for scheme 'midpoint'"):
        append(*buffers, x, slots, 2, 8, 1.0, "midpoint")
    with pytest.raises(ConfigError, match="groups of x and codes are 4 and 2"):
        append(*buffers, torch.zeros(1, 4, 3, 8), slots, 2, 8, 1.0, "zero_point")
    with pytest.raises(ConfigError, match="channels of both tensors are 8 and 7"):
        store(torch.zeros(1, 2, 5, 7), x, slots)
