"""How the ops behave in torch: registration, tracing, compiling, autograd, and what runs them."""

import contextlib
import sys
import types

import pytest
import torch

from rotatekv_fx import ops
from rotatekv_fx.errors import ConfigError
from rotatekv_fx.kernels.quantize.reference import packed_bytes
from rotatekv_fx.recipes.base import hadamard

rotatekv = torch.ops.rotatekv
OPS = [
    "append",
    "attend",
    "compensate",
    "dequantize",
    "quantize",
    "restore_sinks",
    "rotate",
    "select_sinks",
    "store",
    "take_tokens",
]


def buffers(batch, groups, slots, group, bits, scheme):
    return (
        torch.zeros(batch, groups, slots, packed_bytes(group, bits), dtype=torch.uint8),
        torch.zeros(batch, groups, slots, dtype=torch.float16),
        torch.zeros(batch, groups, slots, dtype=torch.int16 if scheme == "zero_point" else torch.float16),
    )


def samples():
    """(op name, arguments), several of each."""
    torch.manual_seed(0)
    x, wide = torch.randn(2, 4, 3, 16), torch.randn(1, 3, 2, 12, dtype=torch.bfloat16)
    strided = torch.randn(2, 3, 4, 16).transpose(1, 2)
    order = torch.randperm(64)
    yield "rotate", (x, hadamard(64)[None], None, False)
    yield "rotate", (strided, torch.randn(4, 16, 16), order, False)
    yield "rotate", (strided.bfloat16(), torch.randn(2, 32, 32), order, True)
    yield "compensate", (strided, torch.randn(4, 16, 16), 2, 32, 0.7)
    yield "compensate", (wide, torch.randn(1, 36, 36), 3, 12, 1.0)
    for scheme in ("zero_point", "midpoint"):
        yield "quantize", (strided, 2, 64, 0.8, scheme)
        yield "quantize", (wide, 3, 36, 1.0, scheme)
        yield "dequantize", (*rotatekv.quantize(x, 4, 32, 1.0, scheme), 4, 32, 4, torch.float32)
        yield "dequantize", (*rotatekv.quantize(wide, 3, 12, 1.0, scheme), 3, 12, 3, torch.bfloat16)
        yield (
            "append",
            (*buffers(2, 1, 7, 64, 2, scheme), strided, torch.tensor([6, 0, 3]), 2, 64, 0.8, scheme),
        )
        yield "append", (*buffers(1, 3, 5, 12, 3, scheme), wide, torch.tensor([1, 2]), 3, 12, 1.0, scheme)
    packed = rotatekv.quantize(x, 2, 32, 1.0, "zero_point", order)
    yield "quantize", (x, 2, 32, 1.0, "zero_point", order)
    yield "dequantize", (*packed, 2, 32, 4, torch.float32, order)
    slots = torch.tensor([6, 0, 3])
    yield "append", (*buffers(2, 2, 7, 32, 2, "zero_point"), x, slots, 2, 32, 0.8, "zero_point", order)
    yield "store", (torch.zeros(2, 4, 7, 16), strided, torch.tensor([6, 0, 3]))
    yield "store", (torch.zeros(1, 3, 5, 12, dtype=torch.float16), wide, torch.tensor([1, 2]))
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    value, mask = torch.randn(2, 2, 5, 6), torch.rand(2, 1, 3, 7) > 0.3
    yield "attend", (query, key, value, None, 0.3, 0.0, None, True)
    yield "attend", (query, key, value, mask, 0.3, 0.0, None, False)
    yield "attend", (query, key, value, mask.float(), 0.3, 20.0, torch.randn(4), False)
    yield "attend", (query[:, :, :1].bfloat16(), key.bfloat16(), value.bfloat16(), None, 0.3, 0.0, None, True)
    yield "select_sinks", (torch.randn(2, 5, 8), None, 4)
    distinct = torch.randperm(80).reshape(2, 5, 8).bfloat16()  # ties differ by device
    yield "select_sinks", (distinct, torch.rand(2, 5) > 0.3, 60)
    yield "restore_sinks", (x, torch.randn(2, 4, 2, 16), torch.tensor([[0, 9], [-1, 2]]))
    yield "restore_sinks", (strided, torch.randn(2, 4, 1, 16).half(), torch.tensor([[1], [3]]))
    yield "take_tokens", (strided, torch.tensor([[2, 0, 2, 1], [1, 1, 0, 2]]))
    yield "take_tokens", (wide, torch.tensor([[1]]))


SAMPLES = list(samples())


@pytest.mark.parametrize(("name", "arguments"), SAMPLES, ids=[name for name, _ in SAMPLES])
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(rotatekv, name).default, arguments)


def test_every_op_has_samples_and_there_are_no_others():
    assert sorted({name for name, _ in SAMPLES}) == OPS
    packed = {"decode", "extend", "prefill"}  # test_packed_ops.py
    packed.add("decode_before_rope")  # test_before_rope.py
    assert sorted(set(ops.REFERENCES) - packed) == OPS


# Compiling and exporting


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_compiled_rotate_and_attend_equal_eager():
    def step(query, key, value, matrix, order, mask):
        key = rotatekv.rotate(rotatekv.rotate(key, matrix, order, False), matrix, order, True)
        return rotatekv.attend(query, key + 1.0, value, mask, 0.25, 30.0, None, False)

    run = compiled(step)
    order = torch.randperm(32)
    for tokens, length in ((5, 9), (3, 8), (4, 7), (1, 6)):  # the third size makes it dynamic
        query, mask = torch.randn(2, 4, tokens, 16), torch.rand(2, 1, tokens, length) > 0.2
        key, value = torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
        arguments = (query, key, value, hadamard(32)[None], order, mask)
        torch.testing.assert_close(run(*arguments), step(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["zero_point", "midpoint"])
def test_compiled_append_equals_eager_in_place(scheme):
    def step(x, slots, codes, scale, offset, kept):
        rotatekv.append(codes, scale, offset, x * 2.0, slots, 2, 32, 0.8, scheme)
        rotatekv.store(kept, x * 2.0, slots)
        return rotatekv.dequantize(codes, scale, offset, 2, 32, 2, torch.float32) + kept

    run = compiled(step)
    eager = [*buffers(1, 1, 12, 32, 2, scheme), torch.zeros(1, 2, 12, 16)]
    traced = [b.clone() for b in eager]
    addresses = [b.data_ptr() for b in traced]
    for start, tokens in ((0, 5), (5, 1), (6, 1), (7, 3)):
        x, slots = torch.randn(1, 2, tokens, 16), torch.arange(start, start + tokens)
        assert torch.equal(run(x, slots, *traced), step(x, slots, *eager))
    for one, other in zip(traced, eager, strict=True):
        assert torch.equal(one, other)
    assert eager[0].any()
    assert [b.data_ptr() for b in traced] == addresses


class Cached(torch.nn.Module):
    """Every op once, as a layer would use them."""

    def forward(self, x, residual, codes, scale, offset, slots, valid):
        scores, tokens = rotatekv.select_sinks(residual, valid, 3)
        turned = rotatekv.rotate(x, hadamard(32)[None], None, False)
        fresh = rotatekv.dequantize(
            *rotatekv.quantize(turned, 4, 32, 1.0, "midpoint"), 4, 32, 2, torch.float32
        )
        rotatekv.append(codes, scale, offset, fresh, slots, 2, 32, 0.8, "zero_point")
        past = rotatekv.dequantize(codes, scale, offset, 2, 32, 2, torch.float32)
        exact = rotatekv.take_tokens(x, tokens)
        past = rotatekv.restore_sinks(past, exact, torch.where(scores < 0.0, -1, tokens))
        return rotatekv.attend(x, past, past, None, 0.25, 0.0, None, True)


def cached_inputs(tokens):
    valid = torch.ones(1, tokens, dtype=torch.bool)
    packed = buffers(1, 1, 12, 32, 2, "zero_point")
    return torch.randn(1, 2, tokens, 16), torch.randn(1, tokens, 24), *packed, torch.arange(tokens), valid


def test_export_keeps_one_node_an_op_and_a_dynamic_length():
    tokens = torch.export.Dim("tokens", min=2, max=12)
    fixed = dict.fromkeys(("codes", "scale", "offset"))
    shapes = {"x": {2: tokens}, "residual": {1: tokens}, "slots": {0: tokens}, "valid": {1: tokens}, **fixed}
    program = torch.export.export(Cached(), cached_inputs(6), dynamic_shapes=shapes, strict=False)
    called = [str(node.target) for node in program.graph.nodes if "rotatekv" in str(node.target)]
    counts = {name: called.count(f"rotatekv.{name}.default") for name in OPS}
    assert counts == dict.fromkeys(OPS, 1) | {"dequantize": 2, "store": 0, "compensate": 0}
    for size in (6, 9):
        arguments = cached_inputs(size)
        copies = [a.clone() for a in arguments]
        assert torch.equal(program.module()(*arguments), Cached()(*copies))


@pytest.mark.parametrize("name", OPS)
def test_reference_traces_without_specialising_the_length(name):
    """What an exporter does that inlines the reference: one graph, right at another number of tokens."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def build(tokens):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(1, 2, tokens, 16, generator=generator)
        packed = rotatekv.quantize(x, 4, 32, 1.0, "midpoint")
        slots = torch.arange(tokens)
        return {
            "rotate": lambda: (x,),
            "quantize": lambda: (x,),
            "compensate": lambda: (x,),
            "dequantize": lambda: packed,
            "append": lambda: (*buffers(1, 1, 12, 32, 4, "midpoint"), x, slots),
            "store": lambda: (torch.zeros(1, 2, 12, 16), x, slots),
            "attend": lambda: (x, torch.cat([x, x], 2)),
            "select_sinks": lambda: (x[0],),
            "restore_sinks": lambda: (x, x[:, :, :2], torch.tensor([[tokens - 1, tokens]])),
            "take_tokens": lambda: (x, torch.tensor([[tokens - 1, 0]])),
        }[name]()

    matrix, order, reference = hadamard(32)[None], torch.randperm(32), ops.REFERENCES[name]
    unit_upper = torch.randn(2, 16, 16).triu(1) + torch.eye(16)

    def function(*tensors):
        rest = {
            "rotate": (matrix, order, True),
            "quantize": (4, 32, 1.0, "zero_point"),
            "compensate": (unit_upper, 4, 32, 1.0),
            "dequantize": (4, 32, 2, torch.float32),
            "append": (4, 32, 1.0, "midpoint"),
            "attend": (tensors[-1], None, 0.25, 0.0, None, True),
            "select_sinks": (None, 4),
        }.get(name, ())
        result = reference(*tensors, *rest)
        return tensors if result is None else result

    graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*build(5))
    for tokens in (5, 8):
        torch.testing.assert_close(graph(*build(tokens)), function(*build(tokens)), rtol=0, atol=0)


# Autograd and autocast


def test_results_carry_no_gradient_history():
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    packed = buffers(1, 1, 4, 32, 2, "midpoint")
    kept = torch.zeros(1, 2, 4, 16)
    rotatekv.append(*packed, x, torch.arange(3), 2, 32, 1.0, "midpoint")
    rotatekv.store(kept, x, torch.arange(3))
    assert not any(t.requires_grad for t in (*packed, kept))
    assert kept.any()


def test_backward_warns():
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    out = rotatekv.rotate(x, hadamard(32)[None], None, False)
    with pytest.warns(UserWarning, match="rotatekv::rotate"):
        (out.sum() + x.sum()).backward()


def test_autocast_does_not_change_the_numbers():
    for name, arguments in SAMPLES:
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        plain = getattr(rotatekv, name)(*copies)
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = getattr(rotatekv, name)(*copies)
        torch.testing.assert_close(cast, plain, rtol=0, atol=0)


# What runs an op


@pytest.mark.parametrize("name", OPS)
def test_every_op_runs_its_reference_on_the_cpu(name):
    assert ops.lowered_to(name, "cpu") == "reference"


def test_a_named_triton_kernel_serves_cuda_alone(monkeypatch):
    module = types.ModuleType("some_kernels")
    module.fast_store = lambda *arguments: "fast"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_kernels", module)
    monkeypatch.setitem(ops.TRITON_KERNELS, "store", "some_kernels:fast_store")
    assert ops.lowered_to("store", "cuda") == "triton"
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: contextlib.nullcontext(devices.append(d)))
    x = torch.zeros(1)
    assert ops.implementation("store", "cuda")(x) == "fast"
    assert devices == [x.device]  # a kernel is launched on its tensors' device
    assert ops.lowered_to("store", "cpu") == "reference"
    assert ops.implementation("store", "cpu") is ops.REFERENCES["store"]


def test_a_triton_kernel_that_cannot_be_imported_is_an_error(monkeypatch):
    monkeypatch.setitem(ops.TRITON_KERNELS, "store", "no_such_module:store")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        ops.implementation("store", "cuda")


def test_lowered_to_names_an_unknown_op():
    with pytest.raises(ConfigError, match="no op 'rotat'"):
        ops.lowered_to("rotat", "cpu")


def test_shapes_are_checked_while_tracing_too():
    with pytest.raises(ConfigError, match="group 24 does not divide 32 channels"):
        rotatekv.quantize(torch.zeros(1, 2, 3, 16, device="meta"), 2, 24, 1.0, "midpoint")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "arguments"), SAMPLES, ids=[name for name, _ in SAMPLES])
def test_cuda_agrees_with_the_cpu(name, arguments):
    def run(device):
        moved = [a.clone().to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
        result = getattr(rotatekv, name)(*moved)
        outputs = moved[:3] if result is None else result
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)

    for actual, expected in zip(run("cuda"), run("cpu"), strict=True):
        if isinstance(expected, torch.Tensor):
            exact = not expected.is_floating_point()
            tolerance = 0.0 if exact else 2e-2 if expected.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)
