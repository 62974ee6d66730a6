"""Draws what `benchmarks.decode` measured: time against context, and the factor against batch.

    python -m benchmarks.speed_plot --results benchmarks/results

It reads decode_centered.json and writes speed.png, on any machine with the extra `bench`.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer
from matplotlib.figure import Figure

OURS, THEIRS, OTHER = "C0", "C3", "C7"


def main(results: Path = Path("benchmarks/results")) -> None:
    """Draw speed.png."""
    if not (results / "decode_centered.json").is_file():
        raise SystemExit(f"{results} has no decode_centered.json; python -m benchmarks.decode writes it.")
    report = json.loads((results / "decode_centered.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in report["rows"] if row["sweep"] == "context"]
    contexts = [row["context"] for row in rows]
    best = [min(row["sdpa_microseconds"].values()) for row in rows]
    ours = [row["microseconds"] for row in rows]
    left.plot(contexts, best, color=THEIRS, marker="s", label="16 bit, best SDPA backend")
    if all("flashinfer_microseconds" in row for row in rows):
        times = [row["flashinfer_microseconds"] for row in rows]
        left.plot(contexts, times, color=OTHER, linestyle=":", label="16 bit, FlashInfer")
    left.plot(contexts, ours, color=OURS, marker="o", label="2 bits, everything included")
    for context, time, row in zip(contexts, ours, rows, strict=True):
        left.annotate(
            f"{row['speedup']:.2f}x", (context, time), (0, -14), textcoords="offset points",
            ha="center", fontsize=8,
        )  # fmt: skip
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_ylim(bottom=min(ours) / 1.6)
    left.set_xticks(contexts, [f"{c // 1024}k" for c in contexts])
    left.set(xlabel="tokens, one sequence", ylabel="microseconds a layer and token")
    for length, marker, line in (("8k", "o", "-"), ("32k", "^", "--")):
        rows = [row for row in report["rows"] if row["sweep"] == f"batch {length}"]
        right.plot(
            [row["batch"] for row in rows], [row["speedup"] for row in rows], color=OURS, marker=marker,
            linestyle=line, label=f"{length} tokens a sequence",
        )  # fmt: skip
    right.axhline(1.0, color=THEIRS, linewidth=1)
    right.set_xscale("log", base=2)
    batches = [1 << i for i in range(8)]
    right.set_xticks(batches, [str(b) for b in batches])
    right.set(xlabel="sequences", ylabel="times as fast as the best SDPA backend", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.suptitle(f"Attention of one new token, 32 query and 8 KV heads of 128, {report['gpu']}")
    figure.savefig(results / "speed.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
