"""Choices made when the graph runs: an op of our own while the model is traced, an `If` in the ONNX graph.

The two branches are exported once for all layers alike, and put in the place of every op.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from rotatekv_fx.export.state import State

DOMAIN = "rotatekv_fx.export"
Branch = Callable[[Any, State], Tensor | tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """`then(form, tensors)` where a condition holds, `other(form, tensors)` elsewhere."""

    then: Branch
    other: Branch
    form: Any


class Functions:
    """The choices of one export."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[str, Choice, State]] = {}

    def call(
        self,
        choice: Choice,
        condition: Tensor,
        tensors: State,
        outputs: Sequence[tuple[torch.dtype, Sequence[int]]],
    ) -> Sequence[Tensor]:
        """Trace a choice.

        Args:
            condition: bool [].
            tensors: what the branches read; sizes that may vary are symbols.
            outputs: dtype and shape of each result.
        """
        signature = tuple((n, t.dtype, tuple(d if isinstance(d, int) else None for d in t.shape)) for n, t in tensors.items())
        key = (choice, signature)
        if key not in self._made:
            self._made[key] = f"Choice{len(self._made)}", choice, tensors
        name = self._made[key][0]
        return torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{name}",
            (condition, *tensors.values()),
            dtypes=[dtype for dtype, _ in outputs],
            shapes=[shape for _, shape in outputs],
            version=1,
        )

    def put_into(self, model: onnx.ModelProto, opset: int) -> None:
        """Replace every op of ours by its `If`."""
        branches = {
            name: [(tuple(tensors), _export(branch, choice.form, tensors, opset)) for branch in (choice.then, choice.other)]
            for name, choice, tensors in self._made.values()
        }
        nodes = list(model.graph.node)
        del model.graph.node[:]
        for index, node in enumerate(nodes):
            if node.domain == DOMAIN:
                condition, *operands = node.input
                made = [
                    _instance(graph, dict(zip(names, operands, strict=True)), f"{node.op_type}_{index}_{side}")
                    for side, (names, graph) in zip(("then", "else"), branches[node.op_type], strict=True)
                ]
                node = helper.make_node(
                    "If", [condition], list(node.output), then_branch=made[0], else_branch=made[1]
                )
            model.graph.node.append(node)
        kept = [o for o in model.opset_import if o.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)


class _Function(nn.Module):
    """A branch as a module."""

    def __init__(self, branch: Branch, form: Any):
        super().__init__()
        self.branch, self.form = branch, form

    def forward(self, tensors: State) -> Tensor | tuple[Tensor, ...]:
        return self.branch(self.form, tensors)


def _export(branch: Branch, form: Any, tensors: State, opset: int) -> onnx.GraphProto:
    example = {
        name: torch.zeros([d if isinstance(d, int) else d.node.hint for d in t.shape], dtype=t.dtype)
        for name, t in tensors.items()
    }
    varying = {
        name: {i: torch.export.Dim.DYNAMIC for i, d in enumerate(t.shape) if not isinstance(d, int)}
        for name, t in tensors.items()
    }
    program = torch.onnx.export(
        _Function(branch, form).eval(),
        (),
        kwargs={"tensors": example},
        dynamic_shapes={"tensors": varying},
        input_names=list(tensors),
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    return program.model_proto.graph


def _instance(graph: onnx.GraphProto, operands: dict[str, str], prefix: str) -> onnx.GraphProto:
    """The graph as a branch: its inputs are values around it, all other names its own."""

    def renamed(name: str) -> str:
        return name and operands.get(name, f"{prefix}/{name}")

    nodes = []
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        constant = helper.make_node("Constant", [], [renamed(tensor.name)], value=numpy_helper.from_array(value))
        nodes.append(constant)
    for node in graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.name = f"{prefix}/{node.name}"
        copied.input[:] = [renamed(n) for n in node.input]
        copied.output[:] = [renamed(n) for n in node.output]
        nodes.append(copied)
    outputs = [helper.make_value_info(renamed(o.name), o.type) for o in graph.output]
    return helper.make_graph(nodes, prefix, [], outputs)
