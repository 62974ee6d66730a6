"""Where an evaluation's calibration comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx import Calibration, calibrate
from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate.text import cut_windows, encode, read_text, start_tokens

CALIBRATION_WINDOWS = 12
CALIBRATION_CONTEXT = 1024


@dataclasses.dataclass(frozen=True)
class CalibrationSource:
    """Saved statistics, a text, or neither: then the model writes the text itself.

    Attributes:
        saved: statistics loaded from a file.
        text: what to calibrate on.
        origin: where this comes from, for the figures: {"source": "file" | "text" | "self-generated", ...}.
    """

    saved: Calibration | None
    text: str | None
    origin: dict[str, Any]

    @classmethod
    def open(cls, file: Path | None = None, text: Path | None = None) -> CalibrationSource:
        """Read what the user named, so that mistakes show before the long work.

        Raises:
            InputError: both were given, or the text cannot be used.
            CalibrationError: the saved statistics cannot be used.
        """
        if file is not None and text is not None:
            raise InputError("Calibration was given as statistics and as a text; give one of the two.")
        if file is not None:
            return cls(Calibration.load(file), None, {"source": "file", "file": str(file)})
        if text is not None:
            return cls(None, read_text(text), {"source": "text", "file": str(text)})
        return cls(None, None, {"source": "self-generated"})

    def collect(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: int = CALIBRATION_CONTEXT,
        windows: int = CALIBRATION_WINDOWS,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Calibration, dict[str, Any]]:
        """The statistics and their origin. Of a text, the first `windows` windows of `context` are read.

        Raises:
            InputError: the text does not fill one window.
            CalibrationError: the statistics do not fit the model.
        """
        if self.saved is not None:
            return self.saved, self.origin
        if self.text is None:
            return calibrate(model, progress=progress), self.origin
        cut = cut_windows(encode(tokenizer, self.text), context, start_tokens(tokenizer))[:windows]
        origin = {**self.origin, "context": context, "windows": len(cut)}
        return calibrate(model, cut, progress=progress), origin
