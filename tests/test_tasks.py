"""Word problems and recall: cases have exact answers, batches are answered as single prompts are."""

from __future__ import annotations

import random
import re

import pytest

from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate import load_tokenizer, read_text
from rotatekv_fx.evaluate.comparison import compare_on_tasks
from rotatekv_fx.evaluate.decoding import Answers, answer, wilson
from rotatekv_fx.evaluate.reasoning import solve, word_problem_cases
from rotatekv_fx.evaluate.recall import by_place, recall_cases
from rotatekv_fx.evaluate.tasks import (
    Case,
    code_found,
    filler_sentences,
    recall_case,
    total_found,
    word_problem,
)


@pytest.fixture(scope="module")
def tokenizer(repository):
    return load_tokenizer(str(repository / "benchmarks" / "reference_model"))


@pytest.fixture(scope="module")
def filler(repository) -> str:
    return read_text(repository / "benchmarks" / "data" / "calibration.txt")[:60_000]


def words(text: str) -> int:
    return len(text.split())


def total_of_story(question: str) -> int:
    """Solve a word problem from its sentences alone."""
    total = int(re.search(r"has (\d+) ", question)[1])
    for sentence in question.split(". ")[1:]:
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if "doubles" in sentence:
            total *= 2
        elif "bags" in sentence:
            total += numbers[0] * numbers[1]
        elif "gives away" in sentence:
            total -= numbers[0]
        elif "How many" not in sentence:
            total += numbers[0]
    return total


def test_worked_steps_lead_to_the_total_that_the_story_has():
    rng = random.Random(0)
    kinds = set()
    for _ in range(300):
        question, worked, total = word_problem(rng)
        assert total == total_of_story(question) > 0
        assert worked.endswith(f" #### {total}\n")
        for left, right in re.findall(r"([\d +*-]+) = (\d+)\.", worked):
            assert eval(left) == int(right)
        kinds |= {kind for kind in ("buys", "gives", "doubles", "brings", "bags") if kind in question}
        assert re.fullmatch(r"Question: .+ How many \w+ does \w+ have now\?\nAnswer: ", question)
    assert len(kinds) == 5


def test_word_problem_prompts_hold_worked_problems_up_to_their_length(tokenizer):
    cases = word_problem_cases(tokenizer, 6, (100, 400), seed=1)
    assert cases == word_problem_cases(tokenizer, 6, (100, 400), seed=1)
    assert cases != word_problem_cases(tokenizer, 6, (100, 400), seed=2)
    for case in cases:
        count = len(tokenizer(case.prompt, add_special_tokens=False)["input_ids"])
        assert case.length - 100 < count <= case.length
        last = case.prompt[case.prompt.rindex("Question:") :]
        assert case.prompt.endswith("?\nAnswer: ")
        assert int(case.answer) == total_of_story(last)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0, None])
def test_recall_prompts_state_the_answer_once_at_their_depth(filler, depth):
    rng, sentences = random.Random(3), filler_sentences(filler)
    for _ in range(20):
        case = recall_case(rng, sentences, 300, words, depth)
        text, question, end = case.prompt.split("\n")
        key = re.fullmatch(r"Question: What is the code of the (.+)\?", question)[1]
        assert end == f"Answer: The code of the {key} is"
        stated = f"The code of the {key} is {case.answer}."
        assert text.count(stated) == 1
        assert len(re.findall(r"The code of the .+? is \d{5}\.", text)) == 4
        assert 260 < words(case.prompt) <= 300
        if depth is not None:
            before = re.sub(r"The code of the .+? is \d{5}\. ?", "", text[: text.index(stated)])
            after = re.sub(r"The code of the .+? is \d{5}\.", "", text[text.index(stated) :])
            assert words(before) / (words(before) + words(after)) == pytest.approx(depth, abs=0.12)


def test_filler_without_sentences_is_refused():
    with pytest.raises(InputError, match="0 sentences"):
        filler_sentences("too short. no capitals here at all, and so nothing that can be used as filler. ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7 + 4 = 11. #### 11\nQuestion: #### 3", "11"),
        ("7 + 4 = 11.\nQuestion: #### 3", None),
        ("", None),
    ],
)
def test_only_the_first_line_answers_a_problem(text, found):
    assert total_found(text) == found


@pytest.mark.parametrize(("text", "found"), [(" 48213.\n", "48213"), (" 482131", "482131"), (" a 1", None)])
def test_a_code_is_what_the_continuation_starts_with(text, found):
    assert code_found(text) == found


def test_paired_difference_counts_what_changed():
    sixteen, packed = Answers((True,) * 90 + (False,) * 10), Answers((True,) * 88 + (False,) * 11 + (True,))
    gap = packed.minus(sixteen)
    assert gap["points"] == pytest.approx(-1.0)
    assert (gap["won"], gap["lost"]) == (1, 2)
    assert gap["interval"][0] < -1.0 < gap["interval"][1]
    assert sixteen.minus(sixteen)["interval"] == [0.0, 0.0]
    with pytest.raises(InputError, match="2 and 100 cases"):
        Answers((True, True)).minus(sixteen)


def test_places_keep_lengths_and_depths_apart():
    cases = [
        Case("", "1", 700, 0.0),
        Case("", "1", 700, 1.0),
        Case("", "1", 900, 0.0),
        Case("", "1", 700, 0.0),
    ]
    places = by_place(cases, Answers((True, False, True, False)))
    assert [(p["length"], p["depth"], p["right"], p["cases"]) for p in places] == [
        (700, 0.0, 1, 2),
        (700, 1.0, 0, 1),
        (900, 0.0, 1, 1),
    ]


def test_wilson_interval_of_a_known_case():
    assert wilson(8, 10) == pytest.approx([49.02, 94.33], abs=0.02)  # Wilson (1927), n = 10
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 100.0


def test_the_reference_model_solves_and_recalls(reference_model, tokenizer, filler):
    problems = word_problem_cases(tokenizer, 3, (60, 120))
    facts = recall_cases(tokenizer, filler, (150, 250), (0.0, 1.0), 1)
    figures = compare_on_tasks({"own": reference_model}, tokenizer, problems, facts)
    assert figures["word_problems"][0]["right"] >= 2
    assert figures["recall"][0]["right"] >= 3
    assert figures["recall"][0]["difference"]["points"] == 0.0
    places = figures["recall"][0]["places"]
    assert [(p["length"], p["depth"], p["cases"]) for p in places] == [
        (150, 0.0, 1),
        (150, 1.0, 1),
        (250, 0.0, 1),
        (250, 1.0, 1),
    ]
    assert sum(p["right"] for p in places) == figures["recall"][0]["right"]


def test_answers_stay_with_their_cases_whatever_the_batch(reference_model, tokenizer):
    """Lengths differ, so that sorting and left padding are both at work; one wrong answer marks its place."""
    cases = word_problem_cases(tokenizer, 3, (60, 110, 80))
    cases[1] = Case(cases[1].prompt, "no number", cases[1].length)
    alone = answer(reference_model, tokenizer, cases, total_found, 80, batch=1)
    together = answer(reference_model, tokenizer, cases, total_found, 80, batch=3)
    assert alone == together == Answers((True, False, True))


def test_no_cases_and_too_long_cases_are_refused(reference_model, tokenizer):
    with pytest.raises(InputError, match="no cases"):
        solve(reference_model, tokenizer, [])
    with pytest.raises(InputError, match="at most 8192"):
        solve(reference_model, tokenizer, [Case("1 " * 6000, "1", 6000)])
