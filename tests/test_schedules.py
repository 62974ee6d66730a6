"""Random schedules of what a cache goes through: append, crop, reorder, repeat, select, reset.

The model of a cache is the list of tokens itself. Whatever the schedule, the next logits must be those of the
untransformed model on these tokens (recipe `none`), or those of the transformed model on a fresh cache.
"""

import dataclasses
import itertools

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given, settings
from transformers import DynamicCache, StaticCache
from zoo import one_thread  # noqa: F401

EXAMPLES = 46  # of each case below: more than 500 schedules
SPACE = 64  # of static caches
LONGEST = 48
CLOSE = 2e-5
# A rounding difference may tip a code over to its neighbour: far below what a token too many or too few does.
CLOSE_IN_CODES = 0.02


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its cache.

    Attributes:
        name, recipe, settings: of the model.
        static: fixed buffers, whose batch does not change and which are not cropped.
        sliding: some layers slide, and can be cropped by what was recorded since the last crop.
    """

    name: str
    recipe: str
    settings: tuple[tuple[str, int], ...] = ()
    static: bool = False
    sliding: bool = False

    @property
    def packed(self):
        return zoo.packed(self.name, self.recipe, **dict(self.settings))

    @property
    def window(self):
        return dict(self.settings).get("window", 0)

    @property
    def slack(self):
        return dict(self.settings).get("slack", 0)

    @property
    def sinks(self):
        return dict(self.settings).get("sinks", 0)


BITS = (("key_bits", 4), ("value_bits", 4))
WINDOW = (("window", 5), ("slack", 6))
CASES = {
    "none": Case("llama", "none"),
    "none, static": Case("llama", "none", static=True),
    "none, sliding": Case("gemma2", "none", sliding=True),
    "none, sliding, static": Case("gemma2", "none", static=True, sliding=True),
    "paper": Case("llama", "paper", (*BITS, ("sinks", 0))),
    "paper, sinks": Case("llama", "paper", (*BITS, ("sinks", 6))),
    "paper, static": Case("llama", "paper", (*BITS, ("sinks", 6)), static=True),
    "centered": Case("llama", "centered", (*BITS, *WINDOW, ("sinks", 0))),
    "centered, sinks": Case("llama", "centered", (*BITS, *WINDOW, ("sinks", 6))),
    "centered, static": Case("llama", "centered", (*BITS, *WINDOW, ("sinks", 6)), static=True),
    "centered, sliding": Case("gemma2", "centered", (*BITS, *WINDOW, ("sinks", 0)), sliding=True),
}


class Model:
    """The tokens that a cache should hold, and what is known about how they are held.

    Attributes:
        prompt: where each piece of the prompt ends, whose tokens compete for sinks; `open` while it may grow.
        exact: recent tokens held exactly, where the recipe has a window.
        recorded: tokens since the last crop.
    """

    def __init__(self, case):
        self.case = case
        self.cache = self.new_cache()
        self.begin()

    def new_cache(self):
        config = self.case.packed.config
        if self.case.static:
            return StaticCache(config=config, max_cache_len=SPACE)
        cache = DynamicCache(config=config)
        if self.case.sliding:
            cache.activate_past_recording()
        return cache

    def begin(self):
        self.ids, self.mask = torch.empty(3, 0, dtype=torch.int64), torch.empty(3, 0, dtype=torch.int64)
        self.prompt, self.open, self.exact, self.recorded = [], True, 0, 0

    @property
    def length(self):
        return self.ids.shape[1]

    def forward(self, model, cache, start, stop):
        mask = self.mask[:, :stop]
        return model(
            self.ids[:, start:stop],
            attention_mask=mask,
            position_ids=zoo.positions_of(mask)[:, start:],
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits

    def append(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, zoo.VOCABULARY, (len(self.ids), count), generator=generator)
        mask = torch.ones_like(ids)
        if not self.length:  # a prompt, padded on the left
            mask[1, : seed % count] = 0
        start = self.length
        self.ids, self.mask = torch.cat([self.ids, ids * mask], 1), torch.cat([self.mask, mask], 1)
        logits = self.forward(self.case.packed, self.cache, start, self.length)
        self.open &= count > 1
        self.prompt += [self.length] if self.open else []
        self.exact = min(self.exact + count, self.case.window + self.case.slack, self.length)
        self.recorded += count
        return logits

    def most_to_crop(self):
        """How many tokens a crop may remove so that the outcome is defined."""
        most = self.length - 1
        if self.case.sliding:
            most = min(most, self.recorded)
        if self.case.sinks:  # those of the prompt were chosen among all its tokens
            most = min(most, self.length - max(self.prompt, default=0))
        if self.case.window and self.exact < self.length:
            most = min(most, self.exact - self.case.window)
        return max(most, 0)

    def crop(self, number):
        most = self.most_to_crop()
        if most and not self.case.static:
            count = 1 + number % most
            self.cache.crop(-count)
            kept = self.length - count
            self.ids, self.mask = self.ids[:, :kept], self.mask[:, :kept]
            self.open, self.exact, self.recorded = False, self.exact - count, 0

    def reorder(self, number):
        index = torch.randint(
            0, len(self.ids), (len(self.ids),), generator=torch.Generator().manual_seed(number)
        )
        self.cache.reorder_cache(index)
        self.take(index)

    def repeat(self, number):
        if len(self.ids) < 5 and not self.case.static:
            self.cache.batch_repeat_interleave(2)
            self.take(torch.arange(len(self.ids)).repeat_interleave(2))

    def select(self, number):
        if len(self.ids) > 1 and not self.case.static:
            index = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(number))[:-1]
            self.cache.batch_select_indices(index)
            self.take(index)

    def reset(self, number):
        if len(self.ids) == 3 or not self.case.static:
            self.cache.reset()
            self.begin()
            self.append(1 + number % 13, number)

    def take(self, index):
        self.ids, self.mask = self.ids[index], self.mask[index]

    def expected(self, count):
        """Logits of the last `count` tokens without any schedule."""
        if self.case.recipe == "none":
            return self.forward(zoo.shared(self.case.name), None, 0, self.length)[:, -count:]
        cache, model = DynamicCache(config=self.case.packed.config), self.case.packed
        stops = self.prompt if self.case.sinks else []
        last = max(stops, default=0)
        stops = sorted(
            {*stops, min(last + 1, self.length), self.length}
        )  # one token ends the choice of sinks
        pieces = [self.forward(model, cache, *piece) for piece in itertools.pairwise([0, *stops])]
        return torch.cat(pieces, 1)[:, -count:]

    def check(self, seed):
        assert {int(layer.get_seq_length()) for layer in self.cache.layers} == {self.length}
        count = 1 + seed % 3
        found = self.append(count, seed)
        expected = self.expected(count)
        seen = self.mask[:, -count:].bool()
        if self.case.recipe == "none":
            torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=CLOSE)
        else:
            assert zoo.relative(found[seen], expected[seen]) < CLOSE_IN_CODES


NUMBERS = st.integers(0, 10**6)
OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 7), NUMBERS),
    st.tuples(st.sampled_from(["crop", "crop", "reorder", "repeat", "select", "reset"]), NUMBERS),
)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(first=st.integers(1, 15), plan=st.lists(OPERATIONS, min_size=1, max_size=8), seed=NUMBERS)
def test_schedules(name, first, plan, seed):
    model = Model(CASES[name])
    with torch.no_grad():
        model.append(first, seed)
        for operation, *arguments in plan:
            if operation != "append" or model.length + arguments[0] < LONGEST:
                getattr(model, operation)(*arguments)
        model.check(seed)


def test_that_is_enough_schedules():
    assert EXAMPLES * len(CASES) >= 500


@pytest.mark.parametrize("broken", ["crop", "reorder", "repeat", "select", "reset"])
def test_a_schedule_can_fail(monkeypatch, broken):
    """A cache that forgets to do an operation is found out."""
    method = {
        "crop": "crop",
        "reorder": "reorder_cache",
        "repeat": "batch_repeat_interleave",
        "select": "batch_select_indices",
        "reset": "reset",
    }[broken]
    model = Model(CASES["none"])
    with torch.no_grad():
        model.append(12, 0)
        monkeypatch.setattr(model.cache, method, lambda *args: None)
        with pytest.raises((AssertionError, RuntimeError)):
            getattr(model, broken)(7)
            model.check(0)
