"""EleutherAI's harness on transformed models, with two tasks whose data is made here."""

from __future__ import annotations

import builtins
import copy
import json
import random

import pytest

from rotatekv_fx import RotateKVConfig, transform
from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate import load_tokenizer
from rotatekv_fx.evaluate.tasks import word_problem

CHOICES = """\
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WORKED = """\
task: local_worked
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{worked}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 96}}
metric_list: [{{metric: exact_match, ignore_case: false}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with two tasks on word problems: choose the worked steps among three, and write them."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rng, lines = random.Random(0), []
    for i in range(3):
        question, worked, _ = word_problem(rng)
        wrong = [word_problem(rng)[1].strip() for _ in range(2)]
        choices = [*wrong[: i % 3], worked.strip(), *wrong[i % 3 :]]
        lines.append({"question": question, "worked": worked.strip(), "choices": choices, "right": i % 3})
    data = tmp_path / "problems.json"
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "local_choices.yaml").write_text(CHOICES.format(data=data))
    (tmp_path / "local_worked.yaml").write_text(WORKED.format(data=data))
    return tmp_path


def test_a_transformed_model_is_scored_as_an_ordinary_one(reference_model, repository, tasks, monkeypatch):
    """The model was trained on such problems: it solves nearly all, on a 2-bit cache too."""
    pytest.importorskip("lm_eval", reason="the harness (extra `harness`) is not installed")
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks.run_harness import harness_scores

    tokenizer = load_tokenizer(str(repository / "benchmarks" / "reference_model"))
    config = RotateKVConfig(recipe="quarot", key_bits=4, value_bits=4, window=16, keep_originals=False)
    models = {
        "untransformed": reference_model,
        "none": transform(copy.deepcopy(reference_model), RotateKVConfig(recipe="none")),
        "packed": transform(copy.deepcopy(reference_model), config),
    }
    scores = harness_scores(models, tokenizer, ["local_choices", "local_worked"], include=tasks)
    for name in models:
        assert scores[name]["local_choices"]["acc,none"] >= 2 / 3
        assert scores[name]["local_worked"]["exact_match,none"] >= 2 / 3
    for task in ("local_choices", "local_worked"):
        same = [{k: v for k, v in scores[n][task].items() if k != "alias"} for n in ("untransformed", "none")]
        assert same[0] == same[1]


def test_missing_harness_names_the_extra(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks.run_harness import harness_scores

    own_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return own_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"rotatekv-fx\[harness\]"):
        harness_scores({}, None, ["local"])
