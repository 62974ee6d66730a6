"""The untransformed model as an ordinary ONNX decoder: fp32 keys and values, past in and present out.

What the packed graph is measured against. `python -m benchmarks.onnx_speed` runs both.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rotatekv_fx.naming import cache_argument


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.named_cache = model, cache_argument(model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_at: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache(config=self.model.config)
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            **{self.named_cache: cache},
            logits_to_keep=logits_at,
            use_cache=True,
        )
        return output.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))


def export_baseline(model: nn.Module, path: Path) -> None:
    """Write the graph of an untransformed model."""
    config = model.config
    heads, dim = config.num_key_value_heads, config.head_dim
    any_size = torch.export.Dim.DYNAMIC
    count = 2 * config.num_hidden_layers
    names = [f"{side}.{layer}" for layer in range(config.num_hidden_layers) for side in ("key", "value")]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Decoder(model).eval(),
            (),
            path,
            kwargs={
                "input_ids": torch.ones(2, 5, dtype=torch.int64),
                "attention_mask": torch.ones(2, 12, dtype=torch.int64),
                "logits_at": torch.tensor([0, 2, 4]),
                "past": [torch.zeros(2, heads, 7, dim) for _ in range(count)],
            },
            dynamic_shapes={
                "input_ids": {0: any_size, 1: any_size},
                "attention_mask": {0: any_size, 1: any_size},
                "logits_at": {0: any_size},
                "past": [{0: any_size, 2: any_size}] * count,
            },
            input_names=["input_ids", "attention_mask", "logits_at", *(f"past.{n}" for n in names)],
            output_names=["logits", *(f"present.{n}" for n in names)],
            opset_version=23,
            dynamo=True,
            external_data=False,
        )


class Baseline:
    """A session of that graph with one sequence; two sets of buffers take turns, as past and as present."""

    def __init__(self, session: onnxruntime.InferenceSession, capacity: int):
        self.session = session
        self.layers = [i.name.removeprefix("past.") for i in self.session.get_inputs() if "past." in i.name]
        shape = [d if isinstance(d, int) else 0 for d in self.session.get_inputs()[-1].shape]
        self.heads, self.dim, self.length = shape[1], shape[3], 0
        self.binding = self.session.io_binding()
        self.buffers = [
            {n: np.zeros((1, self.heads, capacity, self.dim), np.float32) for n in self.layers}
            for _ in range(2)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, in fp32."""
        return 4 * len(self.layers) * self.heads * self.dim * self.length

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Put tokens [1, S] in; logits [1, 1, V] after the last."""
        total = self.length + ids.shape[1]
        self.binding.bind_cpu_input("input_ids", ids)
        self.binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        self.binding.bind_cpu_input("logits_at", np.array([ids.shape[1] - 1]))
        past, present = self.buffers
        for name in self.layers:
            for put, kind, buffer, tokens in (
                (self.binding.bind_input, "past", past[name], self.length),
                (self.binding.bind_output, "present", present[name], total),
            ):
                shape = (1, self.heads, tokens, self.dim)
                put(f"{kind}.{name}", "cpu", 0, np.float32, shape, buffer.ctypes.data)
        self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
        self.buffers.reverse()
        self.length = total
        return self.binding.get_outputs()[-1].numpy()
