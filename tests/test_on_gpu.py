"""Whole models on a GPU, where attention runs as kernels, against the same models on a CPU."""

import copy

import pytest
import torch
import zoo
from test_cache import CLOSE_IN_CODES, Sequences, dynamic, next_tokens, run, static
from zoo import one_thread  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PADDING = {"unpadded": (0, 0, 0), "left padding": (0, 4, 9)}


@torch.no_grad()
def logits_of(model, device, make, padding):
    """A prompt in two chunks, then six tokens one by one."""
    model = copy.deepcopy(model).to(device)
    ids, mask = (t.to(device) for t in zoo.prompt(length=24, padding=padding))
    sequences, cache = Sequences(ids, mask), make(model)
    found = [run(model, sequences, cache, 0, 20), run(model, sequences, cache, 20, 24)]
    for step in range(6):
        sequences = sequences.grown(next_tokens(len(ids), seed=step).to(device))
        found.append(run(model, sequences, cache, 24 + step))
    return torch.cat(found, 1)[sequences.mask.bool()].cpu()


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_neox"])
def test_kernels_give_the_logits_of_plain_torch(name, make, padding):
    model = zoo.packed(name, "centered", window=6)
    expected = logits_of(model, "cpu", make, PADDING[padding])
    found = logits_of(model, "cuda", make, PADDING[padding])
    assert zoo.relative(found, expected) < CLOSE_IN_CODES
