"""Figures of an evaluation, drawn from its rows. They need matplotlib, the extra `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rotatekv_fx.errors import InputError

_MARKERS = "osD^vPX*<>"


def plot_rate(rows: Sequence[Mapping[str, Any]], untransformed_perplexity: float, path: Path) -> None:
    """KL divergence, and perplexity lost, against bits per element: one line a method.

    Args:
        rows: with "method", "window", "bits_per_element", "kl" and "perplexity"; a method with a window of
            exact tokens ("name, window n") is drawn dashed, in the colour of that without.
        untransformed_perplexity: over the same windows.
        path: of the image; its suffix says which kind.

    Raises:
        InputError: matplotlib is missing.
    """
    figure, axes = _figure(2, (12, 5.6))
    losses = ("kl", "KL from the untransformed model (nats)"), ("lost", "perplexity lost")
    methods = dict.fromkeys(row["method"] for row in rows)
    families = list(dict.fromkeys(method.partition(",")[0] for method in methods))
    points = [{**row, "lost": row["perplexity"] - untransformed_perplexity} for row in rows]
    for axis, (column, label) in zip(axes, losses, strict=True):
        for method in methods:
            own = [p for p in points if p["method"] == method]
            line = sorted((p["bits_per_element"], p[column]) for p in own)
            number = families.index(method.partition(",")[0]) % len(_MARKERS)
            axis.plot(
                *zip(*line, strict=True),
                color=f"C{number}",
                marker=_MARKERS[number],
                markerfacecolor="white" if own[0]["window"] else None,
                linestyle="--" if own[0]["window"] else "-",
                label=method,
            )
        axis.set(xlabel="bits per element, everything counted", ylabel=label)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_yscale("log")
    axes[1].set_yscale("symlog", linthresh=1)  # a loss may be below 0: perplexity alone misleads
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def plot_recall(places: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Recall in percent, depth by length: one heat map a model.

    Args:
        places: by title, rows of `by_place`.

    Raises:
        InputError: matplotlib is missing.
    """
    grids = {}
    for title, rows in places.items():
        lengths = sorted({row["length"] for row in rows})
        depths = sorted({row["depth"] for row in rows})
        found = {(row["depth"], row["length"]): row["accuracy"] for row in rows}
        grids[title] = (depths, lengths, [[found[depth, length] for length in lengths] for depth in depths])
    figure, axes = _figure(len(grids), (1 + 4 * len(grids), 3.6))
    for axis, (title, (depths, lengths, grid)) in zip(axes, grids.items(), strict=True):
        image = _heat(axis, grid, 0, 100, "{:.0f}", "RdYlGn")
        axis.set(title=title, xlabel="tokens of the prompt")
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=axes, label="recalled, %")
    figure.savefig(path, dpi=130)


def plot_outliers(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Key outliers, layer by head: one heat map a step of the recipe.

    Args:
        rows: of `key_outliers`, at least one.

    Raises:
        InputError: matplotlib is missing.
    """
    steps = list(rows[0]["steps"])
    heads = len(rows[0]["steps"][steps[0]])
    top = max(max(ratios) for row in rows for ratios in row["steps"].values())
    figure, axes = _figure(len(steps), (1 + max(2.4, 0.62 * heads) * len(steps), 1.4 + 0.42 * len(rows)))
    for axis, step in zip(axes, steps, strict=True):
        image = _heat(axis, [row["steps"][step] for row in rows], 1, top, "{:.1f}", "YlOrRd")
        axis.set(title=step, xlabel="KV head")
        axis.set_xticks(range(heads))
        axis.set_yticks(range(len(rows)), [str(row["layer"]) for row in rows])
    axes[0].set_ylabel("layer")
    figure.suptitle(title)
    figure.colorbar(image, ax=axes, label="largest channel RMS / median")
    figure.savefig(path, dpi=130)


def _heat(
    axis: Any, grid: Sequence[Sequence[float]], least: float, most: float, form: str, colours: str
) -> Any:
    """Draw numbers as an image, and write them on it where they fit."""
    image = axis.imshow(grid, vmin=least, vmax=most, cmap=colours, aspect="auto")
    if len(grid) * len(grid[0]) <= 256:
        for y, row in enumerate(grid):
            for x, number in enumerate(row):
                red, green, blue, _ = image.cmap(image.norm(number))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.45 else "white"
                axis.text(x, y, form.format(number), ha="center", va="center", fontsize=8, color=ink)
    return image


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of that many axes side by side, which needs no display and leaves pyplot's state alone.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "Figures need matplotlib, which is not installed; pip install 'rotatekv-fx[bench]'."
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
