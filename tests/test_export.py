"""ONNX export: the graph gives the logits of torch's packed path, and runs without torch."""

import copy
import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import zoo
from transformers import AutoTokenizer, DynamicCache
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from benchmarks import onnx_quality
from rotatekv_fx import cli
from rotatekv_fx.errors import ConfigError, InputError, RotateKVError, StateError
from rotatekv_fx.export import codes, columns, fold, generation
from rotatekv_fx.export import onnx as exporter
from rotatekv_fx.export.generation import Decoder
from rotatekv_fx.export.schema import Metadata
from rotatekv_fx.kernels.quantize.reference import quantize, unpack

WINDOW = {"window": 8, "sinks": 4}
TOLERANCE = 1e-4  # of logits, in fp32


def exported(folder, model, **settings):
    """A decoder of a fresh export."""
    rk.export_onnx(model, folder, **settings)
    return Decoder(folder)


@pytest.fixture(scope="module")
def centered(tmp_path_factory):
    """A transformed model and its graph."""
    model = zoo.packed("llama", "centered", 1, **WINDOW)
    return model, exported(tmp_path_factory.mktemp("onnx") / "centered", model)


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The same with keys stored before RoPE, no window, and keys and values of different widths."""
    model = zoo.packed("qwen3", "paper", 1, sinks=4, key_bits=3, value_bits=4)
    return model, exported(tmp_path_factory.mktemp("onnx") / "paper", model)


def logits_of_both(model, decoder, steps=(14, 9, *[1] * 8), padding=(0, 4, 9)):
    """Logits [B, S, V] of the same tokens, put in step by step, from torch's packed path and the graph."""
    length = sum(steps)
    ids, mask = zoo.prompt(len(padding), length, padding)
    positions = zoo.positions_of(mask)
    packed, cache = DynamicCache(config=model.config), decoder.cache(len(padding), length)
    expected, found, start = [], [], 0
    for count in steps:
        part, start = slice(start, start + count), start + count
        with torch.no_grad():
            expected.append(
                model(
                    ids[:, part],
                    attention_mask=mask[:, :start],
                    position_ids=positions[:, part],
                    past_key_values=packed,
                ).logits
            )
        found.append(cache.step(ids[:, part].numpy(), mask[:, part].numpy(), range(count)))
    real = mask.bool()[..., None]
    return torch.cat(expected, 1) * real, torch.from_numpy(np.concatenate(found, 1)) * real


@pytest.mark.parametrize("which", ["centered", "paper"])
def test_logits_are_those_of_the_packed_path(which, request):
    model, decoder = request.getfixturevalue(which)
    expected, found = logits_of_both(model, decoder)
    assert float((found - expected).abs().max()) < TOLERANCE
    untransformed = zoo.shared("llama" if which == "centered" else "qwen3", 1)
    ids, mask = zoo.prompt(3, expected.shape[1], (0, 4, 9))
    with torch.no_grad():
        exact = untransformed(ids, attention_mask=mask, position_ids=zoo.positions_of(mask)).logits
    assert float((exact * mask[..., None] - expected).abs().max()) > 100 * TOLERANCE  # codes matter here


def test_a_prompt_in_pieces_gives_the_same_logits(centered):
    _, decoder = centered
    ids = zoo.prompt(1, 30, (0,))[0].numpy()
    whole = decoder.cache(1, 30).step(ids)
    cache = decoder.cache(1, 30)
    for start in range(0, 30, 6):
        pieces = cache.step(ids[:, start : start + 6])
    np.testing.assert_allclose(pieces, whole, atol=TOLERANCE)


def test_greedy_tokens_are_those_of_generate(centered):
    model, decoder = centered
    ids, mask = zoo.prompt()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    prompts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    found = np.stack(list(decoder.generate(prompts, 24, eos=[])), 1)
    assert np.array_equal(found, expected[:, ids.shape[1] :].numpy())
    pieces = np.stack(list(decoder.generate(prompts, 24, eos=[], chunk=5)), 1)
    assert np.array_equal(pieces, found)


def test_sampling_depends_on_its_seed(centered):
    _, decoder = centered
    settings = {"temperature": 1.0, "top_p": 0.95, "eos": []}
    one, again, other = (
        np.stack(list(decoder.generate([[5, 6, 7]], 12, seed=seed, **settings)), 1) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_sequence_that_has_ended_is_padded(centered):
    _, decoder = centered
    prompts = [[5, 6, 7], [9, 8]]
    free = np.stack(list(decoder.generate(prompts, 8, eos=[])), 1)
    found = np.stack(list(decoder.generate(prompts, 8, eos=[int(free[0, 2])])), 1)
    assert np.array_equal(found[0, :3], free[0, :3])
    assert (found[0, 3:] == decoder.metadata.pad).all()


def test_the_cache_holds_few_bytes(centered):
    model, decoder = centered
    cache = decoder.cache(1, 64)
    cache.step(zoo.prompt(1, 64, (0,))[0].numpy())
    site = rk.report(model).sites[0]
    channels = site.kv_heads * site.head_dim
    coded = 56 * 2 * (channels // 4 + 4 * channels // min(128, channels))
    exact = (WINDOW["window"] + WINDOW["sinks"]) * 2 * 2 * channels
    assert cache.nbytes == coded + exact + 8 * WINDOW["sinks"] + 8 * 64


def test_the_graph_is_standard_onnx(centered, paper):
    for model, decoder in (centered, paper):
        path = decoder.folder / "model.onnx"
        graph = onnx.load(path)
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 23)]
        assert not graph.functions
        onnx.checker.check_model(path, full_check=True)
        names = {i.name for i in graph.graph.input}
        assert {"input_ids", "attention_mask", "logits_at", "prompt", "past.0.key_codes"} <= names
        contents = path.read_bytes()
        assert b".py" not in contents  # no stack traces
        assert b"/home" not in contents
        config = rk.report(model).config
        found = decoder.metadata
        assert (found.recipe, found.key_bits, found.value_bits) == (
            config["recipe"],
            config["key_bits"],
            config["value_bits"],
        )
        assert found.opset == 23
        assert {"rotatekv-fx", "torch", "transformers", "onnx"} <= found.versions.keys()


def test_the_model_is_left_as_it_was(centered):
    model, _ = centered
    found, expected = (
        m(zoo.prompt()[0]).logits
        for m in (
            model,
            zoo.transformed(zoo.shared("llama", 1), "centered", zoo.shared_calibration("llama", 1), **WINDOW),
        )
    )
    assert torch.equal(found, expected)


def test_generation_needs_no_torch(centered):
    _, decoder = centered
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from rotatekv_fx.export.generation import Decoder\n"
        f"tokens = list(Decoder({str(decoder.folder)!r}).generate([[5, 6, 7]], 4, eos=[]))\n"
        "print([int(t[0]) for t in tokens])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here = [int(t[0]) for t in decoder.generate([[5, 6, 7]], 4, eos=[])]
    assert json.loads(done.stdout) == here


def test_the_command_exports(tiny_model_folder, tmp_path, capsys):
    folder = tmp_path / "made" / "here"
    arguments = ("export-onnx", tiny_model_folder, folder, "--recipe", "none")
    assert cli.main([str(a) for a in (*arguments, "--json", tmp_path / "figures.json")]) == 0
    assert "its logits are the model's" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"model.onnx", "tokenizer.json", "config.json"} <= figures["files"].keys()
    (text,) = Decoder(folder).continue_texts(["The river rises"], 4)
    assert isinstance(text, str)
    assert cli.main([str(a) for a in arguments]) == 2  # the folder is not empty any more
    assert "not an empty folder" in capsys.readouterr().err


# What is refused


def test_an_untransformed_model_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"is not transformed; call rotatekv_fx\.transform"):
        rk.export_onnx(zoo.shared("llama", 1), tmp_path / "folder")


@pytest.mark.parametrize("opset", [17, 99, "23"])
def test_opsets_are_checked(opset, tmp_path):
    with pytest.raises(ConfigError, match=r"opset is .*; use one from 18"):
        rk.export_onnx(zoo.packed("llama", "none", 1), tmp_path / "folder", opset=opset)


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        rk.export_onnx(zoo.packed("llama", "none", 1), tmp_path)
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        rk.export_onnx(zoo.packed("llama", "none", 1), tmp_path / "file")


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder that can be written"):
        rk.export_onnx(zoo.packed("llama", "none", 1), tmp_path / "file" / "below")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "_MISSING", ImportError("No module named 'onnx'"))
    with pytest.raises(ConfigError, match=r"pip install 'rotatekv-fx\[onnx\]'"):
        rk.export_onnx(zoo.packed("llama", "none", 1), tmp_path / "folder")


def test_other_dtypes_are_refused(tmp_path):
    model = zoo.transformed(zoo.build("llama", 1, torch.bfloat16), "none")
    with pytest.raises(StateError, match=r"parameters are torch\.bfloat16 on cpu; .*model\.float\(\)"):
        rk.export_onnx(model, tmp_path / "folder")


def test_rows_of_positions_are_refused(tmp_path):
    with pytest.raises(StateError, match="layer 0 stores rows of its rotary embedding"):
        rk.export_onnx(zoo.packed("llama_dynamic", "paper", 1), tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    def differs(model, folder):
        raise RotateKVError("logits differ")

    monkeypatch.setattr(exporter, "_check_graph", differs)
    monkeypatch.setattr(
        exporter, "_trace", lambda *_: onnx.helper.make_model(onnx.helper.make_graph([], "", [], []))
    )
    monkeypatch.setattr(exporter, "_save", lambda graph, path: path.touch())
    with pytest.raises(RotateKVError, match="logits differ"):
        rk.export_onnx(zoo.packed("llama", "none", 1), tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_folders_without_a_graph_are_refused(tmp_path, centered):
    with pytest.raises(InputError, match=r"there is no .*model\.onnx"):
        Decoder(tmp_path)
    with pytest.raises(ConfigError, match="onnxruntime has no NoSuchProvider"):
        Decoder(centered[1].folder, ["NoSuchProvider"])
    graph = onnx.load(centered[1].folder / "model.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="was not exported by rotatekv_fx"):
        Decoder(tmp_path)


def test_too_many_tokens_are_refused(centered):
    cache = centered[1].cache(1, 4)
    with pytest.raises(StateError, match=r"tokens \[1, 5\] do not fit a cache of 1 sequences and 4"):
        cache.step(np.full((1, 5), 3))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prompts": []}, InputError, "no prompts"),
        ({"prompts": [[3], []]}, InputError, "prompt 1 is empty"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0"),
        ({"temperature": -1.0}, ConfigError, "temperature is -1.0"),
        ({"top_p": 0.0}, ConfigError, "top_p is 0.0"),
    ],
)
def test_settings_of_generation_are_checked(centered, settings, error, message):
    settings = {"prompts": [[3, 4]], "max_new_tokens": 2, **settings}
    with pytest.raises(error, match=message):
        next(centered[1].generate(**settings))


def test_another_format_is_refused():
    made = Metadata("none", 2, 2, 0, 0, {}, [], 0, 23, {})
    assert Metadata.from_json(made.to_json()) == made
    newer = dataclasses.replace(made, format=made.format + 1)
    for text, named in ((newer.to_json(), made.format + 1), ("{}", None)):
        with pytest.raises(InputError, match=f"has format {named}, this package reads {made.format}"):
            Metadata.from_json(text)


# Parts


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("channels", "group"), [(128, 128), (64, 32), (20, 10)])
def test_products_with_codes(bits, channels, group):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 300, channels, generator=generator)
    packed, _, _ = quantize(x, bits, group, 0.9, "midpoint")
    levels = unpack(packed, bits, group).double()
    packed = packed.transpose(2, 3)
    assert torch.equal(codes.levels(packed, bits, group), levels.float())
    weight = torch.randn(2, channels // group, 5, group, generator=generator)
    expected = weight.double() @ levels.transpose(2, 3)
    assert zoo.relative(codes.key_products(weight, packed, bits), expected) < 1e-6
    chances = torch.rand(2, channels // group, 5, 300, generator=generator)
    found = codes.value_products(chances, packed, bits, group)
    assert zoo.relative(found, chances.double() @ levels) < 1e-6  # as of digits one by one


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "cohere"])
def test_the_mean_follows_from_features(name):
    model = zoo.packed(name, "centered", 1)
    runtime = next(m for m in model.modules() if type(m).__name__ == "AttentionRuntime")
    mean = fold.Mean(runtime.key_center, runtime.rope, runtime.positions)
    ids = torch.tensor([[0, 3, 500, 77]])
    rows = runtime.positions.decode((ids.int()[:, None, :, None],))
    center = runtime.key_center.float()[None, :, None].expand(-1, -1, 4, -1)
    expected = runtime.rope(center, *rows)
    features = mean.features(ids)
    assert features.shape[2] <= runtime.rope.dim + 1
    found = features[:, None] @ mean.spread
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "pieces"), [(1, [1]), (8, [4, 4]), (9, [4, 3, 2]), (11, [4, 4, 3])])
def test_prompts_are_cut_without_a_single_last_token(length, pieces):
    parts = generation.pieces(length, 4)
    assert [part.stop - part.start for part in parts] == pieces
    assert parts[0].start == 0
    assert parts[-1].stop == length


def test_columns_show_each_token_in_one_form():
    visible = columns.visible_tokens(None, torch.arange(6, 9), 9)
    queries, first = torch.arange(6, 9), torch.tensor([0])
    tokens = torch.tensor([[2, -1]])
    coded = columns.coded(visible, torch.arange(6), queries, 3)
    coded = columns.without_sinks(coded, tokens, first)
    exact = columns.exact(visible, torch.arange(3, 9), queries, 3)
    sinks = columns.sinks(visible, tokens, queries, 3)
    for row, query in enumerate(range(6, 9)):
        assert coded[0, 0, row].nonzero().flatten().tolist() == [n for n in range(query - 2) if n != 2]
        assert (exact[0, 0, row].nonzero().flatten() + 3).tolist() == [query - 2, query - 1, query]
        assert sinks[0, 0, row].tolist() == [True, False]


def test_the_quality_benchmark_sees_where_graph_and_torch_part(centered):
    model, decoder = centered
    ids = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    models, advanced = (model, onnx_quality.changed(model)), []
    greedy = onnx_quality.compare_tokens(models, decoder, ids[:, :16], 12, advanced.append)
    assert greedy == {"tokens": 12, "onnxruntime": [12, 12], "control": [12, 12]}
    rows = onnx_quality.compare_perplexity(models, decoder, list(ids.split(1)), advanced.append)
    torch_row, control, graph = rows[:3]
    assert torch_row["kl"] == 0.0
    assert 0.0 < abs(graph["kl"]) < 1e-6
    assert graph["perplexity"] == pytest.approx(torch_row["perplexity"], rel=1e-5)
    assert control["perplexity"] == pytest.approx(torch_row["perplexity"], rel=1e-5)
    assert advanced == [1] * 6
    one, other = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[1, 2, 9, 4], [5, 6, 7, 8]])
    assert onnx_quality.agreed(one, other) == [2, 4]


# Every architecture and recipe, other opsets and forms: long


CODE_TIPPED = pytest.mark.xfail(
    reason="a code tips over in the graph (0.15 at most, 5e-6 in the median), and not in torch's one trial",
    strict=False,
)
ARCHITECTURES = [
    pytest.param(name, recipe, marks=CODE_TIPPED if (name, recipe) == ("phi3", "paper") else ())
    for name in ("llama", "qwen3", "gpt_neox", "phi3", "gemma2")
    for recipe in ("centered", "paper")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), ARCHITECTURES)
def test_architectures(name, recipe, tmp_path):
    """With two layers, a number that falls on the other side of a rounding in the first changes the second:
    then differences are as large as those of torch with weights changed by 1e-7.
    """
    settings = {"sinks": 4} if recipe == "paper" else WINDOW
    model, steps = zoo.packed(name, recipe, 2, **settings), (20, 12, *[1] * 64)
    decoder = exported(tmp_path / "folder", model)
    expected, found = logits_of_both(model, decoder, steps)
    changed = copy.deepcopy(model)
    weight = changed.get_input_embeddings().weight.data
    weight.mul_(1 + 1e-7 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    other, _ = logits_of_both(changed, decoder, steps)
    shares = torch.tensor([0.5, 0.9, 1.0])
    of_graph, of_torch = ((x - expected).abs().amax(-1).flatten().quantile(shares) for x in (found, other))
    assert (of_graph < (5 * of_torch).clamp(min=TOLERANCE)).all(), (of_graph, of_torch)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 24])
def test_other_opsets(opset, tmp_path):
    model = zoo.packed("llama", "centered", 1, **WINDOW)
    decoder = exported(tmp_path / "folder", model, opset=opset)
    expected, found = logits_of_both(model, decoder)
    assert float((found - expected).abs().max()) < TOLERANCE
    assert onnx.load(tmp_path / "folder" / "model.onnx").opset_import[0].version == opset


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_other_widths(bits, tmp_path):
    model = zoo.packed("llama", "centered", 1, key_bits=bits, value_bits=bits, **WINDOW)
    expected, found = logits_of_both(model, exported(tmp_path / "folder", model))
    assert float((found - expected).abs().max()) < TOLERANCE


@pytest.mark.slow
def test_large_weights_go_to_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "EXTERNAL_FROM", 1)
    model = zoo.packed("llama", "none", 1)
    expected, found = logits_of_both(model, exported(tmp_path / "folder", model))
    assert float((found - expected).abs().max()) < TOLERANCE
    files = {f.name: f.stat().st_size for f in (tmp_path / "folder").iterdir()}
    assert files["model.onnx.data"] > files["model.onnx"]


# The reference model: a trained one, of six layers


@pytest.fixture(scope="module")
def reference(reference_model, repository, tmp_path_factory):
    """The transformed reference model, its graph, and ids of a text [N]."""
    tokenizer = AutoTokenizer.from_pretrained(repository / "benchmarks/reference_model")
    read = (repository / "benchmarks/data/calibration.txt").read_text(encoding="utf-8")[:40000]
    ids = tokenizer(read, return_tensors="pt").input_ids
    calibration = rk.calibrate(reference_model, ids[:, :6144].split(1024, 1), progress=zoo.quiet)
    model = zoo.transformed(reference_model, "centered", calibration, keep_originals=False)
    text = (repository / "benchmarks/data/wikitext-2-raw-test.txt").read_text(encoding="utf-8")[:40000]
    folder = tmp_path_factory.mktemp("reference") / "graph"
    return (
        model,
        exported(folder, model, tokenizer=tokenizer),
        tokenizer(text, return_tensors="pt").input_ids[0],
    )


@pytest.mark.slow
def test_greedy_tokens_of_the_reference_model(reference):
    model, decoder, ids = reference
    prompt = ids[None, :256]
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = [int(tokens[0]) for tokens in decoder.generate(prompt.tolist(), 200, eos=[], chunk=256)]
    assert found == expected[0, 256:].tolist()


def reference_logits(model, ids):
    with torch.no_grad():
        return model(ids, past_key_values=DynamicCache(config=model.config)).logits


@pytest.mark.slow
def test_differences_are_those_of_rounding(reference):
    """As large as those of torch itself, with weights changed by 1e-7."""
    model, decoder, ids = reference
    ids = ids[None, :256]
    expected = reference_logits(model, ids)
    found = torch.from_numpy(decoder.cache(1, 256).step(ids.numpy(), logits_at=range(256)))
    weight = model.get_input_embeddings().weight.data
    kept = weight.clone()
    weight.mul_(1 + 1e-7 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    changed = reference_logits(model, ids)
    weight.copy_(kept)
    own, other = ((x - expected).abs().amax(-1).median() for x in (changed, found))
    assert other < 5 * own
    assert float((found - expected)[:, :16].abs().max()) < 0.02


@pytest.mark.slow
def test_perplexity_of_the_reference_model(reference):
    model, decoder, ids = reference
    losses = torch.zeros(2, dtype=torch.float64)
    for window in ids[: 4 * 1023].split(1023):
        window = torch.cat([torch.tensor([1]), window])[None]
        cache = decoder.cache(1, 1024)
        pieces = [cache.step(p.numpy(), logits_at=range(p.shape[1])) for p in window.split(256, 1)]
        found = torch.from_numpy(np.concatenate(pieces, 1))
        for row, logits in enumerate((reference_logits(model, window), found)):
            losses[row] += torch.nn.functional.cross_entropy(logits[0, :-1].double(), window[0, 1:]) / 4
    torch_perplexity, graph_perplexity = losses.exp().tolist()
    assert graph_perplexity == pytest.approx(torch_perplexity, rel=2e-3)
