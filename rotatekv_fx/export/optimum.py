"""Optimum's decoder class on a graph with a packed cache.

`ORTModelForCausalLM` opens the graph, and cannot run it: it fills inputs named input_ids, attention_mask,
position_ids and past_key_values.*, the latter with floats of shape [B, Hkv, N, D] that each step returns
longer. A packed layer has a dozen tensors of other types and shapes, of which a step returns new rows only.
So this class keeps what Optimum does around the graph (files, sessions, providers, `generate`) and replaces
the forward.

For an environment of its own: optimum-onnx 0.1 needs transformers below 4.58, and this package 5.17, for all
but the modules of the graph's runtime, which need neither.
"""

from __future__ import annotations

from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from rotatekv_fx.export.generation import PREFILL_CHUNK, Cache, Decoder, pieces


class PackedModelForCausalLM(ORTModelForCausalLM):
    """`PackedModelForCausalLM.from_pretrained(folder).generate(...)`: greedy or sampled, not with beams.

    Attributes:
        capacity: tokens a cache is made for.
    """

    capacity = 4096

    @property
    def decoder(self) -> Decoder:
        """The graph's runtime on Optimum's session."""
        if not hasattr(self, "_decoder"):
            self._decoder = Decoder.of_session(self.session, self.model_save_dir or self.path.parent)
        return self._decoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, 1, V] after the last token, and the cache, which is updated in place.

        Args:
            input_ids: [B, S], new tokens.
            attention_mask: [B, T], 0 for padding on the left; None for none.
        """
        batch, new = input_ids.shape
        cache = past_key_values or self.decoder.cache(batch, self.capacity)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -new:]
        for part in pieces(new, PREFILL_CHUNK):
            logits = cache.step(input_ids[:, part].cpu().numpy(), mask[:, part].cpu().numpy())
        return CausalLMOutputWithPast(
            logits=torch.from_numpy(logits).to(input_ids.device), past_key_values=cache
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The tokens that the cache does not hold."""
        packed = past_key_values if isinstance(past_key_values, Cache) else None
        held = 0 if packed is None else packed.length
        return {
            "input_ids": input_ids[:, held:],
            "attention_mask": kwargs.get("attention_mask"),
            "past_key_values": packed,
        }
