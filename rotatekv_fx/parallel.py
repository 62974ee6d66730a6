"""Tensor parallelism: an attention module whose heads are spread over several processes.

Each process runs the same code on its own heads. A calibration is of the whole model everywhere: processes
that calibrate put their heads' statistics together, and `transform` takes the own heads' part out again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rotatekv_fx.opaque import call_submodule
from rotatekv_fx.sites import AttentionSite


@dataclasses.dataclass(frozen=True)
class Share:
    """A layer's KV heads lie in `size` equal parts, one a process; this process holds number `rank`.

    Attributes:
        rank, size: 0 and 1 where this process holds all heads.
        group: the processes (`torch.distributed`), or None where it is one. All enter the methods together.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def total(self, own: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.group is not None:
            own = own.clone()
            torch.distributed.all_reduce(own, group=self.group)
        return own

    def gathered(self, own: Tensor) -> Tensor:
        """[Hkv, ...] of this process's heads -> [size * Hkv, ...] of all."""
        if self.group is None:
            return own
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(parts, own, group=self.group)
        return torch.cat(parts)


def share_of(site: AttentionSite) -> Share:
    """Which heads this process holds: the key's projection says so, whose weight (a DTensor) is of all
    processes while its output is of this one.
    """
    pending, seen = [site.key_pre], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending += node.all_input_nodes
        if node.target is not call_submodule:
            continue
        weight = getattr(site.capture.module.get_submodule(str(node.args[0].target)), "weight", None)
        features = node.meta["val"].shape[-1]
        for axis, placement in enumerate(getattr(weight, "placements", ())):
            mesh = weight.device_mesh
            if placement.is_shard() and features * mesh.size(axis) == weight.shape[placement.dim]:
                return Share(mesh.get_local_rank(axis), mesh.size(axis), mesh.get_group(axis))
    return Share()
