"""The order of the passes, checked and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import fx

from rotatekv_fx.errors import PassOrderError
from rotatekv_fx.passes.base import Pass, Rewrite
from rotatekv_fx.passes.cleanup import cleanup
from rotatekv_fx.passes.fuse_attention import fuse_attention
from rotatekv_fx.passes.insert_quantization import insert_quantization
from rotatekv_fx.passes.insert_rotation import insert_rotation
from rotatekv_fx.passes.keep_window import keep_window
from rotatekv_fx.passes.lower_attention import lower_attention, lower_without_cache
from rotatekv_fx.passes.preserve_sinks import preserve_sinks

# `normalize` runs first, on every capture, before sites are looked for.
INSERT = (
    Pass("insert_rotation", (), insert_rotation),
    Pass("insert_quantization", ("insert_rotation",), insert_quantization),
    Pass("preserve_sinks", ("insert_quantization",), preserve_sinks),
)
LOWER = (
    Pass("lower_attention", ("insert_rotation", "insert_quantization", "preserve_sinks"), lower_attention),
    Pass("fuse_attention", ("lower_attention",), fuse_attention),
    Pass("cleanup", ("lower_attention", "fuse_attention"), cleanup),
)
# Instead of LOWER, for a graph that is run as it stands: a forward without a cache.
WITHOUT_CACHE = (
    Pass("keep_window", ("insert_rotation", "insert_quantization", "preserve_sinks"), keep_window),
    Pass("lower_without_cache", ("keep_window",), lower_without_cache),
    Pass("cleanup", ("lower_without_cache",), cleanup),
)


def run_passes(
    rewrite: Rewrite,
    passes: tuple[Pass, ...] = INSERT + LOWER,
    dump: Callable[[str, fx.Graph], None] | None = None,
) -> dict[str, dict[str, int]]:
    """Run passes over one site.

    Args:
        rewrite: the site and its plan; changed in place.
        passes: in the order they run.
        dump: called with "before" and then each pass' name, and the graph at that point.

    Returns:
        What each pass counted, by name.

    Raises:
        PassOrderError: a pass comes before one that it must run after.
    """
    check_order(passes)
    counts = {}
    if dump is not None:
        dump("before", rewrite.graph)
    for one in passes:
        counts[one.name] = one.function(rewrite)
        if dump is not None:
            dump(one.name, rewrite.graph)
    return counts


def check_order(passes: tuple[Pass, ...]) -> None:
    """Check that each pass follows those it names.

    Raises:
        PassOrderError: it does not; the message names both.
    """
    for index, one in enumerate(passes):
        earlier = {p.name for p in passes[:index]}
        for needed in one.after:
            if needed not in earlier:
                raise PassOrderError(f"pass {one.name!r} must run after {needed!r}; reorder the pipeline.")


def dump_to(folder: Path, layer: str) -> Callable[[str, fx.Graph], None]:
    """A `dump` that writes numbered text files, one a pass, below `folder`/`layer`."""
    target = folder / layer
    target.mkdir(parents=True, exist_ok=True)
    step = iter(range(100))

    def write(name: str, graph: fx.Graph) -> None:
        (target / f"{next(step):02d}_{name}.txt").write_text(f"{graph.python_code('self').src}\n")

    return write
