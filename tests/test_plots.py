"""Figures, the outliers they show, and the benchmark that draws them."""

from __future__ import annotations

import builtins
import json
import sys

import pytest
import torch

from rotatekv_fx import RotateKVConfig, calibrate
from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate import load_model
from rotatekv_fx.evaluate.outliers import key_outliers
from rotatekv_fx.evaluate.plots import plot_outliers, plot_rate, plot_recall

RATE = [
    {"method": "a", "window": 0, "bits_per_element": bits, "kl": 1 / bits**3, "perplexity": 40 + gap}
    for bits, gap in ((2.25, 4.0), (4.25, -0.1))
] + [{"method": "b", "window": 64, "bits_per_element": 3.0, "kl": 0.2, "perplexity": 45.0}]
PLACES = [
    {"length": length, "depth": depth, "accuracy": 90.0}
    for length in (700, 1900)
    for depth in (0.0, 0.5, 1.0)
]
OUTLIERS = [{"layer": i, "steps": {"before RoPE": [9.0, 2.0], "rotated": [1.1, 1.2]}} for i in range(3)]


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 8000, (1, 48), generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def tiny_model(tiny_model_folder):
    return load_model(str(tiny_model_folder), "float32")


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_rate(RATE, 40.0, path),
        lambda path: plot_recall({"16 bit": PLACES, "packed": PLACES}, path),
        lambda path: plot_outliers(OUTLIERS, "centered", path),
    ],
    ids=["rate", "recall", "outliers"],
)
def test_figures_are_drawn_without_a_display(draw, tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "figure.png")
    content = (tmp_path / "figure.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 8000
    assert "matplotlib.pyplot" not in sys.modules


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    own_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return own_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"rotatekv-fx\[bench\]"):
        plot_rate(RATE, 40.0, tmp_path / "figure.png")


def test_outliers_of_a_planted_channel_vanish_with_its_mean(tiny_model_folder, windows):
    """A constant added to one channel before RoPE is what the recipe's mean removes."""
    model = load_model(str(tiny_model_folder), "float32")
    projection = model.model.layers[1].self_attn.k_proj
    bias = torch.zeros(projection.out_features)
    bias[5] = 40 * projection.weight.std()
    projection.bias = torch.nn.Parameter(bias)
    calibration = calibrate(model, windows, progress=lambda done, total: None)
    rows = key_outliers(model, RotateKVConfig(recipe="centered", window=0), calibration, windows)
    assert [row["layer"] for row in rows] == [0, 1]
    steps = rows[1]["steps"]
    assert list(steps) == ["before RoPE", "after RoPE", "mean removed", "rotated"]
    assert steps["before RoPE"][0] > 3 * steps["before RoPE"][1]
    assert steps["mean removed"][0] < 0.5 * steps["after RoPE"][0]
    assert max(steps["rotated"]) < 1.6


def test_outliers_follow_the_steps_of_each_recipe(tiny_model, windows):
    calibration = calibrate(tiny_model, windows, progress=lambda done, total: None)
    paper = key_outliers(tiny_model, RotateKVConfig(recipe="paper"), calibration, windows)
    assert list(paper[0]["steps"]) == ["before RoPE", "rotated", "reordered"]
    rotated, reordered = (paper[0]["steps"][step] for step in ("rotated", "reordered"))
    assert rotated != reordered and len(rotated) == 2
    none = key_outliers(tiny_model, RotateKVConfig(recipe="none"), None, windows)
    assert list(none[0]["steps"]) == ["before RoPE", "after RoPE"]
    assert all(ratio >= 1 for row in none for ratios in row["steps"].values() for ratio in ratios)


def test_benchmark_writes_data_and_figures(tiny_model_folder, repository, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks import run_accuracy

    (tmp_path / "accuracy.json").write_text('{"rate": "of an earlier run"}')
    run_accuracy.main(
        out=tmp_path, part=["outliers"], quick=True, model=tiny_model_folder, context=64, device="cpu"
    )
    figures = json.loads((tmp_path / "accuracy.json").read_text())
    assert figures["rate"] == "of an earlier run"
    assert figures["outliers"]["settings"]["quick"]
    assert set(figures["outliers"]["figures"]) == {"paper", "centered"}
    assert (tmp_path / "outliers_centered.png").exists() and (tmp_path / "outliers_paper.png").exists()
