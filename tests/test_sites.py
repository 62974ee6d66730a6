"""Sites: what the analysis of a captured graph finds is what the model computes, by the model's own cache."""

import pytest
import torch
import zoo
from torch import fx
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo import one_thread  # noqa: F401

import rotatekv_fx as rk
from rotatekv_fx.capture import capture, lookup
from rotatekv_fx.collect import observer
from rotatekv_fx.passes.normalize import normalize
from rotatekv_fx.rope import Rope
from rotatekv_fx.sites import ATTENTION, KV_UPDATE, find_sites

# architecture -> KV heads, query heads, and whether k_proj, v_proj, o_proj can take a rotation
EXPECTED = {
    "llama": (2, 4, "kvo"),
    "qwen2": (2, 4, "kvo"),
    "qwen3": (2, 4, "vo"),  # a norm per head between k_proj and RoPE
    "gemma2": (2, 4, "kvo"),
    "gemma3_text": (2, 4, "vo"),
    "phi3": (2, 4, "kvo"),  # one projection for q, k and v
    "gpt_neox": (4, 4, "kvo"),  # likewise, interleaved by head, with a bias
    "falcon": (1, 4, "kvo"),  # likewise, one KV head
    "olmo2": (2, 4, "vo"),  # a norm over all heads
    "cohere": (2, 4, "kvo"),
    "glm": (2, 4, "kvo"),
    "gpt_oss": (2, 4, "kvo"),
    "smollm3": (2, 4, "kvo"),
    "gptj": (4, 4, "kv" if zoo.INLINE else "kvo"),  # inline attention: nothing says what o_proj reads
}


def site_of(name):
    (site,), rejections = find_sites(zoo.captured(name))
    assert rejections == []
    return zoo.shared(name, 1), site


@torch.no_grad()
def called(model, module):
    """What a module receives and what the model caches, for a prompt with padding."""
    received = {}

    def hook(_, args, kwargs):
        received.update(args=args, kwargs=kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    ids, mask = zoo.prompt()
    cache = DynamicCache()
    model(ids, attention_mask=mask, position_ids=zoo.positions_of(mask), past_key_values=cache)
    handle.remove()
    return received, cache.layers[0]


@pytest.fixture(scope="module", params=EXPECTED)
def found(request):
    """(name, site, the module's inputs by name, the model's own cache layer)."""
    model, site = site_of(request.param)
    received, layer = called(model, site.capture.module)
    inputs = {i.name: lookup(received["args"], received["kwargs"], i.path) for i in site.capture.inputs}
    return request.param, site, inputs, layer


def test_heads_and_projections(found):
    name, site, *_ = found
    kv_heads, query_heads, merged = EXPECTED[name]
    assert (site.kv_heads, site.query_heads) == (kv_heads, query_heads)
    assert (site.head_dim, site.value_dim) == (32, 32)
    sides = {"k": site.key_projection, "v": site.value_projection, "o": site.output_projection}
    assert "".join(side for side, projection in sides.items() if projection is not None) == merged


def test_nodes_have_their_roles(found):
    name, site, *_ = found
    assert site.cache_write.target is KV_UPDATE
    assert site.cache_write.args == (site.key_post, site.value)
    assert (site.attention is None) == (name in zoo.INLINE)
    assert site.attention is None or site.attention.target is ATTENTION
    assert site.mask.op == "placeholder"
    assert site.key_pre_transposed == (name == "gptj")
    assert site.device.type == "cpu"
    assert site.hidden_example.shape[-1] == 128


@torch.no_grad()
def test_key_and_value_are_those_of_the_models_own_cache(found):
    """RoPE, cut out and replayed on the key before it, gives the key that transformers caches."""
    _, site, inputs, layer = found
    key_pre, key_post, value, query = observer(site)(*inputs.values())
    torch.testing.assert_close(value, layer.values)
    torch.testing.assert_close(key_post, layer.keys)
    replayed = Rope(site)(key_pre, *(inputs[p.name] for p in site.positional))
    torch.testing.assert_close(replayed, layer.keys)
    assert key_pre.shape == layer.keys.shape
    assert not torch.allclose(key_pre, layer.keys, atol=0.1)
    assert query is None or query.shape == (3, site.query_heads, 14, 32)


@torch.no_grad()
def test_replayed_rope_takes_other_lengths_and_batches(found):
    """It is applied to all cached tokens, not only to a call's own, and a batch may share its rows."""
    _, site, inputs, _ = found
    positions = [inputs[p.name] for p in site.positional]
    key = torch.randn(3, site.kv_heads, 14, 32)
    rope, whole = Rope(site), Rope(site)(key, *positions)
    torch.testing.assert_close(rope(key[:, :, :5], *(p[:, :5] for p in positions)), whole[:, :, :5])
    one = rope(key, *(p[:1] for p in positions)) if positions[0].is_floating_point() else None
    assert one is None or torch.allclose(one[:1], whole[:1])


@torch.no_grad()
def test_features_of_a_projection_are_the_channels(found):
    """Row features[h, d] of the weight makes channel d of head h."""
    _, site, inputs, layer = found
    key_pre, *_ = observer(site)(*inputs.values())
    hidden = inputs[site.hidden.name]
    for projection, expected in ((site.key_projection, key_pre), (site.value_projection, layer.values)):
        if projection is None:
            continue
        weight = site.capture.module.get_parameter(projection.weight)[projection.features]
        computed = torch.einsum("bsc,hdc->bhsd", hidden, weight)
        if projection.bias is not None:
            computed += site.capture.module.get_parameter(projection.bias)[projection.features][:, None]
        torch.testing.assert_close(computed, expected)


def test_output_features_are_a_permutation(found):
    _, site, *_ = found
    if site.output_projection is not None:
        features = site.output_projection.features
        assert features.shape == (site.query_heads, site.value_dim)
        assert sorted(features.flatten().tolist()) == list(range(site.query_heads * site.value_dim))


def test_find_sites_reads_only(found):
    name, *_ = found
    captures = zoo.captured(name)
    before = [(n.name, n.target, n.args, n.kwargs) for n in captures[0].graph.nodes]
    find_sites(captures)
    assert [(n.name, n.target, n.args, n.kwargs) for n in captures[0].graph.nodes] == before


def test_rope_operations(found):
    _, site, *_ = found
    assert site.rope_operations()
    assert {"mul", "cat"} & set(site.rope_operations()) or "stack" in site.rope_operations()


def test_a_layer_without_rope():
    (_, without), rejections = find_sites(zoo.captured("smollm3", 2))
    assert rejections == []
    assert without.rope_operations() == []
    assert without.positional == []
    assert without.key_pre is without.key_post
    key = torch.randn(1, 2, 3, 32)
    assert torch.equal(Rope(without)(key), key)


# Rejections


def rejected(model):
    captures = capture(model)
    for one in captures:
        normalize(one)
    sites, rejections = find_sites(captures)
    return sites, rejections, captures


def test_a_latent_cache_is_rejected_with_its_node():
    captures = zoo.captured("deepseek_v3")
    sites, (rejection,) = find_sites(captures)
    assert sites == []
    assert (rejection.name, rejection.layer_index) == ("model.layers.0.self_attn", 0)
    assert rejection.reason
    assert rejection.node in {n.name for n in captures[0].graph.nodes}


def cache_name(kwargs):
    """What this version of transformers calls the cache in an attention module's arguments."""
    return "cache" if "cache" in kwargs else "past_key_values"


class WritesTwice(LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        nothing = hidden_states[:, :0, :64].unflatten(-1, (2, 32)).transpose(1, 2)
        earlier, _ = kwargs[cache_name(kwargs)].update(nothing, nothing, self.layer_idx)
        return super().forward(hidden_states + earlier.mean(), **kwargs)


class PositionsInValues(LlamaAttention):
    def forward(self, hidden_states, position_embeddings, **kwargs):
        turned = hidden_states + position_embeddings[0].mean(-1, keepdim=True)
        return super().forward(turned, position_embeddings=position_embeddings, **kwargs)


class ReadsChangedKeys(LlamaAttention):
    def forward(self, *args, **kwargs):
        name = cache_name(kwargs)
        cache = kwargs.pop(name)

        class Shifted:
            def update(self, key, value, layer, **_):
                key, value = cache.update(key, value, layer)
                return key * 2, value

        return super().forward(*args, **{name: Shifted()}, **kwargs)


def test_attention_that_reads_changed_keys_is_left_inline():
    model = zoo.build("llama", layers=1)
    model.model.layers[0].self_attn.__class__ = ReadsChangedKeys
    ids, mask = zoo.prompt()
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    packed = zoo.transformed(model, "none")
    assert [site.attention for site in rk.report(packed).sites] == ["inline"]
    assert torch.equal(packed.generate(ids, **options), expected)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WritesTwice, "2 cache writes in one module"),
        (PositionsInValues, "the value depends on"),
    ],
)
def test_rejections_name_reason_and_node(kind, reason):
    model = zoo.build("llama")
    model.model.layers[1].self_attn.__class__ = kind
    sites, (rejection,), captures = rejected(model)
    assert [site.layer_index for site in sites] == [0]
    assert rejection.layer_index == 1
    assert reason in rejection.reason
    assert rejection.node in {n.name for n in captures[1].graph.nodes}


def test_a_failed_export_becomes_a_rejection():
    class Untraceable(LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states * float(hidden_states.sum() > 0), **kwargs)

    model = zoo.build("llama")
    model.model.layers[0].self_attn.__class__ = Untraceable
    failed, other = capture(model)
    normalize(other)
    sites, (rejection,) = find_sites([failed, other])
    assert [site.layer_index for site in sites] == [1]
    assert rejection.reason == failed.reason
    assert rejection.node == ""


class Once(torch.nn.Module):
    """Keeps what a linear layer gave."""

    def __init__(self, inner, seen):
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, x):
        self.seen.append(self.inner(x))
        return self.seen[-1]


class GatedByTheKey(LlamaAttention):
    """One linear layer whose output is both the key and a gate."""

    def forward(self, hidden_states, **kwargs):
        seen, projection = [], self.k_proj
        self._modules["k_proj"] = Once(projection, seen)
        try:
            output, weights = super().forward(hidden_states, **kwargs)
        finally:
            self._modules["k_proj"] = projection
        return output * torch.sigmoid(seen[0]).mean(-1, keepdim=True), weights


class GatedByTheSameWeight(LlamaAttention):
    """The weight of the key, used a second time."""

    def forward(self, hidden_states, **kwargs):
        gate = torch.sigmoid(self.k_proj(hidden_states)).mean(-1, keepdim=True)
        output, weights = super().forward(hidden_states, **kwargs)
        return output * gate, weights


@pytest.mark.parametrize(
    "kind",
    [
        GatedByTheKey,
        GatedByTheSameWeight,
    ],
)
def test_a_projection_that_feeds_something_else_is_not_merged(kind):
    """Rotating it would change what the other reader sees."""
    model = zoo.build("llama", layers=1)
    model.model.layers[0].self_attn.__class__ = kind
    (site,), rejections, _ = rejected(model)
    assert rejections == []
    assert isinstance(site.value_projection.node, fx.Node)
    assert site.key_projection is None
