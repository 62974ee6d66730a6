"""A transformed model -> one ONNX decoder graph with the packed cache as inputs and outputs."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from rotatekv_fx import api
from rotatekv_fx.errors import ConfigError, InputError, RotateKVError, StateError
from rotatekv_fx.export.runtime import ExportCache, ExportRuntime, Lowered, exporting
from rotatekv_fx.export.schema import METADATA_KEY, MODEL_FILE, Metadata, past_name, result_name
from rotatekv_fx.export.state import State, Step
from rotatekv_fx.naming import cache_argument

try:
    import onnx
    import onnxscript  # noqa: F401  torch.onnx needs it
    from onnx import TensorProto, helper

    from rotatekv_fx.export.generation import Decoder
    from rotatekv_fx.export.parts import Parts
except ImportError as error:  # of the extra, see export_onnx
    _MISSING: ImportError | None = error
else:
    _MISSING = None

logger = logging.getLogger(__name__)
OPSETS = (18, 24)  # the first and the last that were tried
EXTERNAL_FROM = 1 << 30  # bytes of weights from which they go to a file of their own; a graph holds 2 GB
# Differences of logits in the check, relative to the largest logit: of half the predictions, and of all. A
# number on the other side of a rounding changes some by more than a thousandth.
_AGREEMENT, _ROUNDED = 1e-3, 0.1
_SIZES = {"batch": 2, "sequence": 5, "history": 7, "recent": 3, "leaving": 4}  # while tracing


def export_onnx(
    model: nn.Module, folder: str | Path, *, tokenizer: Any = None, opset: int = 23, check: bool = True
) -> Path:
    """Write a transformed model as an ONNX graph that reads and makes the packed cache.

    The folder gets model.onnx (and model.onnx.data where the weights exceed 1 GiB), the model's config, and
    the tokenizer's files. `rotatekv_fx.export.generation.Decoder` runs it; the docs describe the graph's
    inputs and outputs for other runtimes.

    Args:
        model: what `transform` returned, in float32 on the CPU.
        folder: a new or an empty folder.
        tokenizer: saved beside the graph, if given.
        opset: of ONNX.
        check: run the graph in onnxruntime and compare its logits with the model's.

    Returns:
        The path of model.onnx.

    Raises:
        ConfigError: the opset is not supported, or the extra "onnx" is not installed.
        StateError: the model is not transformed, not in float32, or stores what the graph cannot.
        InputError: the folder is not empty, or cannot be written.
        RotateKVError: the graph is not valid, or does not give the model's logits.
        On any error the folder is left as it was.
    """
    target = Path(folder)
    check_export(target, opset)
    report = api.report(model)  # refuses a model that is not transformed
    _check_model(model)
    with exporting(model, report.sites) as runtimes:
        _check_runtimes(model, runtimes)
        graph = _trace(model, runtimes, opset)
        metadata = _metadata(model, runtimes, report.config, opset)
    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, metadata.to_json()
    with _new_folder(target) as made:
        _save(graph, made / MODEL_FILE)
        del graph
        model.config.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        if check:
            _check_graph(model, made)
    logger.info("Exported %s to %s.", type(model).__name__, target)
    return target / MODEL_FILE


class _Traced(nn.Module):
    """The whole model as a function of token ids and the cache's tensors."""

    def __init__(self, model: nn.Module, parts: Parts, runtimes: dict[int, ExportRuntime]):
        super().__init__()
        self.model, self.parts, self.runtimes = model, parts, runtimes
        self.named_cache = cache_argument(model)
        self.selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_at: Tensor,
        prompt: Tensor,
        several: Tensor,
        moved: dict[str, Tensor],
        states: dict[str, State],
    ) -> tuple[Tensor, ...]:
        """Logits [B, K, V] after the new tokens `logits_at` [K], then each layer's new tensors.

        Args:
            input_ids: [B, S].
            attention_mask: [B, T], 1 for every token to be seen, past ones included.
            moved: "leaving" and "staying", as in `Step`; empty without a window.
        """
        total, new = attention_mask.shape[1], input_ids.shape[1]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        queries = torch.arange(new, device=input_ids.device) + (total - new)
        moves = moved.get("leaving"), moved.get("staying")
        step = Step(total, new, queries, positions, prompt, several, *moves, {})
        self.parts.single = new
        tensors = {int(layer): state for layer, state in states.items()}
        cache = ExportCache(self.model.config, step, tensors, self.parts, self.runtimes)
        arguments: dict[str, Any] = {"logits_to_keep": logits_at} if self.selects else {}
        with Lowered():
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions.index_select(1, queries),
                **{self.named_cache: cache},
                use_cache=True,
                **arguments,
            ).logits
        if not self.selects:
            logits = logits.index_select(1, logits_at)
        return logits, *(cache.outputs[int(layer)][name] for layer in states for name in states[layer])


def _trace(model: nn.Module, runtimes: dict[int, ExportRuntime], opset: int) -> onnx.ModelProto:
    """The graph, with names for its inputs and outputs."""
    n = _SIZES
    window = max(r.spec.window for r in runtimes.values())
    recent = n["recent"] if window else 0
    exact = recent + n["sequence"]
    states = {str(i): r.empty_state(n["batch"], n["history"], recent) for i, r in runtimes.items()}
    places = torch.arange(exact)
    moved = {"leaving": places[: n["leaving"]], "staying": places[n["leaving"] :]} if window else {}
    example = {
        "input_ids": torch.ones(n["batch"], n["sequence"], dtype=torch.int64),
        "attention_mask": torch.ones(n["batch"], n["history"] + exact, dtype=torch.int64),
        "logits_at": torch.tensor([0, 2, 4]),
        "prompt": torch.tensor(True),
        "several": torch.tensor(True),
        "moved": moved,
        "states": states,
    }
    dim = torch.export.Dim
    batch, sequence, total = (dim(name, min=1) for name in ("batch", "sequence", "total"))
    history = {kind: dim(name, min=0) for kind, name in ((False, "history"), (True, "history_sliding"))}
    recent_dim = dim("recent", min=0)

    def varying(name: str, runtime: ExportRuntime) -> dict[int, Any]:
        if name.startswith("recent"):
            return {0: batch, 2: recent_dim}
        return {0: batch} if name.startswith("sink") else {0: history[runtime.sliding], 1: batch}

    shapes = {
        "input_ids": {0: batch, 1: sequence},
        "attention_mask": {0: batch, 1: total},
        "logits_at": {0: dim("predicted", min=1)},
        "prompt": None,
        "several": None,
        "moved": {name: {0: dim(name, min=0)} for name in moved},
        "states": {k: {t: varying(t, runtimes[int(k)]) for t in state} for k, state in states.items()},
    }
    parts = Parts()
    pairs = [(layer, name) for layer, state in states.items() for name in state]
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Traced(model, parts, runtimes).eval(),
            (),
            kwargs=example,
            dynamic_shapes=shapes,
            input_names=[*list(example)[:5], *moved, *(past_name(*pair) for pair in pairs)],
            output_names=[
                "logits",
                *(result_name(*pair, not pair[1].startswith(("recent", "sink"))) for pair in pairs),
            ],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        graph = program.model_proto
        parts.put_into(graph, opset)
    _derive_inputs(graph, window)
    _clean(graph)
    return graph


def _derive_inputs(model: onnx.ModelProto, window: int) -> None:
    """Compute from shapes what was traced as inputs of its own: several, leaving and staying.

    Tracing them as inputs keeps sizes that depend on the window out of the exporter's shape arithmetic.
    """
    graph = model.graph

    def number(name: str, value: int) -> Any:
        return helper.make_tensor(name, TensorProto.INT64, (), [value])

    first = next((i.name for i in graph.input if ".recent_" in i.name), None)
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["sequence_shape"], start=1, end=2),
        helper.make_node("Squeeze", ["sequence_shape"], ["sequence_size"]),
        helper.make_node("Greater", ["sequence_size", "one"], ["several"]),
    ]
    graph.initializer.append(number("one", 1))
    if first is not None:
        graph.initializer.extend([number("zero", 0), number("window", window)])
        nodes += [
            helper.make_node("Shape", [first], ["recent_shape"], start=2, end=3),
            helper.make_node("Squeeze", ["recent_shape"], ["recent_size"]),
            helper.make_node("Add", ["recent_size", "sequence_size"], ["exact_size"]),
            helper.make_node("Sub", ["exact_size", "window"], ["over_size"]),
            helper.make_node("Max", ["over_size", "zero"], ["leaving_size"]),
            helper.make_node("Range", ["zero", "leaving_size", "one"], ["leaving"]),
            helper.make_node("Range", ["leaving_size", "exact_size", "one"], ["staying"]),
        ]
    kept = [i for i in graph.input if i.name not in ("several", "leaving", "staying")]
    later = list(graph.node)
    del graph.input[:], graph.node[:]
    graph.input.extend(kept)
    graph.node.extend([*nodes, *later])


def _clean(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes about the source: stack traces and paths of the machine."""

    def clean(graph: onnx.GraphProto) -> None:
        del graph.metadata_props[:], graph.value_info[:]
        graph.doc_string = ""
        for part in (*graph.initializer, *graph.input, *graph.output):
            del part.metadata_props[:]
            part.doc_string = ""
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    clean(attribute.g)

    clean(model.graph)
    del model.metadata_props[:]
    model.graph.name, model.doc_string = "rotatekv_fx", ""


def _save(model: onnx.ModelProto, path: Path) -> None:
    """Save, check and infer shapes.

    Raises:
        RotateKVError: the graph is not valid.
    """
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    external = {"location": f"{MODEL_FILE}.data", "size_threshold": 1024} if size >= EXTERNAL_FROM else {}
    onnx.save(model, path, save_as_external_data=bool(external), **external)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RotateKVError(f"the exported graph is not valid ONNX; try another opset: {error}") from error


def _check_graph(model: nn.Module, folder: Path) -> None:
    """Compare logits of a left-padded prompt, its second part, and a few more tokens.

    Raises:
        RotateKVError: they differ.
    """
    decoder = Decoder(folder)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    length = decoder.metadata.window + 16
    ids = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    steps = (slice(0, length - 10), slice(length - 10, length - 2), *(slice(i, i + 1) for i in (-2, -1)))
    packed, exported = DynamicCache(config=model.config), decoder.cache(2, length)
    done, differences, largest = 0, [], 1.0
    for part in steps:
        new = ids[:, part] if part.start >= 0 else ids[:, done : done + 1]
        done += new.shape[1]
        with torch.no_grad():
            expected = model(
                new,
                attention_mask=mask[:, :done],
                position_ids=positions[:, done - new.shape[1] : done],
                **{cache_argument(model): packed},
            ).logits[:, -1]
        found = exported.step(new.numpy(), mask[:, done - new.shape[1] : done].numpy())
        differences.append((torch.from_numpy(found[:, -1]) - expected).abs().amax(-1))
        largest = max(largest, float(expected.abs().max()))
    every = torch.cat(differences)
    middle, worst = float(every.median()), float(every.max())
    if not (middle <= _AGREEMENT * largest and worst <= _ROUNDED * largest):
        raise RotateKVError(
            f"the exported graph's logits differ from the model's by {middle:.2g} in the median, {worst:.2g} "
            f"at most (largest logit {largest:.2g}); please report this with the model's config."
        )


def check_export(folder: Path, opset: int) -> None:
    """Refuse what can be known to fail before a model is loaded.

    Raises:
        ConfigError: the opset is not supported, or the extra "onnx" is not installed.
        InputError: the folder is not empty, or cannot be written.
    """
    if _MISSING is not None:
        raise ConfigError(
            f"ONNX export needs the extra onnx ({_MISSING}); pip install 'rotatekv-fx[onnx]'."
        ) from _MISSING
    if type(opset) is not int or not OPSETS[0] <= opset <= OPSETS[1]:
        raise ConfigError(f"opset is {opset!r}; use one from {OPSETS[0]} to {OPSETS[1]}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; name a new one.")
    above = next(p for p in folder.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"cannot write {folder}: {above} is not a folder that can be written.")


def _check_model(model: nn.Module) -> None:
    found = {(p.dtype, p.device.type) for p in model.parameters()}
    if found != {(torch.float32, "cpu")}:
        names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in found))
        raise StateError(
            f"the model's parameters are {names}; restore it, call model.float().cpu(), transform it again, "
            "and export that."
        )


def _check_runtimes(model: nn.Module, runtimes: dict[int, ExportRuntime]) -> None:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(runtimes) != layers:
        raise StateError(
            f"{layers - len(runtimes)} of {layers} layers were not transformed, and the graph needs all; "
            "rotatekv_fx.report(model) says why."
        )
    for index, layer in enumerate(DynamicCache(config=model.config).layers):
        if isinstance(layer, LinearAttentionLayer):
            raise StateError(
                f"layer {index} keeps a state beside keys and values; such models cannot be exported."
            )
    for index, runtime in runtimes.items():
        if runtime.positions.stored and runtime.positions.description != "ids":
            raise StateError(
                f"layer {index} stores rows of its rotary embedding, since they depend on more than a "
                "token's position (dynamic RoPE scaling); such models cannot be exported."
            )
        if runtime.spec.exact_dtype is torch.bfloat16:
            raise StateError(
                f"layer {index} keeps exact tokens in bfloat16, unknown to NumPy; load the model in float32."
            )


def _metadata(
    model: nn.Module, runtimes: dict[int, ExportRuntime], config: dict[str, Any], opset: int
) -> Metadata:
    text = model.config.get_text_config(decoder=True)
    kinds = DynamicCache(config=model.config).layers
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    pad = getattr(model.generation_config, "pad_token_id", None)
    pad = pad if pad is not None else getattr(text, "pad_token_id", None)
    spec = next(iter(runtimes.values())).spec
    return Metadata(
        recipe=config["recipe"],
        key_bits=config["key_bits"],
        value_bits=config["value_bits"],
        window=spec.window,
        sinks=spec.sinks,
        sliding={str(i): kinds[i].sliding_window for i, r in runtimes.items() if r.sliding},
        eos=eos,
        pad=pad if pad is not None else eos[0] if eos else 0,
        opset=opset,
        versions={name: version(name) for name in ("rotatekv-fx", "torch", "transformers", "onnx")},
    )


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when all went well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    try:
        yield made
        made.chmod(0o755)
        os.replace(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and warnings about itself from the user."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)
