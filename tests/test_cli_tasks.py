"""`rotatekv eval-tasks` and `rotatekv inspect --plots`."""

from __future__ import annotations

import json

import pytest

from rotatekv_fx.cli import main


@pytest.fixture
def running_text(repository, tmp_path):
    text = (repository / "benchmarks" / "data" / "calibration.txt").read_text(encoding="utf-8")
    file = tmp_path / "text.txt"
    file.write_text(text[:40_000], encoding="utf-8")
    return file


def test_eval_tasks_writes_both_tasks(tiny_model_folder, running_text, tmp_path, capsys):
    out = tmp_path / "figures.json"
    arguments = f"eval-tasks {tiny_model_folder} --text {running_text} --recipe rtn --cases 2 --length 120"
    assert main([*arguments.split(), "--depth", "0.5", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert [row["recipe"] for row in figures["recall"]] == ["untransformed", "rtn"]
    assert [row["cases"] for row in figures["word_problems"]] == [2, 2]
    assert figures["recall"][1]["places"][0]["depth"] == 0.5
    assert "0/2" in capsys.readouterr().out


def test_eval_tasks_refuses_prompts_longer_than_the_model(tiny_model_folder, running_text, capsys):
    arguments = f"eval-tasks {tiny_model_folder} --text {running_text} --length 500"
    assert main(arguments.split()) == 2
    assert "at most 512" in capsys.readouterr().err


def test_inspect_draws_outliers_of_a_text(tiny_model_folder, running_text, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("rotatekv_fx.cli.CALIBRATION_CONTEXT", 64)
    monkeypatch.setattr("rotatekv_fx.cli.CALIBRATION_WINDOWS", 2)
    out, folder = tmp_path / "figures.json", tmp_path / "plots"
    arguments = f"inspect {tiny_model_folder} --plots {folder} --calibration-text {running_text} --json {out}"
    assert main(arguments.split()) == 0
    assert (folder / "outliers_centered.png").stat().st_size > 5000
    assert [row["layer"] for row in json.loads(out.read_text())["key_outliers"]] == [0, 1]


def test_inspect_refuses_a_text_without_plots(tiny_model_folder, running_text, capsys):
    assert main(["inspect", str(tiny_model_folder), "--calibration-text", str(running_text)]) == 2
    assert "--plots" in capsys.readouterr().err
