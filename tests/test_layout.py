"""The shape of the repository: imports point one way, nothing hides another package, and only the CLI
prints.
"""

import ast
import importlib.machinery
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rotatekv_fx"
NAME = PACKAGE.name

# Part of the package -> the parts it may import. The longest name that fits a module is its part.
FOUNDATION = {"errors", "config"}
GRAPHS = {"capture", "sites"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "calibration": {"opaque", "errors"},
    "opaque": set(),
    "masks": set(),
    "naming": {"errors"},
    "capture": {"masks", "naming", "opaque", "errors"},
    "sites": {"capture", "opaque", "errors"},
    "parallel": {"sites", "opaque"},
    "rope": {"sites"},
    "report": {"sites"},
    "collect": {"opaque", "parallel", "calibration", "rope", "errors", *GRAPHS},
    "recipes": {"calibration", *FOUNDATION},
    "passes": {"masks", "recipes", "errors", *GRAPHS},
    "kernels": {"masks", *FOUNDATION},
    "ops": {"kernels", *FOUNDATION},
    "cache": {"masks", "recipes", "rope", "errors", *GRAPHS},
    "binding": {"cache", "capture", "errors"},
    "saving": {"binding", "calibration", *FOUNDATION},
    "loading": {"api", "calibration", "saving", "errors"},
    "api": {
        "saving",
        "binding",
        "cache",
        "calibration",
        "collect",
        "ops",
        "opaque",
        "parallel",
        "passes",
        "recipes",
        "report",
        "rope",
        *FOUNDATION,
        *GRAPHS,
    },
    "backend": {"cache", "calibration", "ops", "passes", "recipes", "report", "rope", *FOUNDATION, *GRAPHS},
    "export": {
        *("api", "cache", "calibration", "capture", "kernels", "masks", "naming", "ops", "recipes", "report"),
        "rope",
        *FOUNDATION,
    },
    "evaluate": {
        *("", "api", "cache", "calibration", "collect", "naming", "recipes", "report", "rope"),
        *FOUNDATION,
        *GRAPHS,
    },
    "cli": {
        "",
        "api",
        "cache",
        "calibration",
        "collect",
        "evaluate",
        "export",
        "recipes",
        "report",
        *FOUNDATION,
    },
    "": {
        "api",
        "loading",
        "cache",
        "calibration",
        "export",
        "recipes",
        "report",
        *FOUNDATION,
    },  # the package's own names
}
TORCH_ONLY = {"ops", "kernels", "masks", "errors", "config", "recipes", "calibration", "passes"}


def modules():
    """Every module of the package: (dotted name below the package, path)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


MODULES = dict(modules())
SOURCES = [pytest.param(path, id=name or "__init__") for name, path in MODULES.items()]


def part_of(module):
    """The part that a dotted name below the package belongs to."""
    pieces = module.split(".") if module else [""]
    names = (".".join(pieces[:length]) for length in range(len(pieces), 0, -1))
    return next((name for name in names if name in ALLOWED), None)


def imported(path):
    """Absolute names of what a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relative to itself"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path):
    """Modules of this package that a file imports, as dotted names below it; "" is the package itself."""
    for name in imported(path):
        if name == NAME or name.startswith(f"{NAME}."):
            below = name[len(NAME) + 1 :]
            while below and below not in MODULES:
                below = below.rpartition(".")[0]
            yield below


def test_every_module_belongs_to_a_part():
    assert [name for name in MODULES if part_of(name) is None] == []


def test_allowed_arrows_form_no_circle():
    reached = {}

    def visit(part, path):
        assert part not in path, f"circle: {' -> '.join([*path, part])}"
        if part not in reached:
            reached[part] = True
            for other in ALLOWED.get(part, ()):
                visit(other, [*path, part])

    for part in ALLOWED:
        visit(part, [])


@pytest.mark.parametrize("path", SOURCES)
def test_imports_point_one_way(path):
    module = next(name for name, other in MODULES.items() if other == path)
    part = part_of(module)
    found = {part_of(name) for name in own_imports(path)} - {part}
    assert found <= ALLOWED[part], f"{module} imports {sorted(found - ALLOWED[part])}"


@pytest.mark.parametrize("path", SOURCES)
def test_what_knows_no_transformers(path):
    module = next(name for name, other in MODULES.items() if other == path)
    if part_of(module) in TORCH_ONLY:
        assert not any(name.split(".")[0] == "transformers" for name in imported(path))


def test_passes_speak_in_ops():
    for name, path in MODULES.items():
        if part_of(name) in ("passes", "cache"):
            assert not any(part_of(other) in ("kernels", "ops") for other in own_imports(path)), name


def test_triton_kernels_do_not_import_their_reference():
    """Otherwise a kernel could be tested against itself; and Triton is imported by kernels alone."""
    for name, path in MODULES.items():
        names = set(imported(path))
        if any(n.split(".")[0] == "triton" for n in names):
            assert part_of(name) == "kernels", name
            assert not any("reference" in n for n in names), name
            assert path.stem != "reference"


def test_there_are_references_to_speak_of():
    references = [name for name in MODULES if name.endswith(".reference")]
    assert len(references) >= 3
    for name in references:
        assert not any("triton" in n for n in imported(MODULES[name]))


# What stands beside the package


def importable_elsewhere(name):
    """Whether a package of that name is installed, leaving this repository out of the search."""
    elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() not in (ROOT, ROOT / "tests")]
    found = importlib.machinery.PathFinder.find_spec(name, elsewhere)
    return found is not None and found.origin is not None


# Packages that transformers or torch look for by name and import if they find them.
LOOKED_FOR = {
    "kernels",
    "triton",
    "onnx",
    "onnxscript",
    "optimum",
    "accelerate",
    "datasets",
    "evaluate",
    "peft",
}
BESIDE = sorted(
    {
        path.stem
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path.is_dir() and not path.name.startswith(".") and path != PACKAGE)
    }
)


@pytest.mark.parametrize("name", BESIDE)
def test_nothing_at_the_root_hides_a_package(name):
    assert name not in LOOKED_FOR
    assert name not in sys.stdlib_module_names
    assert not name.isidentifier() or not importable_elsewhere(name)


def test_the_search_finds_what_is_installed():
    assert importable_elsewhere("torch")
    assert importable_elsewhere("transformers")
    assert not importable_elsewhere("no_such_package_anywhere")


def test_the_root_holds_what_is_expected():
    assert {"tests", "benchmarks"} <= set(BESIDE)
    assert not {"passes", "kernels"} & set(BESIDE)


# Sources


@pytest.mark.parametrize("path", SOURCES)
def test_only_the_cli_prints(path):
    if part_of(next(name for name, other in MODULES.items() if other == path)) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        assert not (called and node.func.id == "print"), f"line {node.lineno} prints"
        written = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
        assert not written, f"line {node.lineno} writes to the terminal"


ABSOLUTE = re.compile(r"(?:^|[\s\"'`(=,:])(?:~|/[A-Za-z_][\w.-]*|[A-Za-z]:\\)(?:[/\\][\w.-]+)+")


def texts_of(path):
    """Strings and comments of a file."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield token.start[0], token.string


@pytest.mark.parametrize("path", SOURCES)
def test_no_path_outside_the_package_is_named(path):
    for line, text in texts_of(path):
        found = ABSOLUTE.search(text)
        assert found is None, f"line {line}: {found.group().strip()}"
        assert "../" not in text, f"line {line}"


@pytest.mark.parametrize(
    "text", ['"/home/someone/model"', "# see ~/notes/a.txt", "'C:\\\\data\\\\x'", "(/opt/a/b)"]
)
def test_paths_are_recognised(text):
    assert ABSOLUTE.search(text)


@pytest.mark.parametrize(
    "text", ["'s / t'", "# keys/values", "'[B, Hkv / G, D]'", "'https://example.org/a/b'", "'a/b'"]
)
def test_other_slashes_are_not(text):
    assert not ABSOLUTE.search(text)


@pytest.mark.parametrize("path", SOURCES)
def test_every_module_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), "no docstring"
