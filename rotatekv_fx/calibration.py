"""Calibration statistics as data: what recipes read, and the file they are kept in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rotatekv_fx.errors import CalibrationError
from rotatekv_fx.opaque import whole

FORMAT = "rotatekv-calibration-2"
_SAMPLES = 512  # values of each parameter that the fingerprint reads
# Entries of a config that differ between a model that was just made, saved or loaded.
_NOT_THE_MODEL = (
    *("dtype", "torch_dtype", "transformers_version", "_name_or_path", "_attn_implementation"),
    *("architectures", "quantization_config"),
)


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Sums over calibration tokens of one layer, float64, independent of any recipe. Hkv: all KV heads, also
    where tensor parallelism spreads them over processes.

    RoPE at position n turns channel c towards its partner c': (R_n x)_c = a_c(n) x_c + b_c(n) x_c' (a = 1, b
    = 0 where it turns nothing). The moments leave out each window's first tokens, where attention sinks live.

    Attributes:
        tokens, kept: [] tokens seen, and those in the moments.
        key_sum: [Hkv, D] sum of all tokens' keys before RoPE.
        key_norm, value_norm: [] largest L2 norm of one token's keys, values, all heads together.
        key_mean: [Hkv, D] mean of the kept keys before RoPE.
        key_second: [Hkv, D, D] sum of (R k)(R k)^T.
        key_a, key_b: [Hkv, D, D] sums of (R k) a^T and of (R k) b^T.
        turns: [3, D, D] sums of a a^T, a b^T and b b^T.
        partner: int64 [D], c' of each channel c.
        rope_error: [] largest relative error of that description of RoPE; past 1e-3 it is no linear map of
            pairs.
        query_second: [Hkv, D, D] sum of q q^T over tokens, mean over a KV head's queries after RoPE; 0 if
            unknown.
        value_sum: [Hkv, Dv]; value_second: [Hkv, Dv, Dv] sum of v v^T.
        value_weight: [Hkv, Dv, Dv] sum of Wo^T Wo over a KV head's query heads; the identity if unknown.
    """

    tokens: Tensor
    kept: Tensor
    key_sum: Tensor
    key_norm: Tensor
    value_norm: Tensor
    key_mean: Tensor
    key_second: Tensor
    key_a: Tensor
    key_b: Tensor
    turns: Tensor
    partner: Tensor
    rope_error: Tensor
    query_second: Tensor
    value_sum: Tensor
    value_second: Tensor
    value_weight: Tensor

    def of_heads(self, own: slice) -> LayerStatistics:
        """The same of some of the KV heads."""
        return dataclasses.replace(self, **{name: getattr(self, name)[own] for name in PER_HEAD})


# Statistics whose first axis is the KV heads.
PER_HEAD = (
    *("key_sum", "key_mean", "key_second", "key_a", "key_b"),
    *("query_second", "value_sum", "value_second", "value_weight"),
)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics of every layer, bound to the model that they were collected on.

    Attributes:
        layers: by layer index.
        fingerprint: of the model's weights and config.
        source: what the tokens were, for people.
    """

    layers: dict[int, LayerStatistics]
    fingerprint: str
    source: str

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a JSON header.

        Raises:
            CalibrationError: the file cannot be written.
        """
        tensors = {
            f"{index}.{field.name}": getattr(layer, field.name).contiguous()
            for index, layer in self.layers.items()
            for field in dataclasses.fields(layer)
        }
        header = {"format": FORMAT, "fingerprint": self.fingerprint, "source": self.source}
        header["digest"] = _digest(tensors, header)
        try:
            save_file(tensors, str(path), metadata={"rotatekv": json.dumps(header)})
        except (OSError, SafetensorError) as error:
            raise CalibrationError(
                f"calibration file {path} cannot be written; give a file in a folder that can: {error}"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file written by `save`.

        Raises:
            CalibrationError: it is missing, damaged, or not a calibration file.
        """
        if not Path(path).is_file():
            fault = "is a folder" if Path(path).is_dir() else "does not exist"
            raise CalibrationError(f"calibration file {path} {fault}; write one with `rotatekv calibrate`.")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("rotatekv", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise CalibrationError(f"calibration file {path} is damaged: {error}; write it again.") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise CalibrationError(
                f"{path} is no calibration file of this version ({FORMAT}); write it again."
            )
        if header.pop("digest", None) != _digest(tensors, header):
            raise CalibrationError(
                f"calibration file {path} was changed after it was written; write it again."
            )
        fields = {f.name for f in dataclasses.fields(LayerStatistics)}
        grouped: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, field = name.partition(".")
            if not index.isdecimal():
                raise CalibrationError(f"calibration file {path} is damaged at {name!r}; write it again.")
            grouped.setdefault(int(index), {})[field] = tensor
        for index, layer in grouped.items():
            if set(layer) != fields or not all(bool(t.isfinite().all()) for t in layer.values()):
                raise CalibrationError(
                    f"calibration file {path} is damaged at layer {index}; write it again."
                )
        if not all(isinstance(header.get(name), str) for name in ("fingerprint", "source")):
            raise CalibrationError(f"calibration file {path} does not say what it is of; write it again.")
        layers = {index: LayerStatistics(**layer) for index, layer in sorted(grouped.items())}
        return cls(layers, header["fingerprint"], header["source"])

    def check(self, model: nn.Module) -> None:
        """Refuse to serve another model.

        Raises:
            CalibrationError: the fingerprints differ.
        """
        found = model_fingerprint(model)
        if found != self.fingerprint:
            raise CalibrationError(
                f"the calibration belongs to another model (fingerprint {self.fingerprint}, this model's is "
                f"{found}); calibrate this model."
            )


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Hash of a calibration file's tensors and of the rest of its header."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# Exact tokens of an fp32 model go to fp16 if this many times the calibrated norm still fits.
_FP16_MARGIN = 4.0


def exact_dtype(dtype: torch.dtype, statistics: LayerStatistics | None) -> torch.dtype:
    """What exact tokens (sinks, recent window) of a model of some dtype are kept in: 16 bits wide."""
    if dtype.itemsize <= 2:
        return dtype
    norm = max(float(statistics.key_norm), float(statistics.value_norm)) if statistics is not None else 0.0
    return torch.float16 if norm * _FP16_MARGIN < torch.finfo(torch.float16).max else torch.bfloat16


def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's config and of samples of every parameter, as bfloat16 so that dtypes agree.

    A tensor-parallel model has the fingerprint of the whole one; its processes compute it together.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(_sample(parameter))
    return digest.hexdigest()[:16]


def _sample(parameter: Tensor) -> Any:
    flat = whole(parameter).reshape(-1)
    stride = max(1, flat.numel() // _SAMPLES)
    return flat[::stride].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
