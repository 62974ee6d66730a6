"""Both tasks, the same cases for several models, each against the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx.evaluate.decoding import Answers, Progress
from rotatekv_fx.evaluate.reasoning import solve
from rotatekv_fx.evaluate.recall import by_place, recall
from rotatekv_fx.evaluate.tasks import Case


def compare_on_tasks(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Case],
    facts: Sequence[Case],
    batch: int = 8,
    progress: Progress | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Answer all cases with each model.

    Args:
        models: by name; the first, the untransformed one, is what the others are compared with.
        problems, facts: of `word_problem_cases` and `recall_cases`.
        progress: called with (cases done, cases in all).

    Returns:
        {"word_problems": rows, "recall": rows}, a row for each model: counts, `accuracy` with its `interval`
        (percent), and `difference` from the first (points, over the same cases). Rows of recall have
        `places`, too: the same for every length and depth.

    Raises:
        InputError: a task has no cases, or one is too long for the model.
    """
    rows: dict[str, list[dict[str, Any]]] = {"word_problems": [], "recall": []}
    first: dict[str, Answers] = {}
    before, total = 0, len(models) * (len(problems) + len(facts))

    def advance(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, total)

    for name, model in models.items():
        for task, run, cases in (("word_problems", solve, problems), ("recall", recall, facts)):
            answers = run(model, tokenizer, cases, batch, advance)
            before += len(cases)
            difference = answers.minus(first.setdefault(task, answers))
            rows[task].append({"recipe": name, **answers.summary(), "difference": difference})
            if task == "recall":
                rows[task][-1]["places"] = by_place(cases, answers)
    return rows
