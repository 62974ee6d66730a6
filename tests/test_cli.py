"""The command line: what it prints and writes, and one message with exit code 2 for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from rotatekv_fx import RotateKVConfig, cli
from rotatekv_fx.evaluate import encode, load_model, load_tokenizer


@pytest.fixture(scope="module")
def text(repository, tmp_path_factory):
    """A text that fills a few windows of 64 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((repository / "benchmarks/data/calibration.txt").read_text(encoding="utf-8")[:1600])
    return path


@pytest.fixture(scope="module")
def statistics(tiny_model_folder, text, tmp_path_factory):
    """A calibration that the command wrote."""
    path = tmp_path_factory.mktemp("statistics") / "calibration.safetensors"
    run = ["calibrate", tiny_model_folder, "--text", text, "--context", 64, "--windows", 3, "--out", path]
    assert cli.main([str(part) for part in run]) == 0
    return path


@pytest.fixture
def rotatekv(capsys):
    """Run a command line; returns its exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_inspect_shows_the_sites(rotatekv, tiny_model_folder, tmp_path):
    code, out, err = rotatekv("inspect", tiny_model_folder, "--json", tmp_path / "sites.json")
    assert (code, err) == (0, "")
    assert "2 matched, 0 rejected" in out
    sites = json.loads((tmp_path / "sites.json").read_text())["report"]["sites"]
    assert [(site["kv_heads"], site["head_dim"]) for site in sites] == [(2, 32), (2, 32)]


def test_eval_writes_a_row_for_each_recipe(rotatekv, tiny_model_folder, text, statistics, tmp_path):
    code, out, err = rotatekv(
        *("eval", tiny_model_folder, "--text", text, "--calibration", statistics),
        *("--recipe", "none", "--recipe", "paper", "--bits", 4, "--value-bits", 3, "--window", 0),
        *("--context", 64, "--windows", 2, "--dtype", "float32", "--json", tmp_path / "figures.json"),
    )
    assert (code, err) == (0, "")
    figures = json.loads((tmp_path / "figures.json").read_text())
    none, paper = figures["rows"]
    assert (none["recipe"], paper["recipe"]) == ("none", "paper")
    assert (paper["key_bits"], paper["value_bits"], paper["window"]) == (4, 3, 0)
    assert none["tokens"] == paper["tokens"] == 2 * 63
    assert none["kl"] == pytest.approx(0.0, abs=1e-6)
    assert none["perplexity"] == pytest.approx(figures["untransformed_perplexity"], rel=1e-5)
    assert paper["kl"] > 0
    assert len(paper["per_window"]["kl"]) == 2
    assert {"bits_per_element", "agreement", "seconds"} <= paper.keys()
    assert figures["calibration"]["source"] == "file"
    assert (figures["context"], figures["windows"], figures["start_token"]) == (64, 2, 1)
    assert figures["versions"]["torch"] == torch.__version__
    assert f"{paper['perplexity']:.2f}" in out


def test_eval_calibrates_on_a_text(rotatekv, tiny_model_folder, text, tmp_path):
    code, out, _ = rotatekv(
        *("eval", tiny_model_folder, "--text", text, "--calibration-text", text, "--recipe", "paper"),
        *("--context", 64, "--windows", 1, "--json", tmp_path / "figures.json"),
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert code == 0
    assert [row["recipe"] for row in figures["rows"]] == ["paper"]
    assert figures["calibration"]["context"] == 64
    assert "windows of 64 tokens" in out


def test_generate_prints_the_models_continuation(rotatekv, tiny_model_folder, tmp_path):
    code, out, err = rotatekv(
        *("generate", tiny_model_folder, "--prompt", "The [red] river", "--recipe", "none"),
        *("--max-new-tokens", 4, "--dtype", "float32", "--json", tmp_path / "figures.json"),
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    tokenizer, model = load_tokenizer(str(tiny_model_folder)), load_model(str(tiny_model_folder), "float32")
    ids = torch.tensor([[1, *encode(tokenizer, "The [red] river")]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist()
    assert (code, err) == (0, "")
    assert figures["new_tokens"] == expected
    assert out.startswith("The [red] river" + figures["continuation"])
    assert figures["cache_bytes_16bit"] == figures["cache_tokens"] * 2 * (2 * 2 * 32) * 2
    assert figures["calibration"] is None


def test_generate_runs_on_packed_codes(rotatekv, tiny_model_folder, text, statistics, tmp_path):
    code, *_ = rotatekv(
        *("generate", tiny_model_folder, "--prompt-file", text, "--calibration", statistics),
        *("--recipe", "paper", "--sinks", 0, "--max-new-tokens", 4, "--json", tmp_path / "figures.json"),
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert code == 0
    assert figures["cache_bytes"] < figures["cache_bytes_16bit"] / 3
    assert figures["bits_per_element"] < 16 / 3


def test_demo_shows_sites_continuations_bytes_and_perplexities(rotatekv, tiny_model_folder, text, tmp_path):
    code, out, err = rotatekv(
        *("demo", "--model", tiny_model_folder, "--text", text, "--calibration-text", text),
        *("--context", 64, "--windows", 1, "--max-new-tokens", 4, "--prompt", "The river"),
        *("--json", tmp_path / "figures.json"),
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (code, err) == (0, "")
    for told in (
        "2 matched, 0 rejected",
        f"2-bit cache (recipe {RotateKVConfig.recipe})",
        "bytes",
        "perplexity",
    ):
        assert told in out
    assert len(figures["continuations"]) == 2
    assert [row["recipe"] for row in figures["rows"]][:2] == ["none", "paper"]


# Mistakes

MISTAKES = [
    ((), "Missing command"),
    (("compress",), "'compress'"),
    (("eval",), "MODEL"),
    (("eval", "MODEL"), "--text"),
    (("eval", "MODEL", "--text", "absent.txt"), "absent.txt"),
    (("eval", "MODEL", "--text", "EMPTY"), "is empty"),
    (("eval", "MODEL", "--text", "TEXT", "--context", "64", "--windows", "9999"), "9999"),
    (("eval", "MODEL", "--text", "TEXT", "--context", "513"), "at most 512"),
    (("eval", "MODEL", "--text", "TEXT", "--context", "1"), "--context"),
    (("eval", "MODEL", "--text", "TEXT", "--recipe", "magic"), "'magic'"),
    (("eval", "MODEL", "--text", "TEXT", "--bits", "5"), "5"),
    (("eval", "MODEL", "--text", "TEXT", "--bits", "two"), "--bits"),
    (("eval", "MODEL", "--text", "TEXT", "--sinks", "-1"), "-1"),
    (("eval", "MODEL", "--text", "TEXT", "--dtype", "float17"), "'float17'"),
    (("eval", "MODEL", "--text", "TEXT", "--device", "abacus"), "'abacus'"),
    (("eval", "MODEL", "--text", "TEXT", "--json", "absent/figures.json"), "absent"),
    (("eval", "MODEL", "--text", "TEXT", "--json", "."), "Cannot write"),
    (("eval", "MODEL", "--text", "TEXT", "--calibration", "absent.safetensors"), "absent.safetensors"),
    (("eval", "MODEL", "--text", "TEXT", "--calibration", "TEXT"), "damaged"),
    (("eval", "MODEL", "--text", "TEXT", "--calibration", "FOREIGN"), "no calibration file"),
    (("eval", "MODEL", "--text", "TEXT", "--calibration", "a", "--calibration-text", "b"), "one of the two"),
    (("inspect", "./absent"), "./absent"),
    (("inspect", "FOLDER"), "config.json"),
    (("inspect", "MODEL", "--everything"), "--everything"),
    (("calibrate", "MODEL"), "--out"),
    (("calibrate", "MODEL", "--out", "absent/x"), "absent"),
    (("calibrate", "MODEL", "--out", "x", "--windows", "3"), "--text"),
    (("generate", "MODEL"), "--prompt"),
    (("generate", "MODEL", "--prompt", "a", "--prompt-file", "TEXT"), "--prompt"),
    (("generate", "MODEL", "--prompt", ""), "empty"),
    (("generate", "MODEL", "--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens"),
    (("demo", "--text", "absent.txt"), "absent.txt"),
]


@pytest.mark.parametrize(
    ("arguments", "told"), MISTAKES, ids=lambda value: " ".join(value)[-40:] or "nothing"
)
def test_a_mistake_ends_in_one_message(
    arguments, told, rotatekv, tiny_model_folder, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "folder").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    names = {
        "MODEL": tiny_model_folder,
        "TEXT": text,
        "EMPTY": tmp_path / "empty.txt",
        "FOLDER": tmp_path / "folder",
        "FOREIGN": tmp_path / "foreign.safetensors",
    }
    code, out, err = rotatekv(*(names.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("rotatekv: ")
    assert err.count("\n") == 1
    assert told in err


def test_the_calibration_of_another_model_is_refused(rotatekv, reference_model, repository, text, statistics):
    code, _, err = rotatekv(
        *("eval", repository / "benchmarks/reference_model", "--text", text, "--context", 64),
        *("--windows", 1, "--recipe", "paper", "--calibration", statistics),
    )
    assert code == 2
    assert "another model" in err
    assert err.count("\n") == 1


def test_a_group_size_that_does_not_divide_is_refused(rotatekv, tiny_model_folder, text, statistics):
    code, _, err = rotatekv(
        *("eval", tiny_model_folder, "--text", text, "--context", 64, "--windows", 1, "--recipe", "paper"),
        *("--calibration", statistics, "--group-size", 48),
    )
    assert code == 2
    assert "48" in err
    assert err.count("\n") == 1


def test_an_interrupt_ends_in_one_line(rotatekv, tiny_model_folder, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", interrupt)
    assert rotatekv("inspect", tiny_model_folder) == (130, "", "rotatekv: Interrupted.\n")


def test_the_module_runs_as_a_command(repository):
    done = subprocess.run(
        [sys.executable, "-m", "rotatekv_fx.cli", "inspect", "./absent"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    message = "rotatekv: There is no folder './absent'; give the folder of a model, or a hub id.\n"
    assert done.stderr.endswith(message)  # libraries may have warned of themselves before
    assert "Traceback" not in done.stderr
