"""What `torch.compile(backend="rotatekv", mode=..., options=...)` may say, checked, and its fingerprint."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rotatekv_fx import recipes
from rotatekv_fx.calibration import Calibration
from rotatekv_fx.config import RotateKVConfig
from rotatekv_fx.errors import ConfigError

# Settings of transform() that mean nothing here: no weight is replaced, no text is generated, and a site that
# does not match is left as it is and logged.
_TRANSFORM_ONLY = frozenset({"keep_originals", "seed", "allow_partial"})
_SETTINGS = frozenset(f.name for f in dataclasses.fields(RotateKVConfig)) - _TRANSFORM_ONLY


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked options.

    Attributes:
        config: recipe, bits and so on, for graphs of untransformed models.
        calibration: file of statistics, or None.
        given: names of the settings above that the caller gave.
        inductor: settings of inductor, for this compilation only.
    """

    config: RotateKVConfig
    calibration: Path | None
    given: tuple[str, ...]
    inductor: Mapping[str, Any]

    def load_calibration(self) -> Calibration | None:
        """The statistics, where a file is named.

        Raises:
            CalibrationError: it is missing, damaged, or no calibration file.
        """
        return None if self.calibration is None else Calibration.load(self.calibration)

    def fingerprint(self) -> str:
        """Hash of this package's sources, the config and the calibration file: what the numbers depend on
        besides the graph.
        """
        digest = hashlib.sha256(f"{_sources()} {self.config.fingerprint()}".encode())
        if self.calibration is not None and self.calibration.is_file():
            digest.update(self.calibration.read_bytes())
        return digest.hexdigest()[:16]


def read_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Sort options into ours and inductor's, and check both.

    Args:
        options: fields of `RotateKVConfig`, "calibration" (a path), "mode" (a mode of `torch.compile`, which
            does not take `mode` and `options` together), and names of inductor's own settings.
        mode: the mode given to `torch.compile`.

    Raises:
        ConfigError: a name is unknown, or a value is out of range.
    """
    rest = dict(options or {})
    mode = rest.pop("mode", mode)
    config = {name: rest.pop(name) for name in list(rest) if name in _SETTINGS}
    calibration = rest.pop("calibration", None)
    given = (*config, *(("calibration",) if calibration is not None else ()))
    if calibration is not None and not isinstance(calibration, str | Path):
        raise ConfigError(
            f"option calibration is a {type(calibration).__name__}; give the path of a file that "
            "calibrate(model).save(path) wrote."
        )
    checked = RotateKVConfig(**config)
    recipes.get(checked.recipe)
    return Options(
        checked,
        Path(calibration) if calibration is not None else None,
        given,
        {**_mode_settings(mode), **_inductor_settings(rest)},
    )


def _mode_settings(mode: str | None) -> dict[str, Any]:
    modes = torch._inductor.list_mode_options()
    if mode is None or mode in modes:
        return dict(modes.get(mode, {}))
    raise ConfigError(f"mode {mode!r} is unknown; use one of {', '.join(sorted(modes))}.")


def _inductor_settings(settings: dict[str, Any]) -> dict[str, Any]:
    known = frozenset(torch._inductor.list_options())
    named = {name.replace("-", "_"): value for name, value in settings.items()}
    for name in named:
        if name in known:
            continue
        if name in _TRANSFORM_ONLY:
            raise ConfigError(f"option {name} belongs to transform(); leave it out.")
        ours = sorted(_SETTINGS | {"calibration", "mode"})
        near = difflib.get_close_matches(name, [*ours, *known], 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"option {name!r} is unknown; use {', '.join(ours)}, or a setting of "
            f"torch._inductor.config.{meant}"
        )
    return named


@functools.cache
def _sources() -> str:
    """Hash of the package's own source files."""
    digest, folder = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
