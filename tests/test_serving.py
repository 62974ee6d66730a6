"""Serving: what works with a transformed model, and what is refused before it goes wrong."""

import copy

import pytest
import torch
import zoo
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx.errors import StateError


@pytest.fixture
def packed():
    return copy.deepcopy(zoo.packed("llama", "none"))


@pytest.mark.parametrize(
    "name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_continuous_batching_is_refused(packed, name):
    with pytest.raises(StateError, match=r"paged 16-bit cache.*rotatekv_fx.restore\(model\)"):
        getattr(packed, name)(inputs=[[5, 6, 7]])
    rk.restore(packed)
    assert name not in vars(packed)


@pytest.mark.parametrize("implementation", ["paged|sdpa", "flash_attention_2", "flex_attention"])
def test_another_attention_implementation_is_refused(packed, implementation):
    """Whoever sets it: its masks are no masks of packed layers."""
    packed.config._attn_implementation_internal = implementation
    for block in packed.model.layers:
        block.self_attn.config._attn_implementation_internal = implementation
    with pytest.raises(StateError, match=r"makes masks that packed layers cannot read; call .*'sdpa'"):
        packed(zoo.prompt()[0])


def test_eager_masks_can_be_read(packed):
    ids, mask = zoo.prompt()
    with torch.no_grad():
        expected = packed(ids, attention_mask=mask).logits
        packed.set_attn_implementation("eager")
        found = packed(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)
