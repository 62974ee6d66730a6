"""Text from an exported folder, on onnxruntime alone: needs onnxruntime, numpy and tokenizers, no torch.

The cache stays in buffers of the device the session runs on. History tensors have their tokens first, so what
is filled of a buffer is one piece of memory: the graph reads it in place, and writes a step's new rows behind
it. Nothing of the cache is copied from step to step, but for the exact tokens of the window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from rotatekv_fx.errors import ConfigError, InputError, StateError
from rotatekv_fx.export.schema import METADATA_KEY, MODEL_FILE, Metadata

PREFILL_CHUNK = 256
_NUMPY = {
    "tensor(uint8)": np.uint8,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
_EMPTY = {"sink_scores": -1, "sink_tokens": -1}  # what unused slots hold; 0 elsewhere


@dataclasses.dataclass(frozen=True)
class _Field:
    """One tensor of the cache: its names in the graph, dtype, and sizes (-1 where the batch or tokens go)."""

    past: str
    result: str
    dtype: type
    shape: tuple[int, ...]
    sliding: int  # tokens of the history that attention reads at most; 0 for all

    @property
    def is_history(self) -> bool:
        return self.result.startswith("new.")


class Decoder:
    """An exported model in a session.

    Attributes:
        metadata: what the graph says about itself.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: onnxruntime.SessionOptions | None = None,
    ):
        """Open a folder that `export_onnx` wrote.

        Args:
            providers: of onnxruntime, in the order of preference; "CUDAExecutionProvider" keeps the cache on
                the GPU.
            options: of the session.

        Raises:
            InputError: the folder holds no graph of this package.
            ConfigError: onnxruntime has none of the providers.
        """
        self.folder = Path(folder)
        path = self.folder / MODEL_FILE
        if not path.is_file():
            raise InputError(f"there is no {path}; name a folder that `rotatekv export-onnx` wrote.")
        missing = [p for p in providers if p not in onnxruntime.get_available_providers()]
        if missing:
            raise ConfigError(
                f"onnxruntime has no {', '.join(missing)}; it has "
                f"{', '.join(onnxruntime.get_available_providers())}. For a GPU install onnxruntime-gpu."
            )
        self._open(onnxruntime.InferenceSession(path, options, providers=list(providers)))

    @classmethod
    def of_session(cls, session: onnxruntime.InferenceSession, folder: str | Path) -> Decoder:
        """A decoder on a session that is open already.

        Raises:
            InputError: its graph is none of this package.
        """
        decoder = cls.__new__(cls)
        decoder.folder = Path(folder)
        decoder._open(session)
        return decoder

    def _open(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        found = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if found is None:
            raise InputError(
                f"the graph in {self.folder} was not exported by rotatekv_fx; export the model again."
            )
        self.metadata = Metadata.from_json(found)
        self.device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        self.fields = self._fields()

    def _fields(self) -> list[_Field]:
        outputs = {o.name for o in self.session.get_outputs()}
        fields = []
        for one in self.session.get_inputs():
            kind, _, rest = one.name.partition(".")
            if kind != "past":
                continue
            result = f"new.{rest}" if f"new.{rest}" in outputs else f"present.{rest}"
            shape = tuple(d if isinstance(d, int) else -1 for d in one.shape)
            sliding = self.metadata.sliding.get(rest.partition(".")[0], 0)
            read = max(1, sliding - 1 - self.metadata.window) if sliding else 0
            fields.append(_Field(one.name, result, _NUMPY[one.type], shape, read))
        return fields

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache.

        Args:
            batch: number of sequences.
            capacity: tokens of each sequence, at most.
        """
        return Cache(self, batch, capacity)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos: Sequence[int] | None = None,
        chunk: int = PREFILL_CHUNK,
    ) -> Iterator[np.ndarray]:
        """Continue a batch of prompts, which are padded on the left to one length.

        Args:
            prompts: token ids of each.
            max_new_tokens: of each sequence.
            temperature: of sampling; 0 takes the likeliest token.
            top_p: sample from the likeliest tokens that together have this probability.
            seed: of sampling.
            eos: token ids that end a sequence; the model's own if None.
            chunk: tokens of a prompt read in one step; sinks are chosen anew with each.

        Yields:
            int64 [B], a token of each sequence; after its end, the padding token. Stops when all have ended.

        Raises:
            InputError: there is no prompt, or an empty one.
            ConfigError: a number is out of range.
        """
        _check(prompts, max_new_tokens, temperature, top_p, chunk)
        ids, mask = _pad_left(prompts, self.metadata.pad)
        ends = np.asarray(self.metadata.eos if eos is None else eos, dtype=np.int64)
        cache = self.cache(len(prompts), ids.shape[1] + max_new_tokens)
        rng = np.random.default_rng(seed)
        for part in pieces(ids.shape[1], chunk):
            logits = cache.step(ids[:, part], mask[:, part])
        ended = np.zeros(len(prompts), dtype=bool)
        for index in range(max_new_tokens):
            tokens = _choose(logits[:, -1], temperature, top_p, rng)
            tokens = np.where(ended, self.metadata.pad, tokens)
            yield tokens
            ended |= np.isin(tokens, ends)
            if ended.all() or index + 1 == max_new_tokens:
                return
            logits = cache.step(tokens[:, None])

    def continue_texts(self, texts: Sequence[str], max_new_tokens: int, **settings: object) -> list[str]:
        """Continue texts with the tokenizer in the folder.

        Args:
            settings: as in `generate`.

        Raises:
            InputError: the folder holds no tokenizer.json.
        """
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"there is no {path}; export with a tokenizer, or pass token ids to generate().")
        tokenizer = Tokenizer.from_file(str(path))
        prompts = [tokenizer.encode(text).ids for text in texts]
        steps = list(self.generate(prompts, max_new_tokens, **settings))  # type: ignore[arg-type]
        return [tokenizer.decode(list(row), skip_special_tokens=True) for row in np.stack(steps, 1)]


class Cache:
    """The packed cache of a batch, in buffers of the session's device.

    Attributes:
        length: tokens of each sequence that went in, padding included.
    """

    def __init__(self, decoder: Decoder, batch: int, capacity: int):
        self.decoder, self.batch, self.capacity, self.length = decoder, batch, capacity, 0
        self.prompt_open = True
        self.mask = np.ones((batch, capacity), dtype=np.int64)
        self.window = decoder.metadata.window
        self._buffers = {
            f.past: [self._buffer(f) for _ in range(1 if f.is_history else 2)] for f in decoder.fields
        }
        self._binding = decoder.session.io_binding()

    @property
    def recent(self) -> int:
        """Exact tokens held."""
        return min(self.window, self.length)

    @property
    def history(self) -> int:
        """Tokens held as codes."""
        return self.length - self.recent

    @property
    def nbytes(self) -> int:
        """Bytes of the cache as it is filled, the mask that positions are counted in included."""
        total = 8 * self.batch * self.length
        for f in self.decoder.fields:
            total += _nbytes(f, self._shape(f, self.history, self.recent))
        return total

    def step(
        self, ids: np.ndarray, mask: np.ndarray | None = None, logits_at: Sequence[int] = (-1,)
    ) -> np.ndarray:
        """Put new tokens in and predict.

        Args:
            ids: int64 [B, S].
            mask: int64 [B, S], 0 for padding on the left of the prompt; None for none.
            logits_at: which of the new tokens to predict after.

        Returns:
            fp32 [B, len(logits_at), V].

        Raises:
            StateError: the tokens don't fit the cache.
        """
        new = ids.shape[1]
        if ids.shape[0] != self.batch or self.length + new > self.capacity:
            raise StateError(
                f"tokens {list(ids.shape)} do not fit a cache of {self.batch} sequences and {self.capacity} "
                f"tokens that holds {self.length}; make a larger one."
            )
        total = self.length + new
        if mask is not None:
            self.mask[:, self.length : total] = mask
        self._bind_numbers(ids, total, logits_at)
        staying = min(self.window, self.recent + new)
        leaving = self.recent + new - staying
        for f in self.decoder.fields:
            self._bind(f, leaving, staying)
        self._binding.bind_output("logits", "cpu")
        self.decoder.session.run_with_iobinding(self._binding)
        for f in self.decoder.fields:
            if not f.is_history:
                self._buffers[f.past].reverse()
        self.prompt_open = self.prompt_open and new > 1
        self.length = total
        return self._binding.get_outputs()[-1].numpy()

    def _bind_numbers(self, ids: np.ndarray, total: int, logits_at: Sequence[int]) -> None:
        places = np.asarray(logits_at, dtype=np.int64)
        numbers = {
            "input_ids": np.ascontiguousarray(ids, dtype=np.int64),
            "attention_mask": np.ascontiguousarray(self.mask[:, :total]),
            "logits_at": np.where(places < 0, places + ids.shape[1], places),
            "prompt": np.asarray(self.prompt_open),
        }
        for name, array in numbers.items():
            self._binding.bind_cpu_input(name, array)

    def _bind(self, f: _Field, leaving: int, staying: int) -> None:
        device = self.decoder.device
        past, *other = self._buffers[f.past]
        pointer, result = past.data_ptr(), (other[0] if other else past).data_ptr()
        held, made = self.history, leaving
        if f.is_history:
            row = _nbytes(f, self._shape(f, 1, 0))
            result = pointer + held * row
            skipped = max(0, held - f.sliding) if f.sliding else 0
            pointer, held = pointer + skipped * row, held - skipped
        shape = self._shape(f, held, self.recent)
        self._binding.bind_input(f.past, device, 0, f.dtype, shape, pointer)
        shape = self._shape(f, made, staying)
        self._binding.bind_output(f.result, device, 0, f.dtype, shape, result)

    def _shape(self, f: _Field, history: int, recent: int) -> tuple[int, ...]:
        """Sizes of a tensor; the first -1 of a history is its tokens, the second of a window's, its own."""
        sizes = [history, self.batch] if f.is_history else [self.batch, recent]
        it = iter(sizes)
        return tuple(next(it) if d < 0 else d for d in f.shape)

    def _buffer(self, f: _Field) -> onnxruntime.OrtValue:
        shape = self._shape(f, max(1, self.capacity - self.window), max(1, self.window))
        name = f.past.rpartition(".")[2]
        filled = np.full(shape, _EMPTY.get(name, 0), dtype=f.dtype)
        return onnxruntime.OrtValue.ortvalue_from_numpy(filled, self.decoder.device, 0)


def _nbytes(f: _Field, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(f.dtype).itemsize


def _pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(p) for p in prompts)
    ids = np.full((len(prompts), longest), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def pieces(length: int, chunk: int) -> list[slice]:
    """A prompt in pieces; the last is no single token, which would be none of the prompt's for the graph."""
    starts = list(range(0, length, chunk))
    if length > chunk > 2 and length - starts[-1] == 1:
        starts[-1] -= 1
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def _choose(logits: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> np.ndarray:
    """A token of each row of [B, V]."""
    if temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    order = np.argsort(-weights, -1, kind="stable")
    ranked = np.take_along_axis(weights, order, -1)
    ranked[np.cumsum(ranked, -1) - ranked >= top_p] = 0.0
    ranked /= ranked.sum(-1, keepdims=True)
    return np.array([rng.choice(row_order, p=row) for row_order, row in zip(order, ranked, strict=True)])


def _check(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float, chunk: int
) -> None:
    if not prompts:
        raise InputError("there are no prompts; give at least one.")
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise InputError(f"prompt {empty[0]} is empty; give at least one token each.")
    for name, number in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; use at least 1.")
    if temperature < 0.0:
        raise ConfigError(f"temperature is {temperature}; use at least 0, which is greedy.")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p is {top_p}; use a number above 0 and at most 1.")
