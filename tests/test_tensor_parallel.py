"""Two processes with half the heads each: one device's calibration, and its numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zoo
from tensor_parallel_worker import CONFIGS
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "tensor_parallel_worker.py"
# Keys, values and their heads are split in llama; olmo2's plan gathers them again, and splits o_proj alone.
MODELS = {"llama": 2, "olmo2": 4}  # and the KV heads of each process
HEADS = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found, by model."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        for seed, file in ((1, "other"), (0, "calibration")):  # the model that stays is the one of seed 0
            model = zoo.build(name, layers=1, seed=seed, num_key_value_heads=HEADS)
            model.save_pretrained(folder / name)
            calibration = zoo.calibrated(model)
            calibration.save(folder / name / f"{file}.safetensors")
        rk.transform(model, CONFIGS["centered, 2 bits"], calibration).save_pretrained(
            folder / name / "transformed"
        )
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER), str(folder)]
    done = subprocess.run(
        [sys.executable, *command], env=environment, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    processes = [json.loads((folder / f"found.{rank}").read_text()) for rank in range(2)]
    return {name: [one[name] for one in processes] for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_fingerprint_is_the_whole_models(found, name):
    for one in found[name]:
        assert one["fingerprint"] == one["whole_fingerprint"]


@pytest.mark.parametrize("name", MODELS)
def test_processes_calibrate_the_whole_model(found, name):
    for one in found[name]:
        assert one["own_heads"] == MODELS[name]
        assert set(one["heads"].values()) == {HEADS}
        assert one["statistics"] < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_one_devices_calibration_gives_its_numbers(found, name):
    for one in found[name]:
        assert all(error < 1e-4 for error in one["logits"].values()), one["logits"]
        assert all(one["tokens_equal"].values()), one["tokens_equal"]


@pytest.mark.parametrize("name", MODELS)
def test_other_calibrations_are_refused(found, name):
    spread = "channels in 2 processes, " if MODELS[name] < HEADS else "channels, "
    for one in found[name]:
        assert "belongs to another model" in one["refused"]["another model"]
        expected = f"layer 0 has [{HEADS}, 32] key heads and {spread}its calibration [1, 32]"
        assert expected in one["refused"]["half the heads"]
