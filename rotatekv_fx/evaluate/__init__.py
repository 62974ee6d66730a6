"""Measuring a transformed model against the one it was made of: what it predicts and what its cache holds."""

from rotatekv_fx.evaluate.continuation import continue_greedily
from rotatekv_fx.evaluate.loading import DTYPES, check_context, load_model, load_tokenizer
from rotatekv_fx.evaluate.memory import bits_per_element, cache_elements, sixteen_bit_nbytes
from rotatekv_fx.evaluate.perplexity import WindowScore, evaluate, score
from rotatekv_fx.evaluate.statistics import CALIBRATION_CONTEXT, CALIBRATION_WINDOWS, CalibrationSource
from rotatekv_fx.evaluate.tables import comparison_table, side_by_side, tasks_table
from rotatekv_fx.evaluate.text import cut_windows, encode, read_text, start_tokens

__all__ = [
    "CALIBRATION_CONTEXT",
    "CALIBRATION_WINDOWS",
    "DTYPES",
    "CalibrationSource",
    "WindowScore",
    "bits_per_element",
    "cache_elements",
    "check_context",
    "comparison_table",
    "continue_greedily",
    "cut_windows",
    "encode",
    "evaluate",
    "load_model",
    "load_tokenizer",
    "read_text",
    "score",
    "side_by_side",
    "sixteen_bit_nbytes",
    "start_tokens",
    "tasks_table",
]
