"""Passes: their order, what they count, and that rewritten graphs compute what the packed model computes."""

import itertools
import re

import pytest
import torch
import zoo
from torch import fx
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx import recipes
from rotatekv_fx.cache import plan_positions
from rotatekv_fx.capture import capture, lookup
from rotatekv_fx.errors import PassOrderError
from rotatekv_fx.passes.base import Pass, Rewrite
from rotatekv_fx.passes.normalize import normalize
from rotatekv_fx.passes.pipeline import INSERT, LOWER, WITHOUT_CACHE, check_order, run_passes
from rotatekv_fx.recipes import LayerPlan, LayerShape
from rotatekv_fx.sites import ATTENTION, KV_UPDATE

CLOSE_IN_CODES = 0.02
rotatekv = torch.ops.rotatekv


def rewrite_of(site, calibration, **settings):
    shape = LayerShape(site.layer_index, site.kv_heads, site.query_heads, site.head_dim, site.value_dim)
    config = rk.RotateKVConfig(recipe="paper", **settings)
    plan = recipes.get("paper").plan(shape, config, calibration.layers[site.layer_index])
    return Rewrite(site, plan, plan_positions(site, {}).inputs)


def attention_of(arguments):
    """What the marker stands for, in plain torch."""
    static = arguments.static

    def attend(query, key, value, mask, extra):
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        scores = query @ key.mT * static["scaling"]
        if static.get("softcap"):
            scores = torch.tanh(scores / static["softcap"]) * static["softcap"]
        if mask.dtype is torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(scores.dtype).min)
        scores = scores + mask
        if arguments.extra_names == ("s_aux",):
            scores = torch.cat([scores, extra[0].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)[..., : key.shape[2]]
        return (weights @ value).transpose(1, 2)

    return attend


def functional(rewrite):
    """The rewritten graph as a GraphModule with the parameters and buffers that it reads."""
    module = rewrite.site.capture.module
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own |= {f"rotatekv.{name}": tensor for name, tensor in rewrite.site.capture.constants.items()}
    own |= {f"rotatekv.{name}": tensor for name, tensor in rewrite.buffers.items()}
    own |= {name: tensor.float() for name, tensor in rewrite.folded.items()}
    names = {str(n.target) for n in rewrite.graph.find_nodes(op="get_attr")}
    for node in rewrite.graph.find_nodes(op="call_function", target=ATTENTION):
        node.target = attention_of(rewrite.site.capture.arguments)
    return fx.GraphModule({name: own[name].detach() for name in names}, rewrite.graph)


class Seen:
    """What an attention module receives and gives in a forward without cache, and its block's input."""

    @torch.no_grad()
    def __init__(self, model, site):
        self.ids, self.mask = zoo.prompt(length=24)
        module, block = (model.get_submodule(n) for n in (site.capture.name, site.capture.block_name))
        handles = [
            module.register_forward_pre_hook(self.receives, with_kwargs=True),
            module.register_forward_hook(self.gives),
            block.register_forward_pre_hook(self.enters, with_kwargs=True),
        ]
        positions = zoo.positions_of(self.mask)
        model(self.ids, attention_mask=self.mask, position_ids=positions, use_cache=False)
        for handle in handles:
            handle.remove()

    def receives(self, _, args, kwargs):
        self.args, self.kwargs = args, kwargs

    def gives(self, _, args, output):
        self.output = output[0] if isinstance(output, tuple) else output

    def enters(self, _, args, kwargs):
        self.residual = args[0] if args else kwargs["hidden_states"]

    @torch.no_grad()
    def through(self, rewrite):
        """The graph's output for the same inputs."""
        inputs = [lookup(self.args, self.kwargs, i.path) for i in rewrite.site.capture.inputs]
        if rewrite.residual is not None:
            inputs.append(self.residual)
        output = functional(rewrite)(*inputs)
        return output[0] if isinstance(output, tuple | list) else output

    def real(self, output):
        return output[self.mask.bool()]


# Order


def test_the_pipeline_is_in_order():
    check_order(INSERT + LOWER)
    assert [p.name for p in INSERT + LOWER] == [
        "insert_rotation",
        "insert_quantization",
        "preserve_sinks",
        "lower_attention",
        "fuse_attention",
        "cleanup",
    ]


def test_the_pipeline_without_a_cache_is_in_order():
    check_order(INSERT + WITHOUT_CACHE)
    with pytest.raises(PassOrderError):
        check_order(WITHOUT_CACHE)


def test_an_order_is_refused_exactly_where_a_pass_comes_too_early():
    for passes in itertools.permutations(INSERT + LOWER):
        earlier = [{p.name for p in passes[:index]} for index in range(len(passes))]
        if all(set(one.after) <= before for one, before in zip(passes, earlier, strict=True)):
            check_order(passes)
        else:
            with pytest.raises(PassOrderError):
                check_order(passes)


def test_quantization_and_sinks_cannot_come_after_lowering():
    for late in INSERT[1:]:
        passes = (*(p for p in INSERT if p is not late), *LOWER, late)
        with pytest.raises(PassOrderError):
            check_order(passes)


def test_a_missing_pass_is_a_violation_that_names_both():
    with pytest.raises(PassOrderError, match="'insert_quantization' must run after 'insert_rotation'"):
        check_order(INSERT[1:])


def test_nothing_runs_in_the_wrong_order():
    ran = []
    one = Pass("one", ("two",), lambda rewrite: ran.append("one") or {})
    two = Pass("two", (), lambda rewrite: ran.append("two") or {})
    with pytest.raises(PassOrderError, match="'one' must run after 'two'"):
        run_passes(None, (one, two))
    assert ran == []


def test_counts_and_dumps_come_in_order():
    seen = []
    passes = (Pass("one", (), lambda r: {"a": 1}), Pass("two", ("one",), lambda r: {"b": 2}))
    rewrite = Rewrite(zoo.fresh_site("llama"), LayerPlan())
    counts = run_passes(rewrite, passes, dump=lambda name, graph: seen.append((name, graph)))
    assert counts == {"one": {"a": 1}, "two": {"b": 2}}
    assert seen == [(name, rewrite.graph) for name in ("before", "one", "two")]


# What each pass does to a graph


@pytest.mark.parametrize(
    ("name", "layers", "sinks", "rotations", "attend"),
    [
        ("llama", 2, 0, {"merged": 3, "online": 0}, 1),
        ("llama", 2, 6, {"merged": 3, "online": 0}, 1),
        ("qwen3", 1, 6, {"merged": 2, "online": 1}, 1),
        ("gptj", 1, 6, {"merged": 2 if zoo.INLINE else 3, "online": 0}, 0 if zoo.INLINE else 1),
    ],
)
def test_counts_of_a_transformed_model(name, layers, sinks, rotations, attend):
    found = rk.report(zoo.packed(name, layers=layers, sinks=sinks))
    assert len(found.sites) == layers
    for site in found.sites:
        assert site.passes["insert_rotation"] == rotations
        assert site.passes["insert_quantization"] == {"quantized": 2}
        assert site.passes["preserve_sinks"] == {"restored": 2 if sinks else 0}
        assert site.passes["lower_attention"] == {"attend": attend, "inline": 1 - attend}
        assert ("select_sinks" in site.lowered) == bool(sinks)
        assert ("rotate" in site.lowered) is True  # the way back, before RoPE


def test_recipe_none_inserts_nothing():
    for site in rk.report(zoo.packed("llama", "none")).sites:
        assert site.passes["insert_rotation"] == {"merged": 0, "online": 0}
        assert site.passes["insert_quantization"] == {"quantized": 0}
        assert site.passes["preserve_sinks"] == {"restored": 0}
        assert set(site.lowered) == {"attend", "store"}


@pytest.fixture(scope="module")
def steps():
    """Targets in the graph of a site, before the passes and after each."""
    found = {}
    rewrite = rewrite_of(zoo.fresh_site("llama"), zoo.shared_calibration("llama", 1))

    def keep(name, graph):
        found[name] = [str(n.target) for n in graph.nodes]

    run_passes(rewrite, dump=keep)
    return found


def count(steps, step, target):
    return sum(re.fullmatch(rf"rotatekv\.{target}\.default", found) is not None for found in steps[step])


def test_passes_insert_what_they_say(steps):
    table = {
        # step: rotate, quantize, dequantize, select_sinks, restore_sinks, attend
        "before": (0, 0, 0, 0, 0, 0),
        "insert_rotation": (1, 0, 0, 0, 0, 0),
        "insert_quantization": (1, 2, 2, 0, 0, 0),
        "preserve_sinks": (1, 2, 2, 1, 2, 0),
        "cleanup": (1, 0, 0, 0, 0, 1),
    }
    ops = ("rotate", "quantize", "dequantize", "select_sinks", "restore_sinks", "attend")
    for step, expected in table.items():
        assert tuple(count(steps, step, op) for op in ops) == expected, step


def test_markers_are_gone_in_the_end(steps):
    assert str(KV_UPDATE) in steps["before"]
    assert str(ATTENTION) in steps["before"]
    assert not any("rotatekv_capture" in target for target in steps["cleanup"])


def test_cleanup_drops_the_captured_rope(steps):
    assert len(steps["cleanup"]) < len(steps["lower_attention"])
    assert (
        steps["cleanup"].count("aten.cat.default") == 2
    )  # rotate half: of the query, and of the keys that are read
    assert steps["insert_rotation"].count("aten.cat.default") == 3


# Numbers


@pytest.mark.parametrize(
    ("name", "sinks", "close"),
    [
        ("llama", 0, 1e-5),
        ("llama", 6, 1e-3),  # the packed cache keeps sinks in 16 bit
        ("qwen3", 0, 1e-5),
        ("gpt_neox", 6, 1e-3),
        ("gemma2", 0, 1e-5),
        ("gpt_oss", 6, 1e-3),
        ("gptj", 6, 1e-3),
    ],
)
def test_functional_graph_equals_the_packed_model(name, sinks, close):
    """The INSERT passes alone give a graph that needs no cache; lowering it must not change a number."""
    model, calibration = zoo.shared(name, 1), zoo.shared_calibration(name, 1)
    packed = zoo.packed(name, layers=1, sinks=sinks)
    rewrite = rewrite_of(zoo.fresh_site(name), calibration, sinks=sinks)
    run_passes(rewrite, INSERT)
    rewrite.graph.lint()
    exact, seen = Seen(model, rewrite.site), Seen(packed, rewrite.site)
    found = seen.real(seen.through(rewrite))
    assert zoo.relative(found, seen.real(seen.output)) < close
    assert zoo.relative(found, exact.real(exact.output)) > 0.1


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "glm"])
def test_online_rotation_equals_the_merged_one(name):
    model, calibration, outputs = zoo.shared(name, 1), zoo.shared_calibration(name, 1), []
    for merge in (True, False):
        site = zoo.fresh_site(name)
        if not merge:
            site.key_projection = site.value_projection = site.output_projection = None
        rewrite = rewrite_of(site, calibration, sinks=0)
        counts = run_passes(rewrite, INSERT)
        expected = {"merged": 3, "online": 0} if merge else {"merged": 0, "online": 3}
        assert counts["insert_rotation"] == expected
        assert bool(rewrite.folded) == merge
        seen = Seen(model, site)
        outputs.append(seen.real(seen.through(rewrite)))
    exact = seen.real(seen.output)
    assert zoo.relative(outputs[1], outputs[0]) < CLOSE_IN_CODES
    assert zoo.relative(outputs[0], exact) > 5 * CLOSE_IN_CODES


def test_rotation_alone_changes_nothing():
    """Without a quantizer, merged rotations cancel."""
    model = zoo.shared("llama", 1)
    rewrite = rewrite_of(zoo.fresh_site("llama"), zoo.shared_calibration("llama", 1), sinks=0)
    run_passes(rewrite, INSERT[:1])
    assert set(rewrite.folded) == {"k_proj.weight", "v_proj.weight", "o_proj.weight"}
    seen = Seen(model, rewrite.site)
    assert zoo.relative(seen.real(seen.through(rewrite)), seen.real(seen.output)) < 1e-5


def test_folded_parameters_are_float64_until_they_are_bound():
    rewrite = rewrite_of(zoo.fresh_site("qwen2"), zoo.shared_calibration("qwen2", 1))
    run_passes(rewrite)
    own = rewrite.site.capture.module.state_dict()
    assert set(rewrite.folded) == {f"{p}_proj.{k}" for p in "kv" for k in ("weight", "bias")} | {
        "o_proj.weight"
    }
    assert all(t.dtype is torch.float64 and t.shape == own[name].shape for name, t in rewrite.folded.items())
    assert all(not torch.allclose(t.float(), own[name]) for name, t in rewrite.folded.items())


# normalize


@torch.no_grad()
@pytest.mark.parametrize("name", ["falcon", "llama", "olmo2"])
def test_normalize_changes_the_spelling_only(name):
    model = zoo.shared(name, 1)
    (one,) = capture(model)
    before = {str(n.target) for n in one.graph.nodes}
    site_like = type("SiteLike", (), {"capture": one})
    seen, outputs = Seen(model, site_like), []
    for step in (None, normalize):
        counts = step(one) if step else None
        rewrite = type("RewriteLike", (), {"site": site_like, "graph": one.graph, "residual": None})
        rewrite.buffers, rewrite.folded = {}, {}
        markers = one.graph.find_nodes(op="call_function", target=ATTENTION)
        outputs.append(seen.real(seen.through(rewrite)))
        for node in markers:
            node.target = ATTENTION
    after = {str(n.target) for n in one.graph.nodes}
    torch.testing.assert_close(outputs[0], seen.real(seen.output), rtol=0, atol=2e-5)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=2e-5)
    assert not after & {"aten.view.default", "aten.alias.default", "aten.matmul.default"}
    if name == "falcon":
        assert {"aten.matmul.default", "aten.scaled_dot_product_attention.default"} <= before
        assert counts["linear"] == 2
        assert counts["attention"] == 1
        assert str(ATTENTION) in after


@torch.no_grad()
def test_positions_may_come_once_for_the_batch():
    """Sizes are read from hidden states, so that rows of batch 1 serve a batch of 3."""
    model = zoo.shared("llama", 1)
    site = zoo.fresh_site("llama")
    run_passes(rewrite := rewrite_of(site, zoo.shared_calibration("llama", 1), sinks=0), INSERT)
    seen = Seen(model, site)
    several = seen.through(rewrite)
    ids, mask = zoo.prompt(length=24, padding=(0, 0, 0))
    rows = model.model.rotary_emb(seen.residual, torch.arange(24)[None])
    seen.kwargs["position_embeddings"] = rows
    assert rows[0].shape[0] == 1
    found = seen.through(rewrite)
    assert torch.allclose(found[0], several[0], atol=1e-5)  # the sequence without padding
    assert mask.all()
    assert ids.shape == (3, 24)
