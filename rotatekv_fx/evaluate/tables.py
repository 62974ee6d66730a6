"""Figures as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table


def comparison_table(figures: Mapping[str, Any]) -> Table:
    """What `evaluate` returns, one line a recipe."""
    rows = figures["rows"]
    table = Table(
        title=f"Against the untransformed model (perplexity {figures['untransformed_perplexity']:.2f}), "
        f"{rows[0]['tokens']:,} predictions",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("recipe")
    for name in (
        "bits K/V",
        "window",
        "bits per element",
        "KL, nats",
        "same argmax",
        "perplexity",
        "seconds",
    ):
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for row in rows:
        table.add_row(
            row["recipe"],
            f"{row['key_bits']}/{row['value_bits']}",
            str(row["window"]),
            f"{row['bits_per_element']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['agreement']:.1%}",
            f"{row['perplexity']:.2f}",
            f"{row['seconds']:.1f}",
        )
    return table


def tasks_table(figures: Mapping[str, Any]) -> Table:
    """What `compare_on_tasks` returns, one line a task and model."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("task", "recipe"):
        table.add_column(name)
    for name in ("right", "accuracy", "difference", "95% interval"):
        table.add_column(name, justify="right")
    for task, rows in figures.items():
        for row in rows:
            low, high = row["difference"]["interval"]
            table.add_row(
                task.replace("_", " "),
                row["recipe"],
                f"{row['right']}/{row['cases']}",
                f"{row['accuracy']:.1f}%",
                f"{row['difference']['points']:+.1f}",
                f"{low:+.1f} to {high:+.1f}",
            )
    return table


def side_by_side(continuations: Mapping[str, Mapping[str, Any]]) -> Table:
    """Continuations (of `continue_greedily`) in columns, by title, each over its cache's bytes."""
    table = Table(show_lines=True)
    for title in continuations:
        table.add_column(title, ratio=1)
    table.add_row(*(escape(figures["continuation"].strip()) for figures in continuations.values()))
    table.add_row(
        *(
            f"cache of {figures['cache_tokens']} tokens: {figures['cache_bytes']:,} bytes, "
            f"{figures['bits_per_element']:.2f} bits an element"
            for figures in continuations.values()
        )
    )
    return table
