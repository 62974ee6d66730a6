"""What bounds decode attention: hardware counters of its kernels, read by Nsight Compute.

    python -m benchmarks.decode_profile --out benchmarks/results

Runs `benchmarks.decode`'s largest shapes under `ncu`, which must be on the PATH and be allowed to read the
counters, one call after a warm-up. Kernels run one by one there, and clocks are left as they are, so times
are not those of `benchmarks.decode`. Writes profile_RECIPE.json.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.decode import LARGE, RECIPES, report_of

KERNELS = ("step_kernel", "score_kernel", "decode_kernel", "finish_kernel")
PIPES = ("alu", "fma", "fp64", "lsu", "tensor", "uniform", "xu")
STALLS = (
    "barrier", "dispatch_stall", "gmma", "lg_throttle", "long_scoreboard", "math_pipe_throttle", "membar",
    "mio_throttle", "no_instruction", "not_selected", "selected", "short_scoreboard", "sleeping", "wait",
)  # fmt: skip
METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "read_gigabytes": "dram__bytes_read.sum",
    "written_gigabytes": "dram__bytes_write.sum",
    "memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_slots_percent": "smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "registers": "launch__registers_per_thread",
} | {f"pipe_{pipe}": f"sm__inst_executed_pipe_{pipe}.sum" for pipe in PIPES}
METRICS |= {
    f"stall_{reason}": f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in STALLS
}
UNITS = {"microseconds": 1e-3, "read_gigabytes": 1e-9, "written_gigabytes": 1e-9}  # of ns and bytes


def once(recipe: str, index: int) -> None:
    """Run a recipe's op on one of the largest shapes: once to compile, and once between profiler marks."""
    torch.manual_seed(0)
    arguments = RECIPES[recipe].arguments(LARGE[index])
    RECIPES[recipe].run(*arguments)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    RECIPES[recipe].run(*arguments)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def rows_of(output: str) -> list[dict[str, str]]:
    """Rows of the table that ncu prints among other lines: one a kernel, a column a metric."""
    table = [line for line in output.splitlines() if line.startswith('"')]
    return [row for row in csv.DictReader(io.StringIO("\n".join(table))) if row["ID"]]  # the first has units


def profiled(recipe: str, index: int) -> list[dict[str, object]]:
    """Counters of the kernels of one step."""
    command = [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
        "--print-units", "base", "--kernel-name", f"regex:{'|'.join(KERNELS)}",
        "--metrics", ",".join(METRICS.values()),
        sys.executable, "-c", f"from benchmarks.decode_profile import once; once({recipe!r}, {index})",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = rows_of(done.stdout)
    if done.returncode or not rows:
        raise SystemExit(f"ncu read no counters:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    found = []
    for row in rows:
        numbers = {
            name: float(row[metric].replace(",", "")) * UNITS.get(name, 1)
            for name, metric in METRICS.items()
            if row.get(metric)
        }
        found.append({"kernel": row["Kernel Name"].split("(")[0], **numbers})
    return found


def main(
    out: Annotated[Path, typer.Option(help="folder that receives profile_RECIPE.json")],
    recipe: Annotated[str, typer.Option(help=" or ".join(RECIPES))] = "centered",
) -> None:
    """Read the counters at a recipe's largest shapes and write profile_RECIPE.json after each."""
    report = report_of(recipe)
    rows = report["rows"] = []
    if shutil.which("ncu") is None:
        raise SystemExit("no ncu found: install Nsight Compute, which comes with the CUDA toolkit.")
    out.mkdir(parents=True, exist_ok=True)
    for index, shape in enumerate(LARGE):
        for kernel in profiled(recipe, index):
            rows.append({**dataclasses.asdict(shape), **kernel})
            stalls = {k: v for k, v in kernel.items() if k.startswith("stall_")}
            print(
                f"B{shape.batch} {shape.query_heads}/{shape.heads} {shape.context} {kernel['kernel']}: "
                f"{kernel['microseconds']:.1f} us, memory {kernel['memory_percent']:.0f}%, issue slots "
                f"{kernel['issue_slots_percent']:.0f}%, tensor {kernel['tensor_percent']:.0f}%; most stalls: "
                + ", ".join(sorted(stalls, key=stalls.get, reverse=True)[:3]),
                flush=True,
            )
        (out / f"profile_{recipe}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
