"""Other methods' caches, for untransformed models, measured as the packed cache is.

KIVI (arXiv 2402.02750): keys per channel in groups of tokens, values per token in groups of channels, a scale
and a minimum each group, and recent tokens exact. QuantizedCache is transformers' own, with HQQ or quanto.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, QuantizedCache
from transformers.cache_utils import DynamicLayer

from rotatekv_fx.cache.codec import Codec, Parts, as_exact
from rotatekv_fx.errors import ConfigError, InputError, StateError
from rotatekv_fx.evaluate.memory import KVShape, cache_elements
from rotatekv_fx.evaluate.perplexity import WindowScore, means, score
from rotatekv_fx.naming import cache_argument
from rotatekv_fx.recipes import Quantizer

MakeCache = Callable[[], Cache]


class KiviLayer(DynamicLayer):
    """KIVI, section 3: complete groups of tokens as codes, the rest exact in 16 bit.

    Keys: tokens become codes `block` at a time (the residual, or one group where there is none), each channel
    of each `group` tokens with its own scale and minimum. Values: all but the last `residual` tokens are
    codes, `group` channels sharing a scale and a minimum. A step's tokens are stored before they are read, so
    that every query reads codes, its own prompt's too, where KIVI would read a prompt exactly.
    """

    is_croppable = False

    def __init__(self, bits: int, group: int, residual: int):
        """
        Raises:
            ConfigError: the residual is no multiple of the group.
        """
        super().__init__()
        if residual % group:
            raise ConfigError(f"residual is {residual}; use a multiple of the group size {group}, or 0.")
        self.quantizer = Quantizer(bits, group, 1.0, "midpoint")
        self.residual, self.block, self.length = residual, residual or group, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """`keys` and `values` of the base class hold the exact tokens, [B, H, r, D]."""
        heads, dim = key_states.shape[1], key_states.shape[3]
        exact = key_states.dtype if key_states.dtype.itemsize == 2 else torch.float16
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[:, :, :0].to(exact)
        self.values = value_states[:, :, :0].to(exact)
        self.key_codec = Codec(self.quantizer, heads * dim, self.dtype)
        self.value_codec = Codec(self.quantizer, heads, self.dtype)
        self.old_keys: Parts = ()
        self.old_values: Parts = ()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens [B, H, S, D] and return every token as it is stored, [B, H, N, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat([self.keys, as_exact(key_states, self.keys.dtype)], 2)
        values = torch.cat([self.values, as_exact(value_states, self.values.dtype)], 2)
        coded_keys = keys.shape[2] // self.block * self.block
        coded_values = max(0, values.shape[2] - self.residual)
        if coded_keys:
            new = self.key_codec.encode(self._by_channel(keys[:, :, :coded_keys]))
            self.old_keys = _joined(self.old_keys, new)
        if coded_values:
            new = self.value_codec.encode(values[:, :, :coded_values])
            self.old_values = _joined(self.old_values, new)
        self.keys, self.values = keys[:, :, coded_keys:].clone(), values[:, :, coded_values:].clone()
        self.length += key_states.shape[2]
        heads = key_states.shape[1]
        read_keys, read_values = [self.keys.to(self.dtype)], [self.values.to(self.dtype)]
        if self.old_keys:
            read_keys.insert(0, self._by_token(self.key_codec.decode(self.old_keys), heads))
        if self.old_values:
            read_values.insert(0, self.value_codec.decode(self.old_values))
        return torch.cat(read_keys, 2), torch.cat(read_values, 2)

    def _by_channel(self, keys: Tensor) -> Tensor:
        """[B, H, m g, D] -> [B, H D, m, g]: a channel's g tokens side by side."""
        return keys.unflatten(2, (-1, self.quantizer.group)).permute(0, 1, 4, 2, 3).flatten(1, 2)

    def _by_token(self, groups: Tensor, heads: int) -> Tensor:
        """The inverse of `_by_channel`."""
        return groups.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2).flatten(2, 3)

    def get_seq_length(self) -> int:
        return self.length

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise StateError("a KIVI cache serves comparisons only: no beams, crops or resets; make a new cache.")

    reorder_cache = crop = reset = batch_repeat_interleave = batch_select_indices = _refuse


def _joined(old: Parts, new: Parts) -> Parts:
    """Stored tensors one behind the other, without room to spare, which would count as bytes."""
    return tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True)) if old else new


def kivi_cache(model: PreTrainedModel, bits: int = 2, group: int = 32, residual: int = 0) -> Cache:
    """An empty KIVI cache for an untransformed model; pass it as its cache.

    Args:
        bits: of a code.
        group: tokens (keys) or channels (values) that share a scale and a minimum.
        residual: recent tokens kept exact, a multiple of `group`.

    Raises:
        ConfigError: the residual is no multiple of the group.
        InputError: the model has layers with other than full attention.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise InputError(f"KIVI's cache serves full attention only, and this model has {sorted(kinds)}.")
    return Cache(layers=[KiviLayer(bits, group, residual) for _ in range(config.num_hidden_layers)])


def quantized_cache(
    model: PreTrainedModel, backend: str = "hqq", bits: int = 2, group: int = 64, residual: int = 128
) -> QuantizedCache:
    """An empty QuantizedCache of transformers. It reads a step exactly, and earlier ones from its codes.

    Args:
        backend: "hqq" or "quanto". Groups lie along the axis that transformers recommends for it: 1 for HQQ,
            consecutive channels of a head and token; 0 for quanto.
        bits: of a code: 2, 3 (HQQ alone), 4 or 8.
        group: numbers that share a scale and a zero.
        residual: recent tokens kept exact, at most.

    Raises:
        InputError: the backend is not installed, or refuses these settings.
    """
    axis = 1 if backend == "hqq" else 0
    try:
        return QuantizedCache(
            backend,
            model.config,
            nbits=bits,
            axis_key=axis,
            axis_value=axis,
            q_group_size=group,
            residual_length=residual,
        )
    except (ImportError, ValueError) as error:
        package = {"quanto": "optimum-quanto"}.get(backend, "'rotatekv-fx[baselines]'")
        raise InputError(
            f"transformers' QuantizedCache cannot use backend {backend!r} ({error}); pip install {package}, "
            "and choose hqq or quanto."
        ) from error


@torch.inference_mode()
def evaluate_caches(
    model: PreTrainedModel,
    makers: Mapping[str, MakeCache],
    windows: Sequence[Tensor],
    sites: Iterable[KVShape],
    step: int | None = None,
    batch: int = 4,
) -> list[dict[str, Any]]:
    """Score caches that an untransformed model runs on, as `evaluate` scores transformed models.

    Args:
        makers: by name, what makes an empty cache.
        windows: ids [1, T], all of one length.
        sites: attention sites, which size the elements that bytes are counted against.
        step: tokens fed at a time; None feeds a window at once. A cache whose recent tokens are exact is
            measured with 1, as in decoding, since all queries of one forward read the same keys.
        batch: windows at a time.

    Returns:
        A row for each cache, with the columns of `evaluate`'s rows.
    """
    scores: dict[str, list[WindowScore]] = {name: [] for name in makers}
    bits: dict[str, list[float]] = {name: [] for name in makers}
    seconds = dict.fromkeys(makers, 0.0)
    sites, context = list(sites), windows[0].shape[1]
    for first in range(0, len(windows), batch):
        ids = torch.cat(list(windows[first : first + batch])).to(model.device)
        reference = model(input_ids=ids).logits[:, :-1].float()
        for name, make in makers.items():
            begin, cache, named = time.perf_counter(), make(), cache_argument(model)
            pieces = ids.split(step or context, 1)
            logits = torch.cat([model(input_ids=piece, **{named: cache}).logits for piece in pieces], 1)
            pairs = zip(reference, logits[:, :-1].float(), ids[:, 1:], strict=True)
            scores[name] += [score(*pair) for pair in pairs]
            bits[name] += [8 * held_nbytes(cache) / cache_elements(sites, context, len(ids))] * len(ids)
            seconds[name] += time.perf_counter() - begin
    return [
        {
            "recipe": name,
            "step": step,
            "bits_per_element": sum(bits[name]) / len(bits[name]),
            **means(scores[name]),
            "tokens": len(windows) * (context - 1),
            "seconds": seconds[name],
        }
        for name in makers
    ]


def held_nbytes(cache: Cache) -> int:
    """Bytes of every tensor that a cache's layers hold, in whatever containers and subclasses.

    Wider floating-point numbers count as 16 bits: QuantizedCache keeps scales and recent tokens in the
    model's dtype, which is float32 for figures and would not be in use.
    """
    storages = {}
    for tensor in _tensors_in([vars(layer) for layer in cache.layers]):
        storage = tensor.untyped_storage()
        width = max(1, tensor.itemsize // 2) if tensor.is_floating_point() else 1
        storages[storage.data_ptr()] = storage.nbytes() // width
    return sum(storages.values())


def _tensors_in(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is None:
            yield value
        else:
            yield from _tensors_in([getattr(value, name) for name in inner()[0]])
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors_in(one)
