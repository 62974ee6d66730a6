"""Word problems: does a model still reach the exact answer in worked steps?"""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx.evaluate.decoding import Answers, Progress, answer
from rotatekv_fx.evaluate.tasks import Case, total_found, word_problem_case
from rotatekv_fx.evaluate.text import encode

NEW_TOKENS = 96


def word_problem_cases(
    tokenizer: PreTrainedTokenizerBase, count: int, lengths: Sequence[int], seed: int = 0
) -> list[Case]:
    """`count` problems, each after worked ones up to one of `lengths` tokens in turn."""
    rng = random.Random(f"word problems {seed}")
    return [
        word_problem_case(rng, lengths[i % len(lengths)], lambda text: len(encode(tokenizer, text)))
        for i in range(count)
    ]


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    batch: int = 8,
    progress: Progress | None = None,
) -> Answers:
    """Which problems a model solves.

    Raises:
        InputError: there are no cases, or one is too long for the model.
    """
    return answer(model, tokenizer, cases, total_found, NEW_TOKENS, batch, progress)
