"""cleanup: drop what nothing reads any more (the captured RoPE of keys stored before RoPE, say), and check
the graph.
"""

from __future__ import annotations

from rotatekv_fx.passes.base import Rewrite


def cleanup(rewrite: Rewrite) -> dict[str, int]:
    """Erase dead nodes and lint.

    Returns:
        Count of erased nodes.
    """
    before = len(rewrite.graph.nodes)
    rewrite.graph.eliminate_dead_code()
    rewrite.graph.lint()
    return {"erased": before - len(rewrite.graph.nodes)}
