"""What was matched, what was not and why, what was inserted, and what it runs on: plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from rotatekv_fx.sites import AttentionSite, Rejection


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One matched attention module.

    Attributes:
        rope: operations between the pre-RoPE and the post-RoPE key; empty where there is no RoPE.
        positions: what is stored of positions: "ids", "rows" or "none".
        attention: "attend" (our op) or "inline" (the module's own arithmetic on dequantized keys and values).
        merged: projections that a rotation can be merged into.
        unmerged: of the others, why not: a rotation of theirs is applied to keys, values or the attention's
            output online.
        passes: what each pass counted; empty before transform().
        lowered: what each op of the rewritten graph runs on; empty before transform().
    """

    name: str
    layer_index: int
    kv_heads: int
    query_heads: int
    head_dim: int
    value_dim: int
    rope: tuple[str, ...]
    positions: str
    attention: str
    merged: tuple[str, ...]
    unmerged: tuple[str, ...] = ()
    passes: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    lowered: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `transform` (or `inspect_model`) found and did.

    Attributes:
        sites: matched attention modules, in layer order.
        rejections: attention modules left as they were, each with its reason and node.
        config: the settings used, None before transform().
        originals_nbytes: bytes of the folded weights' originals, kept on the CPU for restore().
    """

    model: str
    sites: tuple[SiteReport, ...]
    rejections: tuple[Rejection, ...]
    config: dict[str, Any] | None = None
    originals_nbytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return dataclasses.asdict(self)

    def table(self) -> Table:
        """The report as a table; layers that look alike share a row."""
        recipe = f", recipe {self.config['recipe']}" if self.config else ""
        table = Table(
            title=f"{self.model}: {len(self.sites)} matched, {len(self.rejections)} rejected{recipe}"
        )
        for column in ("layers", "heads (q/kv) x channels", "RoPE", "positions", "attention", "rotation"):
            table.add_column(column, overflow="fold")
        for layers, site in _alike(self.sites):
            table.add_row(
                layers,
                f"{site.query_heads}/{site.kv_heads} x {site.head_dim}",
                f"{len(site.rope)} operations" if site.rope else "none",
                site.positions,
                site.attention,
                _rotation(site),
            )
        for rejection in self.rejections:
            at = f" (at {rejection.node})" if rejection.node else ""
            table.add_row(
                str(rejection.layer_index), rejection.name, f"rejected: {rejection.reason}{at}", "", "", ""
            )
        return table


def describe_site(site: AttentionSite, positions: str) -> SiteReport:
    """The matched part of a site's report."""
    projections = {"k": site.key_projection, "v": site.value_projection, "o": site.output_projection}
    return SiteReport(
        name=site.name,
        layer_index=site.layer_index,
        kv_heads=site.kv_heads,
        query_heads=site.query_heads,
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        rope=tuple(site.rope_operations()),
        positions=positions,
        attention="attend" if site.attention is not None else "inline",
        merged=tuple(f"{side}: {p.weight}" for side, p in projections.items() if p is not None),
        unmerged=tuple(f"{side[0]}: {reason}" for side, reason in site.unmerged.items()),
    )


def _rotation(site: SiteReport) -> str:
    counts = site.passes.get("insert_rotation")
    if counts is None:
        done = f"mergeable into {', '.join(m.partition(': ')[0] for m in site.merged) or 'none'}"
    else:
        done = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n) or "none"
    return "\n".join([done, *site.unmerged])


def _alike(sites: tuple[SiteReport, ...]) -> list[tuple[str, SiteReport]]:
    """Runs of consecutive layers whose reports differ in name and number only."""
    rows: list[list[SiteReport]] = []
    for site in sites:
        same = (
            dataclasses.replace(rows[-1][0], name=site.name, layer_index=site.layer_index) if rows else None
        )
        if same == site:
            rows[-1].append(site)
        else:
            rows.append([site])
    spans = [
        (f"{r[0].layer_index}-{r[-1].layer_index}" if len(r) > 1 else f"{r[0].layer_index}") for r in rows
    ]
    return list(zip(spans, (r[0] for r in rows), strict=True))
