"""The Dynamo backend "rotatekv": the insert passes on a whole-model graph, then inductor."""

from rotatekv_fx.backend.entry import rotatekv
from rotatekv_fx.backend.insert import insert
from rotatekv_fx.backend.options import Options, read_options

__all__ = ["Options", "insert", "read_options", "rotatekv"]
