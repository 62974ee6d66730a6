"""Saving: a transformed model comes back transformed, or is refused; never with rotated weights unseen."""

import copy
import json
import logging

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx.errors import CalibrationError, ConfigError, StateError
from rotatekv_fx.evaluate import load_model
from rotatekv_fx.saving import CALIBRATION_FILE


@torch.no_grad()
def logits(model):
    ids, mask = zoo.prompt()
    return model(ids, attention_mask=mask, position_ids=zoo.positions_of(mask)).logits


def fresh(name="llama", **settings):
    return copy.deepcopy(zoo.packed(name, **settings))


@pytest.fixture
def saved(tmp_path):
    """A folder with a transformed model, and that model."""
    model = fresh(sinks=6)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("paper", {"sinks": 6, "layers": {1: {"key_bits": 4}}}),
        ("centered", {"window": 4, "slack": 2, "head_group": 1}),
        ("none", {}),
    ],
)
def test_a_saved_model_comes_back_transformed(tmp_path, recipe, settings):
    original = zoo.shared("llama")
    calibration = None if recipe == "none" else zoo.shared_calibration("llama")
    model = zoo.transformed(original, recipe, calibration, **settings)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected)
    assert "quantization_config" not in model.config.to_dict()
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert rk.report(loaded).config == rk.report(model).config
    assert not loaded.is_quantized
    restored = rk.restore(loaded)
    assert torch.equal(logits(restored), logits(original))
    assert "save_pretrained" not in vars(restored)


def test_the_folder_holds_the_original_weights(saved):
    folder, _ = saved
    original = zoo.shared("llama").state_dict()
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(original)
    assert all(torch.equal(found[name], original[name]) for name in original)
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_saved_again_and_in_shards(saved, tmp_path):
    folder, model = saved
    load(folder).save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_a_restored_model_is_saved_plain(tmp_path):
    rk.restore(fresh(sinks=6)).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(zoo.shared("llama")))
    with pytest.raises(StateError, match="not transformed"):
        rk.report(loaded)


def test_without_this_package_the_untransformed_model_is_loaded(saved, monkeypatch, caplog):
    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(table, "rotatekv")
    transformers = logging.getLogger("transformers")
    monkeypatch.setattr(transformers, "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):  # another test may have set it
        loaded = load(saved[0])
    assert torch.equal(logits(loaded), logits(zoo.shared("llama")))
    assert "Unknown quantization type, got rotatekv" in caplog.text
    again = rk.transform(loaded, rk.RotateKVConfig(recipe="paper", sinks=6), zoo.shared_calibration("llama"))
    assert torch.equal(logits(again), logits(saved[1]))


def test_a_copy_saves_itself(saved, tmp_path):
    copied = copy.deepcopy(saved[1])
    with torch.no_grad():
        saved[1].lm_head.weight.zero_()
    copied.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(load(tmp_path / "copy")), logits(copied))


def test_originals_that_were_not_kept(tmp_path):
    model = fresh(sinks=6, keep_originals=False)
    with pytest.raises(StateError, match="saved weights would be rotated"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_another_dtype(tmp_path):
    """It is not saved half converted, and restore gives it one dtype."""
    model = fresh(sinks=6).half()
    with pytest.raises(StateError, match="transformed in torch.float32 and is now torch.float16"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.equal(logits(rk.restore(model)), logits(copy.deepcopy(zoo.shared("llama")).half()))


def test_pushing_while_saving(saved):
    with pytest.raises(StateError, match=r"use model.push_to_hub\(\)"):
        saved[1].save_pretrained(saved[0], push_to_hub=True)


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def shorten(folder):
    path = folder / CALIBRATION_FILE
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (change_weights, CalibrationError, "the weights have changed since"),
        (shorten, CalibrationError, "damaged"),
        (lambda f: (f / CALIBRATION_FILE).unlink(), CalibrationError, f"holds no {CALIBRATION_FILE}"),
        (lambda f: edit(f, lambda e: e["settings"].update(key_bits=5)), ConfigError, "key_bits is 5"),
        (lambda f: edit(f, lambda e: e["settings"].update(colour=5)), ConfigError, "colour"),
        (lambda f: edit(f, lambda e: e.update(settings=None)), ConfigError, "cannot be used"),
    ],
)
def test_a_spoiled_folder_is_refused(saved, spoil, error, message):
    spoil(saved[0])
    with pytest.raises(error, match=message):
        load(saved[0])


# state_dict: what it holds are rotated weights, so a mark goes with them


def test_rotated_weights_do_not_fit_an_untransformed_model():
    rotated = fresh(sinks=6).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key.*rotatekv.merged.mark"):
        zoo.build("llama").load_state_dict(rotated)


def test_original_weights_do_not_fit_a_transformed_model():
    with pytest.raises(RuntimeError, match="Missing key.*rotatekv.merged.mark"):
        fresh(sinks=6).load_state_dict(zoo.shared("llama").state_dict())


def test_rotated_weights_fit_a_model_transformed_alike():
    model, other = fresh(sinks=6), fresh(sinks=6)
    expected = logits(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)


def test_rotated_weights_do_not_fit_a_model_transformed_otherwise():
    other = zoo.transformed(zoo.shared("llama"), "centered", zoo.shared_calibration("llama"))
    with pytest.raises(RuntimeError, match="transformed in another way"):
        other.load_state_dict(fresh(sinks=6).state_dict())


def test_recipe_none_needs_no_mark():
    assert list(zoo.packed("llama", "none").state_dict()) == list(zoo.shared("llama").state_dict())


def test_commands_load_the_untransformed_model(saved):
    assert torch.equal(logits(load_model(str(saved[0]))), logits(zoo.shared("llama")))
