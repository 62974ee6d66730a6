"""The name that a model has for its cache."""

import pytest
import torch
import zoo
from torch import nn

from rotatekv_fx.errors import InputError
from rotatekv_fx.naming import cache_argument, cache_of


class New(nn.Module):
    def forward(self, input_ids, cache=None):
        return input_ids


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None, **others):
        return input_ids


class Open(nn.Module):
    def forward(self, input_ids, **others):
        return input_ids


class Without(nn.Module):
    def forward(self, input_ids):
        return input_ids


@pytest.mark.parametrize(
    ("model", "name"), [(New, "cache"), (Old, "past_key_values"), (Open, "past_key_values")]
)
def test_the_argument_is_read_off_the_forward(model, name):
    assert cache_argument(model()) == name


def test_a_model_that_takes_no_cache_is_refused():
    with pytest.raises(InputError, match="Without.forward takes neither cache nor past_key_values"):
        cache_argument(Without())


def test_the_cache_of_an_output():
    assert cache_of({"logits": 1, "cache": "new"}) == "new"
    assert cache_of({"logits": 1, "past_key_values": "old"}) == "old"
    assert cache_of({"logits": 1}) is None


def test_a_model_says_nothing_of_an_old_name(recwarn):
    model = zoo.build("llama")
    ids, _ = zoo.prompt(padding=())
    cache = cache_of(model(ids, use_cache=True))
    with torch.no_grad():
        model(ids, **{cache_argument(model): cache})
    assert not [w for w in recwarn if "past_key_values" in str(w.message)]
