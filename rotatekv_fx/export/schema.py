"""How an exported folder describes itself: names of files and tensors, and the graph's metadata. No torch."""

from __future__ import annotations

import dataclasses
import json

from rotatekv_fx.errors import InputError

MODEL_FILE = "model.onnx"
METADATA_KEY = "rotatekv"
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the graph's metadata says, under METADATA_KEY as JSON.

    Attributes:
        recipe, key_bits, value_bits: how the cache is stored.
        window: recent tokens kept exact.
        sinks: exact tokens of the prompt, at most.
        sliding: by layer, the sliding window of the model's own attention, where it has one.
        eos, pad: token ids.
        opset: of the graph.
        versions: of the packages that made it.
    """

    recipe: str
    key_bits: int
    value_bits: int
    window: int
    sinks: int
    sliding: dict[str, int]
    eos: list[int]
    pad: int
    opset: int
    versions: dict[str, str]
    format: int = FORMAT

    def to_json(self) -> str:
        """As text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Metadata:
        """From text.

        Raises:
            InputError: it was written by another version of the package, or by something else.
        """
        fields = json.loads(text)
        if fields.get("format") != FORMAT:
            raise InputError(
                f"the graph's metadata has format {fields.get('format')}, this package reads {FORMAT}; "
                "export the model again, or use the version that did."
            )
        return cls(**fields)


def past_name(layer: str, tensor: str) -> str:
    """Name of a graph input: a tensor of a layer's cache before the step."""
    return f"past.{layer}.{tensor}"


def result_name(layer: str, tensor: str, is_history: bool) -> str:
    """Name of a graph output: new rows of the history, or a tensor after the step."""
    return f"{'new' if is_history else 'present'}.{layer}.{tensor}"
