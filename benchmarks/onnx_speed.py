"""Size and speed on ONNX Runtime, CPU: the packed cache against the same model with an fp32 cache.

    python -m benchmarks.onnx_speed --packed FOLDER [--packed FOLDER] --json FILE

FOLDER is what `rotatekv export-onnx benchmarks/reference_model FOLDER` wrote. The fp32 graph is exported
here. Steps of all graphs take turns, each with one sequence. Two clocks: wall time, and CPU time of the
process, which other load on the machine disturbs less, and which is the wall time of an idle machine where
--threads is 1. The error column compares the next-token distribution with the fp32 graph's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.onnx_baseline import Baseline, export_baseline
from rotatekv_fx.export.generation import Decoder

HERE = Path(__file__).resolve().parent
CHUNK = 256


def main() -> None:
    """Run the benchmark and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packed", action="append", required=True, type=Path)
    parser.add_argument("--model", default=str(HERE / "reference_model"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    text = (HERE / "data" / "wikitext-2-raw-test.txt").read_text(encoding="utf-8")
    ids = np.array(AutoTokenizer.from_pretrained(arguments.model)(text)["input_ids"])[None]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_baseline(AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval(), path)
        decoders = [Decoder(packed, options=options) for packed in arguments.packed]
        baseline = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        sizes = [path.stat().st_size, *(_folder_size(packed) for packed in arguments.packed)]
        for context in arguments.contexts:
            rows += _measure(baseline, decoders, sizes, ids, context, arguments.steps)
    for row in rows:
        print(" | ".join(f"{key} {value}" for key, value in row.items()))
    figures = {
        "rows": rows,
        "threads": arguments.threads,
        "machine": platform.processor() or platform.machine(),
        "onnxruntime": onnxruntime.__version__,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _measure(
    baseline: onnxruntime.InferenceSession,
    decoders: list[Decoder],
    sizes: list[int],
    ids: np.ndarray,
    context: int,
    steps: int,
) -> list[dict[str, object]]:
    capacity = context + steps
    caches = [Baseline(baseline, capacity), *(decoder.cache(1, capacity) for decoder in decoders)]
    names = ["fp32", *(f"{d.metadata.recipe}, {d.metadata.key_bits} bits" for d in decoders)]
    prefill = [0.0] * len(caches)
    for start in range(0, context, CHUNK):
        for index, cache in enumerate(caches):
            begin = time.process_time()
            cache.step(ids[:, start : min(start + CHUNK, context)])
            prefill[index] += time.process_time() - begin
    held = [cache.nbytes for cache in caches]
    wall, cpu = ([[] for _ in caches] for _ in range(2))
    divergence: list[list[float]] = [[] for _ in caches]
    for place in range(context, context + steps):
        exact = None
        for index, cache in enumerate(caches):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            logits = cache.step(ids[:, place : place + 1])[0, -1]
            wall[index].append(time.perf_counter() - begin)
            cpu[index].append(time.process_time() - begin_cpu)
            exact = logits if exact is None else exact
            divergence[index].append(_divergence(exact, logits))
    return [
        {
            "cache": name,
            "context": context,
            "file_bytes": size,
            "cache_bytes": bytes_held,
            "decode_ms_wall": round(1e3 * statistics.median(w), 2),
            "decode_ms_cpu": round(1e3 * statistics.median(c), 2),
            "tokens_per_cpu_second": round(1 / statistics.median(c), 1),
            "prefill_tokens_per_cpu_second": round(context / p),
            "kl_from_fp32": round(statistics.mean(d), 4),
        }
        for name, size, bytes_held, w, c, p, d in zip(
            names, sizes, held, wall, cpu, prefill, divergence, strict=True
        )
    ]


def _divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """KL divergence of the next-token distributions, in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max()
        return x - np.log(np.exp(x).sum())

    p, q = log_softmax(exact), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum())


def _folder_size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("model.onnx*"))


if __name__ == "__main__":
    main()
