"""Recipes: what `paper` decides, by formulas written out here, and what its codes do to a model."""

import dataclasses
import itertools

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx import RotateKVConfig, recipes
from rotatekv_fx.errors import ConfigError
from rotatekv_fx.recipes import ChannelTransform, LayerPlan, LayerShape, Quantizer
from rotatekv_fx.recipes.base import hadamard


def config(**settings):
    return RotateKVConfig(recipe="paper", **settings)


def statistics_with(key_sum):
    """Statistics of a layer whose keys add up to `key_sum` [Hkv, D]."""
    one = zoo.shared_calibration("llama", 1).layers[0]
    return dataclasses.replace(one, key_sum=key_sum)


def plan_of(kv_heads=2, dim=32, value_dim=None, key_sum=None, **settings):
    shape = LayerShape(0, kv_heads, 2 * kv_heads, dim, value_dim or dim)
    if key_sum is None:
        generator = torch.Generator().manual_seed(kv_heads * dim)
        key_sum = torch.randn(kv_heads, dim, dtype=torch.float64, generator=generator)
    return recipes.get("paper").plan(shape, config(**settings), statistics_with(key_sum))


def walsh(size):
    """H[i, j] = (-1)^(number of ones that i and j share in binary) / sqrt(size)."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


# The registry


def test_names():
    assert {"none", "paper"} <= set(recipes.names())
    assert list(recipes.names()) == sorted(recipes.names())
    assert all(recipes.get(name).name == name for name in recipes.names())


@pytest.mark.parametrize("name", ["", "Paper", "papre", None])
def test_an_unknown_recipe_is_refused_with_those_there_are(name):
    with pytest.raises(ConfigError, match=f"recipe {name!r} is unknown; use one of") as caught:
        recipes.get(name)
    assert all(known in str(caught.value) for known in recipes.names())


def test_a_recipe_of_ones_own(monkeypatch):
    """It needs a name, what it needs, and a plan."""

    class Halves(type(recipes.get("none"))):
        name = "halves"

        def plan(self, shape, config, statistics):
            double = 2 * torch.eye(shape.value_dim, dtype=torch.float64).unsqueeze(0)
            return LayerPlan(value=ChannelTransform(double, double / 4))

    monkeypatch.setattr(recipes.base, "_REGISTRY", dict(recipes.base._REGISTRY))
    recipes.register(Halves())
    assert "halves" in recipes.names()
    model = zoo.shared("llama", 1)
    packed = zoo.transformed(model, "halves")
    ids, mask = zoo.prompt()
    with torch.no_grad():
        found = packed(ids, attention_mask=mask)
        torch.testing.assert_close(found.logits, model(ids, attention_mask=mask).logits, rtol=0, atol=2e-5)
    values = packed.model.layers[0].self_attn.v_proj.weight
    torch.testing.assert_close(values, 2 * model.model.layers[0].self_attn.v_proj.weight)


def test_recipe_none_plans_nothing():
    assert (
        recipes.get("none").plan(LayerShape(0, 2, 4, 32, 32), RotateKVConfig(recipe="none"), None)
        == LayerPlan()
    )


# Parts of a plan


@pytest.mark.parametrize("size", [1, 2, 4, 8, 32, 64, 128, 256, 512])
def test_hadamard(size):
    assert hadamard(size).dtype is torch.float64
    torch.testing.assert_close(hadamard(size), walsh(size), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("size", "block"), [(6, 2), (24, 8), (48, 16), (80, 16), (96, 32), (7, 1), (65, 1)])
def test_hadamard_of_other_sizes_is_block_diagonal(size, block):
    expected = torch.block_diag(*[walsh(block)] * (size // block))
    torch.testing.assert_close(hadamard(size), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(hadamard(size) @ hadamard(size).mT, torch.eye(size, dtype=torch.float64))


def test_a_channel_transform_rotates_blocks_and_then_reorders():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator)
    order = torch.randperm(12, generator=generator)
    x = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    transform = ChannelTransform(blocks, torch.linalg.inv(blocks), order)
    expected = torch.cat([part @ block for part, block in zip(x.split(4, 1), blocks, strict=True)], 1)[
        :, order
    ]
    torch.testing.assert_close(transform.apply(x), expected)
    shared = ChannelTransform(blocks[:1], torch.linalg.inv(blocks[:1]))
    expected = torch.cat([part @ blocks[0] for part in x.split(4, 1)], 1)
    torch.testing.assert_close(shared.apply(x), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_a_channel_transform_makes_nothing_larger_than_what_it_transforms(shared):
    """Weights have thousands of rows: its matrices must not be copied for each."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if made.is_contiguous():  # not a view that repeats
                sizes.append(made.numel())
            return made

    matrix = torch.eye(8, dtype=torch.float64).repeat(1 if shared else 4, 1, 1)
    x = torch.randn(32, 64, dtype=torch.float64).mT  # a weight's rows
    with Sizes():
        ChannelTransform(matrix, matrix).apply(x)
    assert sizes and max(sizes) <= x.numel()


def test_bits_of_an_element_count_scale_and_zero_point():
    assert Quantizer(2, 128, 0.8, "zero_point").bits_per_element == 2.25
    assert Quantizer(3, 128, 1.0, "zero_point").bits_per_element == 3.25
    assert Quantizer(4, 32, 1.0, "zero_point").bits_per_element == 5.0


# paper


@pytest.mark.parametrize(
    ("kv_heads", "group"), [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (8, 4), (12, 4), (10, 2), (32, 4)]
)
def test_heads_rotated_together(kv_heads, group):
    """Four neighbouring heads, or the largest power of two that divides their number."""
    plan = plan_of(kv_heads, 16)
    assert plan.before_rope
    assert plan.key.matrix.shape == (1, group * 16, group * 16)
    torch.testing.assert_close(plan.key.matrix[0], walsh(group * 16), rtol=0, atol=1e-14)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_a_head_group_of_ones_own(heads):
    assert plan_of(8, 16, head_group=heads).key.matrix.shape[-1] == heads * 16


def test_a_head_group_that_does_not_divide():
    with pytest.raises(ConfigError, match="head_group 4 does not divide the 6 KV heads"):
        plan_of(6, 16, head_group=4)


@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 32), (8, 16), (3, 24)])
def test_channels_are_sorted_by_their_rotated_sums(kv_heads, dim):
    """Rotate first, reorder second: one ascending order over all channels of the layer."""
    generator = torch.Generator().manual_seed(1)
    key_sum = torch.randn(kv_heads, dim, dtype=torch.float64, generator=generator)
    plan = plan_of(kv_heads, dim, key_sum=key_sum)
    size = plan.key.matrix.shape[-1]
    blocks = key_sum.flatten().split(size)
    rotated = torch.cat([block @ plan.key.matrix[0] for block in blocks])
    assert sorted(plan.key.order.tolist()) == list(range(kv_heads * dim))
    assert bool((rotated[plan.key.order].diff() >= 0).all())
    assert plan.value.order is None
    x = torch.randn(4, kv_heads * dim, dtype=torch.float64, generator=generator)
    y = plan.key.apply(x)
    back = torch.empty_like(y)
    back[:, plan.key.order] = y
    undone = torch.cat([part @ plan.key.inverse[0] for part in back.split(size, 1)], 1)
    torch.testing.assert_close(undone, x)


def test_values_are_rotated_per_head():
    plan = plan_of(4, 16, value_dim=32)
    assert plan.value.matrix.shape == (1, 32, 32)
    torch.testing.assert_close(plan.value.matrix[0], walsh(32), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        plan.value.inverse @ plan.value.matrix, torch.eye(32, dtype=torch.float64)[None]
    )


@pytest.mark.parametrize(("bits", "clip"), [(2, 0.8), (3, 1.0), (4, 1.0), (8, 1.0)])
def test_codes(bits, clip):
    plan = plan_of(8, 64, key_bits=bits)
    assert plan.key_quantizer == Quantizer(bits, 128, clip, "zero_point")
    assert plan.value_quantizer == Quantizer(2, 128, 0.8, "zero_point")
    assert plan_of(8, 64, value_bits=bits).value_quantizer == Quantizer(bits, 128, clip, "zero_point")


def test_settings_of_the_codes():
    plan = plan_of(4, 32, value_dim=16, key_clip=0.9, value_clip=0.7, group_size=32)
    assert plan.key_quantizer == Quantizer(2, 32, 0.9, "zero_point")
    assert plan.value_quantizer == Quantizer(2, 32, 0.7, "zero_point")
    assert plan_of(4, 24, value_dim=16).key_quantizer.group == 96
    assert plan_of(4, 24, value_dim=16).value_quantizer.group == 64


@pytest.mark.parametrize("group_size", [48, 100, 256])
def test_a_group_that_does_not_divide(group_size):
    with pytest.raises(ConfigError, match=f"group_size {group_size} does not divide the 128 channels"):
        plan_of(4, 32, group_size=group_size)


def test_sinks_and_window():
    assert (plan_of().sinks, plan_of().window) == (20, 0)
    assert plan_of(sinks=0).sinks == 0
    assert plan_of(sinks=7).sinks == 7


# The whole of it, written out

TOP = 3  # the largest code of two bits


def through_codes(x, order):
    """[T, C] tokens: reordered, quantized in one group of all channels, and put back."""
    x = x[:, order]
    high, low = 0.8 * x.amax(1, keepdim=True), 0.8 * x.amin(1, keepdim=True)
    scale = ((high - low) / TOP).half().float()
    zero = torch.round(-low / scale)
    coded = scale * (torch.clamp(torch.round(x / scale) + zero, 0, TOP) - zero)
    back = torch.empty_like(coded)
    back[:, order] = coded
    return back


@torch.no_grad()
def plain_attention(attention, hidden, rows, mask, key_sum, sinks):
    """One sequence [T, C] through a llama attention whose keys and values pass two bits, as published."""
    tokens = hidden.shape[0]
    query, key, value = (p(hidden) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    rotation, per_head = walsh(64).float(), torch.block_diag(walsh(32), walsh(32)).float()
    order = torch.argsort(key_sum.flatten() @ walsh(64))
    read_key = through_codes(key @ rotation, order) @ rotation.mT
    read_value = through_codes(value @ per_head, torch.arange(64)) @ per_head.mT
    exact = torch.tensor([token in sinks for token in range(tokens)])[:, None]
    key, value = torch.where(exact, key, read_key), torch.where(exact, value, read_value)
    query, key, value = (x.view(1, tokens, -1, 32).transpose(1, 2) for x in (query, key, value))
    query, key = apply_rotary_pos_emb(query, key, *rows)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key.mT * 32**-0.5).masked_fill(~mask, -torch.inf)
    return attention.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))[0]


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 6])
def test_paper_is_what_the_method_says(sinks):
    model, packed = zoo.shared("llama", 1), zoo.packed("llama", layers=1, sinks=sinks)
    ids = torch.randint(3, zoo.VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(8))
    block, attention = model.model.layers[0], model.model.layers[0].self_attn
    embedded = model.model.embed_tokens(ids)
    hidden = block.input_layernorm(embedded)[0]
    largest = embedded[0].abs().flatten().sort(descending=True).indices[:sinks]
    rows = model.model.rotary_emb(embedded, torch.arange(40)[None])
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    key_sum = zoo.shared_calibration("llama", 1).layers[0].key_sum
    chosen = {int(i) // 128 for i in largest}
    expected = plain_attention(attention, hidden, rows, causal, key_sum, chosen)

    outputs = []
    handle = packed.model.layers[0].self_attn.register_forward_hook(
        lambda m, a, out: outputs.append(out[0][0])
    )
    packed(ids)
    cache = DynamicCache(config=packed.config)
    packed(ids[:, :30], past_key_values=cache)
    packed(ids[:, 30:], past_key_values=cache)
    handle.remove()
    assert zoo.relative(outputs[0], expected) < 2e-3  # sinks are kept in 16 bit
    exact = plain_attention(attention, hidden, rows, causal, key_sum, set(range(40)))
    assert zoo.relative(outputs[0], exact) > 0.1
    if not sinks:  # the sinks of a chunk are chosen among its own tokens
        assert zoo.relative(torch.cat(outputs[1:]), expected) < 2e-3


# What the codes do to a model

EIGHT_BITS = ("llama", "qwen3", "gemma2", "phi3", "gpt_neox", "glm", "gpt_oss", "cohere")


@torch.no_grad()
def error_of(name, **settings):
    """Relative error of a token's logits, the median: where experts are chosen, a small error may
    change one.
    """
    ids, mask = zoo.prompt(length=24)
    options = {"attention_mask": mask, "position_ids": zoo.positions_of(mask)}
    models = zoo.packed(name, layers=1, **settings), zoo.shared(name, 1)
    found, expected = (model(ids, **options).logits[mask.bool()] for model in models)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).median())


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_eight_bits_are_close_to_sixteen(name):
    assert 1e-6 < error_of(name, key_bits=8, value_bits=8, sinks=0) < 0.02


def test_more_bits_are_closer():
    errors = [error_of("llama", key_bits=bits, value_bits=bits, sinks=0) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert all(coarse > 1.5 * fine for coarse, fine in itertools.pairwise(errors))


def test_bits_of_keys_and_values_are_apart():
    both = error_of("llama", key_bits=8, value_bits=8, sinks=0)
    keys = error_of("llama", key_bits=2, value_bits=8, sinks=0)
    values = error_of("llama", key_bits=8, value_bits=2, sinks=0)
    assert min(keys, values) > 3 * both


def test_the_report_names_the_recipe():
    assert rk.report(zoo.packed("llama", layers=1, sinks=0)).config["recipe"] == "paper"
