"""Which architectures of the installed transformers work: a table, made by running a tiny model of each.

    python -m benchmarks.compatibility --out benchmarks/results --docs docs/compatibility.md

Every model is transformed with recipe `none`, whose tokens must be the untransformed model's, and at 8 bits,
whose logits must be close. Takes about 10 minutes on one core; --only looks at some architectures and keeps
the other rows of the last run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
import re
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import rotatekv_fx
from benchmarks import tiny_models
from rotatekv_fx import RotateKVConfig
from rotatekv_fx.errors import MatchError, RotateKVError
from rotatekv_fx.naming import cache_argument, cache_of

PROMPT, NEW = 20, 10
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
PADDING = (0, 5, 13)
MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "chunked": {"prefill_chunk_size": 7},
    "padded": {},
}
# Tokens leave the window within the prompt, so that codes are read.
PACKED = {"key_bits": 8, "value_bits": 8, "window": 4, "slack": 2, "sinks": 2}
# Relative error of a token's logits, for the median token: 8-bit codes add about 1%. Routers turn the
# rounding of single tokens into other experts, so that the RMS over all tokens may be larger.
CLOSE_AT_8_BITS, CLOSE_OVERALL = 0.02, 0.2
CLOSE_IN_16_BIT = 0.02
STATUSES = {
    "works": "every check passed",
    "partly": "every check passed; some attention layers stay in 16 bit",
    "refused": "an error with a reason, before anything is changed",
    "not built": "AutoModelForCausalLM builds no model of it from a config, or that model does not run",
    "wrong": "a check failed",
}


@dataclasses.dataclass
class Row:
    """What was found about one architecture.

    Attributes:
        status: one of STATUSES.
        reasons: why it is refused, why layers are, or which check failed.
        layers: kinds of the layers of its cache, in order.
        matched, rejected: attention modules.
        attention: "attend" or "inline", of the matched ones.
        tokens: by mode: "equal", "different", or why the untransformed model itself cannot.
        packed: recipe, window and relative errors of the logits at 8 bits, and refusals of other recipes.
        dtypes: by dtype: relative errors of the logits of recipe `none` against the untransformed model, and
            of that one against fp32 (rounding).
    """

    architecture: str
    status: str = "works"
    reasons: list[str] = dataclasses.field(default_factory=list)
    model: str = ""
    layers: list[str] = dataclasses.field(default_factory=list)
    matched: int = 0
    rejected: int = 0
    attention: list[str] = dataclasses.field(default_factory=list)
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    packed: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def check(architecture: str, dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float16)) -> Row:
    """Run every check on a tiny model of an architecture."""
    start, row = time.perf_counter(), Row(architecture)
    try:
        _check(row, tuple(dtypes))
    except Exception as error:  # whatever it is: it should have been refused
        row.status, row.reasons = "wrong", [f"breaks: {_first_line(error)}"]
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _check(row: Row, dtypes: tuple[torch.dtype, ...]) -> None:
    try:
        model = tiny_models.build(row.architecture)
        row.model = type(model).__name__
        row.layers = _layer_kinds(copy.deepcopy(model))
    except Exception as error:  # config classes and models raise whatever they like
        row.status, row.reasons = "not built", [_first_line(error)]
        return
    original = copy.deepcopy(model)
    try:
        exact = _transformed(model, row, RotateKVConfig(recipe="none"))
    except RotateKVError as error:
        row.status, row.reasons = "refused", str(error).splitlines()
        return
    for mode in MODES:
        row.tokens[mode] = _same_tokens(original, exact, mode)
    row.packed = _packed(original, row)
    for dtype in dtypes:
        row.dtypes[str(dtype).removeprefix("torch.")] = _in_dtype(original, dtype)
    failures = [f"tokens differ: {mode}" for mode, found in row.tokens.items() if found == "different"]
    if not (row.packed["error"] <= CLOSE_AT_8_BITS and row.packed["overall"] <= CLOSE_OVERALL):
        failures.append(f"8-bit logits: error {row.packed['error']:.3f}, overall {row.packed['overall']:.3f}")
    for name, found in row.dtypes.items():
        if not found["error"] <= max(CLOSE_IN_16_BIT, 2 * found["rounding"]):
            failures.append(f"{name} logits: error {found['error']:.3f}")
    if failures:
        row.status, row.reasons = "wrong", failures


def _transformed(model: PreTrainedModel, row: Row, config: RotateKVConfig) -> PreTrainedModel:
    """Transform all layers, or those that match, and note what was found."""
    try:
        rotatekv_fx.transform(model, config)
    except MatchError as error:
        rotatekv_fx.transform(model, dataclasses.replace(config, allow_partial=True))
        row.status, row.reasons = "partly", str(error).splitlines()[1:]
    found = rotatekv_fx.report(model)
    row.matched, row.rejected = len(found.sites), len(found.rejections)
    row.attention = sorted({site.attention for site in found.sites})
    return model


def _layer_kinds(model: PreTrainedModel) -> list[str]:
    """Kinds of the cache's layers after a forward; [] where the model has no such cache."""
    output = (
        model(_prompt(padding=()), use_cache=True)
        if "use_cache" in _takes(model)
        else model(_prompt(padding=()))
    )
    cache = cache_of(output)
    return [type(layer).__name__ for layer in getattr(cache, "layers", [])]


def _takes(model: PreTrainedModel) -> Iterable[str]:
    return type(model).forward.__code__.co_varnames


def _prompt(padding: tuple[int, ...] = PADDING) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny_models.VOCABULARY, (len(PADDING), PROMPT), generator=generator)
    for sequence, pad in enumerate(padding):
        ids[sequence, :pad] = 0
    return ids


def _generate(model: PreTrainedModel, mode: str) -> Tensor:
    ids = _prompt(PADDING if mode == "padded" else ())
    return model.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=NEW, do_sample=False, **MODES[mode]
    )


def _same_tokens(original: PreTrainedModel, transformed: PreTrainedModel, mode: str) -> str:
    try:
        expected = _generate(original, mode)
    except Exception as error:  # the untransformed model's own limit
        return f"not in transformers: {_first_line(error)}"
    return "equal" if torch.equal(_generate(transformed, mode), expected) else "different"


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Logits of the real tokens of a padded batch: 12 at once on an empty cache, then 3, then one by one."""
    ids, pieces = _prompt(), []
    mask = (ids != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    named = {"position_ids": positions} if "position_ids" in _takes(model) else {}
    cache = DynamicCache(config=model.config)
    for start, stop in ((0, 12), (12, 15), *((i, i + 1) for i in range(15, PROMPT))):
        output = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            **{cache_argument(model): cache},
            use_cache=True,
            **{name: tensor[:, start:stop] for name, tensor in named.items()},
        )
        pieces.append(output.logits)
    return torch.cat(pieces, 1)[mask.bool()].float()


def _errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Relative errors of logits [N, V]: of the median token, and RMS over all tokens."""
    difference = found - expected
    median = (difference.norm(dim=-1) / expected.norm(dim=-1)).median()
    return {"error": float(median), "overall": float(difference.norm() / expected.norm())}


def _packed(original: PreTrainedModel, row: Row) -> dict[str, Any]:
    """The default recipe at 8 bits, or where it is refused the one that its message names."""
    refusals = []
    calibration = rotatekv_fx.calibrate(
        original, _prompt(padding=()).split(1), progress=lambda done, total: None
    )
    for recipe, changes in (("centered", {}), ("centered", {"window": 0}), ("paper", {"window": 0})):
        config = RotateKVConfig(recipe=recipe, allow_partial=bool(row.rejected), **{**PACKED, **changes})
        try:
            packed = rotatekv_fx.transform(copy.deepcopy(original), config, calibration)
        except MatchError as error:
            refusals.append(str(error).splitlines()[1].strip())
            continue
        errors = _errors(_logits(packed), _logits(original))
        return {"recipe": recipe, "window": config.window, **errors, "refusals": refusals}
    raise MatchError("\n".join(refusals))


def _in_dtype(original: PreTrainedModel, dtype: torch.dtype) -> dict[str, float]:
    exact, model = _logits(original), copy.deepcopy(original).to(dtype)
    own = _logits(model)
    rotatekv_fx.transform(model, RotateKVConfig(recipe="none", allow_partial=True))
    return {**_errors(_logits(model), own), "rounding": _errors(own, exact)["error"]}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def table(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The rows as a page of Markdown."""
    counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
    lines = [
        "# Compatibility",
        "",
        "Made by `python -m benchmarks.compatibility` with "
        f"transformers {versions['transformers']} and torch {versions['torch']}, on a CPU: a tiny model with "
        "random weights of each architecture that `AutoModelForCausalLM` knows.",
        "",
        *(f"* {counts[status]} **{status}**: {meaning}" for status, meaning in STATUSES.items()),
        "",
        f"Tokens: recipe `none` gives the untransformed model's {NEW} greedy tokens after prompts "
        f"of {PROMPT}, on dynamic and static caches, in a search of 3 beams, with a prefill in "
        "chunks, and on a batch with padding on the left (-: the untransformed model cannot). 8 "
        "bits: relative error of a token's logits, the median, most of them read one by one from "
        "the packed cache, with a window of 4 tokens except where the notes say otherwise. bf16, "
        "fp16: the same error of recipe `none` against the untransformed model in that dtype.",
        "",
        "| architecture | status | layers | attention | "
        + " | ".join(MODES)
        + " | 8 bits | bf16 | fp16 | notes |",
        "|---" * (8 + len(MODES)) + "|",
    ]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def refusals(rows: list[dict[str, Any]]) -> str:
    """Architectures that are not transformed, or only in part, by reason: a Markdown table."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] in ("refused", "partly"):
            *_, last = row["reasons"]
            reason = re.sub(
                r" \[node .*\]|: it is not .*|; transform\(\) takes .*", "", last.partition("): ")[2] or last
            )
            reason = re.sub(r"position_embeddings(_\d, position_embeddings_\d)?", "positions", reason)
            reason = reason.replace(row["model"], "the model").replace("|", "/").strip()
            part = " (those layers)" if row["status"] == "partly" else ""
            by_reason.setdefault(reason, []).append(f"{row['architecture']}{part}")
    lines = [f"| {', '.join(names)} | {reason} |" for reason, names in sorted(by_reason.items())]
    return "\n".join(["| architectures | reason |", "|---|---|", *lines]) + "\n"


def _line(row: dict[str, Any]) -> str:
    signs = {"equal": "✓", "different": "✗"}
    tokens = [signs.get(row["tokens"].get(mode, ""), "-") if row["tokens"] else "" for mode in MODES]
    layers = f"{row['matched']} of {row['matched'] + row['rejected']}" if row["matched"] else ""
    error = f"{row['packed']['error']:.4f}" if row["packed"] else ""
    dtypes = [
        f"{row['dtypes'][d]['error']:.4f}" if d in row["dtypes"] else "" for d in ("bfloat16", "float16")
    ]
    cells = [row["architecture"], row["status"], layers, ", ".join(row["attention"]), *tokens, error, *dtypes]
    return "| " + " | ".join([*cells, _notes(row)]) + " |"


def _notes(row: dict[str, Any]) -> str:
    """Distinct reasons, without the numbers of the layers they are about."""
    reasons = [reason.partition("): ")[2] or reason for reason in row["reasons"]]
    if row["packed"] and (row["packed"]["recipe"], row["packed"]["window"]) != ("centered", PACKED["window"]):
        reasons += [f"8 bits with recipe {row['packed']['recipe']}, window {row['packed']['window']}"]
        reasons += [reason.partition("): ")[2] for reason in row["packed"]["refusals"]]
    return "; ".join(dict.fromkeys(reason.strip().replace("|", "/") for reason in reasons))


def main(
    out: Annotated[Path, typer.Option(help="folder that receives compatibility.json and compatibility.md")],
    only: Annotated[
        list[str] | None, typer.Option(help="an architecture; may be given several times")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="page whose list of refusals is brought up to date")
    ] = None,
) -> None:
    """Check every architecture, and write the table."""
    if unknown := set(only or ()) - set(tiny_models.architectures()):
        raise typer.BadParameter(f"transformers has no architecture {', '.join(sorted(unknown))}.")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    found = _last_run(out, versions) if only else {}
    for architecture in only or tiny_models.architectures():
        row = found[architecture] = dataclasses.asdict(check(architecture))
        print(f"{architecture}: {row['status']} {row['seconds']} s {'; '.join(row['reasons'])}", flush=True)
    rows = [found[name] for name in tiny_models.architectures() if name in found]
    text = json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n"
    (out / "compatibility.json").write_text(text, encoding="utf-8")
    (out / "compatibility.md").write_text(table(rows, versions), encoding="utf-8")
    if docs is not None:
        before, _, rest = docs.read_text(encoding="utf-8").partition(BEGIN)
        docs.write_text(
            f"{before}{BEGIN}\n\n{refusals(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )
    raise typer.Exit(int(any(row["status"] == "wrong" for row in rows)))


def _last_run(folder: Path, versions: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Rows by architecture of a run with the same versions."""
    file = folder / "compatibility.json"
    last = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"versions": None}
    return {row["architecture"]: row for row in last["rows"]} if last["versions"] == versions else {}


if __name__ == "__main__":
    typer.run(main)
