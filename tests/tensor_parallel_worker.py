"""One of two processes that hold half the heads each; `test_tensor_parallel.py` starts them under torchrun.

    torchrun --nproc-per-node=2 tests/tensor_parallel_worker.py FOLDER

FOLDER holds models, each with its calibration, another model's, and itself transformed, all made in one
process. Writes found.RANK: what this process found on each, compared with the whole model.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import transformers
import zoo
from transformers import AutoModelForCausalLM

import rotatekv_fx as rk
from benchmarks.multi_gpu import split_by_heads
from rotatekv_fx.calibration import PER_HEAD, model_fingerprint
from rotatekv_fx.errors import CalibrationError

# The mean's few channels are chosen for all heads together; groups stay within a head.
CENTERED = {"mean_channels": 8, "group_size": 32, "window": 4, "slack": 2, "sinks": 2}
CONFIGS = {
    "none": rk.RotateKVConfig(recipe="none"),
    "centered, 8 bits": rk.RotateKVConfig(key_bits=8, value_bits=8, **CENTERED),
    "centered, 2 bits": rk.RotateKVConfig(**CENTERED),
    "compensated, 2 bits": rk.RotateKVConfig(recipe="compensated", **CENTERED),
}
PROMPT = torch.randperm(zoo.VOCABULARY - 3, generator=torch.Generator().manual_seed(0))[:56].view(2, 28) + 3


def numbers(model):
    """Logits, and a few tokens that the model writes."""
    with torch.no_grad():
        logits = model(PROMPT).logits
    return logits, model.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()


def refusal(model, calibration):
    try:
        rk.transform(model, CONFIGS["centered, 2 bits"], calibration)
    except CalibrationError as error:
        return str(error)
    return None


def compared(folder):
    """What this process's part of a model gives, beside the whole model."""
    part = split_by_heads(folder).eval()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given = rk.Calibration.load(folder / "calibration.safetensors")
    made = zoo.calibrated(part)
    pairs = [(made.layers[0], given.layers[0], field.name) for field in dataclasses.fields(given.layers[0])]
    sums = {
        n: zoo.relative(getattr(a, n).double(), getattr(b, n).double())
        for a, b, n in pairs
        if n != "rope_error"  # of rounding itself
    }
    found = {
        "fingerprint": model_fingerprint(part),
        "whole_fingerprint": model_fingerprint(whole),
        "statistics": max(sums.values()),
        "heads": {name: len(getattr(made.layers[0], name)) for name in PER_HEAD},
        "own_heads": rk.api.inspect_model(part).sites[0].kv_heads,
        "logits": {},
        "tokens_equal": {},
    }
    for name, config in CONFIGS.items():
        for model in (part, whole):
            rk.transform(model, config, None if config.recipe == "none" else given)
        (logits, tokens), (expected, expected_tokens) = numbers(part), numbers(whole)
        found["logits"][name] = zoo.relative(logits, expected)
        found["tokens_equal"][name] = tokens == expected_tokens
        for model in (part, whole):
            rk.restore(model)
    again = split_by_heads(folder / "transformed").eval()
    rk.transform(whole, CONFIGS["centered, 2 bits"], given)
    found["logits"]["saved transformed"] = zoo.relative(numbers(again)[0], numbers(whole)[0])
    half = {i: layer.of_heads(slice(0, 1)) for i, layer in given.layers.items()}
    found["refused"] = {
        "another model": refusal(part, rk.Calibration.load(folder / "other.safetensors")),
        "half the heads": refusal(part, dataclasses.replace(given, layers=half)),
    }
    return found


def main(folder):
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {one.name: compared(one) for one in sorted(p for p in folder.iterdir() if p.is_dir())}
    (folder / f"found.{os.environ['LOCAL_RANK']}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
