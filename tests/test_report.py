"""The report: plain data that says what was matched and inserted, as JSON, as a table, and as graphs in a
folder.
"""

import dataclasses
import io
import json

import pytest
import torch
import zoo
from rich.console import Console
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx import Report, RotateKVConfig
from rotatekv_fx.report import SiteReport
from rotatekv_fx.sites import Rejection

STEPS = (
    "before",
    "insert_rotation",
    "insert_quantization",
    "preserve_sinks",
    "lower_attention",
    "fuse_attention",
    "cleanup",
)


def text_of(table, width=160):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.fixture(scope="module")
def packed():
    return zoo.packed("llama", sinks=6)


def test_what_it_says_about_a_site(packed):
    found = rk.report(packed)
    assert found.model == "LlamaForCausalLM"
    assert found.rejections == ()
    assert [site.name for site in found.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    site = found.sites[1]
    assert (site.layer_index, site.kv_heads, site.query_heads, site.head_dim, site.value_dim) == (
        1,
        2,
        4,
        32,
        32,
    )
    assert site.merged == ("k: k_proj.weight", "v: v_proj.weight", "o: o_proj.weight")
    assert site.positions == "ids"
    assert "mul" in site.rope
    assert tuple(site.passes) == STEPS[1:]
    assert all(isinstance(n, int) for counts in site.passes.values() for n in counts.values())
    assert "append" in site.lowered


def test_operations_of_rope_are_names():
    (site,) = rk.inspect_model(zoo.shared("gpt_oss", 1)).sites
    assert all(operation.isidentifier() for operation in site.rope)


def test_settings_are_those_given(packed):
    settings = rk.report(packed).config
    assert set(settings) == {field.name for field in dataclasses.fields(RotateKVConfig)}
    assert (settings["recipe"], settings["sinks"], settings["key_bits"]) == ("paper", 6, 2)


def test_as_dict_survives_json(packed):
    data = rk.report(packed).as_dict()
    back = json.loads(json.dumps(data))
    assert back["model"] == "LlamaForCausalLM"
    assert len(back["sites"]) == 2
    assert back["sites"][0]["passes"]["insert_rotation"] == {"merged": 3, "online": 0}
    assert back["config"]["recipe"] == "paper"
    assert back["rejections"] == []
    assert back["originals_nbytes"] > 0


def test_as_dict_with_a_path_and_settings_of_layers(tmp_path):
    model = zoo.transformed(zoo.shared("llama", 1), "none", dump_dir=tmp_path, layers={0: {"key_bits": 4}})
    back = json.loads(json.dumps(rk.report(model).as_dict()))
    assert back["config"]["dump_dir"] == str(tmp_path)
    assert back["config"]["layers"] == {"0": {"key_bits": 4}}


def test_a_report_is_frozen(packed):
    with pytest.raises(dataclasses.FrozenInstanceError):
        rk.report(packed).model = "other"


# Tables


def test_table_of_a_transformed_model(packed):
    shown = text_of(rk.report(packed).table())
    assert "LlamaForCausalLM: 2 matched, 0 rejected, recipe paper" in shown
    assert "0-1" in shown  # both layers look alike
    assert "4/2 x 32" in shown
    assert "3 merged" in shown
    assert "attend" in shown


def test_table_before_a_transform():
    shown = text_of(rk.inspect_model(zoo.shared("llama", 1)).table())
    assert "LlamaForCausalLM: 1 matched, 0 rejected" in shown
    assert "recipe" not in shown
    assert "mergeable into k, v, o" in shown


def test_layers_that_differ_have_rows_of_their_own():
    report = rk.report(zoo.packed("smollm3", sinks=0))
    assert report.table().row_count == 2
    shown = text_of(report.table())
    assert "none" in shown  # no RoPE


def site(index, **changes):
    one = SiteReport(f"layers.{index}", index, 2, 4, 32, 32, ("mul",), "ids", "attend", ("k: w",))
    return dataclasses.replace(one, **changes)


def test_runs_of_layers_that_look_alike():
    sites = (site(0), site(1), site(2, positions="rows"), site(3), site(4), site(5))
    table = Report("Model", sites, ()).table()
    shown = text_of(table)
    assert table.row_count == 3
    assert [span in shown for span in ("0-1", "3-5")] == [True, True]


def test_rejections_are_in_the_table_and_in_the_data():
    rejections = (
        Rejection("layers.1", 1, "a latent key", "cat_3"),
        Rejection("layers.2", 2, "export failed"),
    )
    report = Report("Model", (site(0),), rejections)
    shown = text_of(report.table(), 200)
    assert "1 matched, 2 rejected" in shown
    assert "rejected: a latent key (at cat_3)" in shown
    assert "rejected: export failed" in shown
    assert json.loads(json.dumps(report.as_dict()))["rejections"][0] == {
        "name": "layers.1",
        "layer_index": 1,
        "reason": "a latent key",
        "node": "cat_3",
    }


def test_a_narrow_terminal(packed):
    assert "paper" in text_of(rk.report(packed).table(), 60)


# Graphs in a folder


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs") / "made" / "on demand"
    calibration = zoo.shared_calibration("llama")
    zoo.transformed(zoo.shared("llama"), "paper", calibration, sinks=6, dump_dir=folder)
    return folder


def test_a_file_for_each_layer_and_step(dumped):
    files = sorted(str(path.relative_to(dumped)) for path in dumped.rglob("*") if path.is_file())
    expected = [f"layer_{i:02d}/{n:02d}_{step}.txt" for i in range(2) for n, step in enumerate(STEPS)]
    assert files == expected


def test_graphs_are_readable(dumped):
    texts = [path.read_text() for path in sorted((dumped / "layer_00").iterdir())]
    assert all(text.count("def forward(self") == 1 for text in texts)
    assert all(compile(text, "graph", "exec") for text in texts)
    before, rotation, quantization, sinks, lowered, *_ = texts
    assert "rotatekv_capture.kv_update" in before
    assert "rotatekv.rotate" in rotation
    assert "rotatekv.rotate" not in before
    assert quantization.count("rotatekv.quantize") == 2
    assert "rotatekv.select_sinks" in sinks
    assert "rotatekv.attend" in lowered
    assert "rotatekv_capture" not in lowered
    assert len(set(texts)) == len(texts)


def test_dumping_changes_nothing(dumped, packed, tmp_path):
    ids, mask = zoo.prompt()
    one = zoo.transformed(zoo.shared("llama", 1), "none", dump_dir=str(tmp_path))
    with torch.no_grad():
        expected = zoo.packed("llama", "none", layers=1)(ids, attention_mask=mask).logits
        assert torch.equal(one(ids, attention_mask=mask).logits, expected)
    assert (tmp_path / "layer_00" / "00_before.txt").is_file()


def test_a_rejected_layer_has_no_graphs(tmp_path):
    class Odd(LlamaAttention):
        def forward(self, hidden_states, position_embeddings, **kwargs):
            turned = hidden_states + position_embeddings[0].mean(-1, keepdim=True)
            return super().forward(turned, position_embeddings=position_embeddings, **kwargs)

    model = zoo.build("llama")
    model.model.layers[0].self_attn.__class__ = Odd
    rk.transform(model, RotateKVConfig(recipe="none", allow_partial=True, dump_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["layer_01"]
    assert text_of(rk.report(model).table(), 200).count("rejected: the value depends on") == 1
