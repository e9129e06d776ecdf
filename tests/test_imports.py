"""Data flows one way: a file imports only from files above it in this list."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "defquant"
ORDER = (
    "errors", "typed", "files", "config", "records", "progress", "rounding", "quantize", "weights",
    "lipschitz", "data", "models", "attacks", "functional", "captured", "integers", "rebuilt",
    "prepared", "distributed", "evaluate", "step", "training", "checkpoint",
    "runs", "measure", "images", "defenses", "foreign", "deploy", "diagnose", "judging", "paper",
    "report", "explore", "hub", "cli", "__main__",
)  # fmt: skip
TORCHLESS = (
    "errors",
    "typed",
    "files",
    "config",
    "records",
    "report",
    "cli",
    "cli.making",
    "cli.verbs",
    "paper.claims",
    "paper.reproduce",
)


def module(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in SOURCE.rglob("*.py")}


@cache
def named(path: Path) -> frozenset[str]:
    """Modules that `path` imports, and names from modules, which may be modules, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


def imports(path: Path) -> frozenset[str]:
    return named(path) & MODULES.keys() - {"defquant"}


def test_one_way() -> None:
    for name, path in MODULES.items():
        home = name.split(".")[1] if "." in name else "__init__"
        if home != "__init__":
            others = {i.split(".")[1] for i in imports(path)} - {home}
            late = {i for i in others if ORDER.index(i) > ORDER.index(home)}
            assert not late, f"{name} imports {late}, which come after it"


def test_no_circle() -> None:
    left = {name: imports(path) - {name} for name, path in MODULES.items()}
    packages = {name for name, path in MODULES.items() if path.stem == "__init__"}
    left = {name: found - packages for name, found in left.items()}  # they gather what is below
    while ends := {name for name, found in left.items() if not found & left.keys()}:
        left = {name: found for name, found in left.items() if name not in ends}
    assert not left, f"these import each other: {sorted(left)}"


def test_no_torch_before_it_is_needed() -> None:
    modules = ", ".join(f"defquant.{name}" for name in TORCHLESS)
    without = "assert 'torch' not in sys.modules"
    code = f"import sys, defquant, {modules}; {without}"
    subprocess.run([sys.executable, "-c", code], check=True)
    for words in (["--help"], ["train", "--help"], ["attack", "--bits"], ["train", "--bits", "9"]):
        code = f"import sys; from defquant.cli import main; main({words}); {without}"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_public_names_exist_and_none_is_also_a_module() -> None:
    """Importing `defquant.x` would put the module in the place of the function `dq.x`."""
    import defquant

    for name in defquant.__all__:
        assert getattr(defquant, name) is not None
    assert defquant.__version__ == version("defquant")
    assert set(defquant.__all__) <= set(dir(defquant))
    modules = {path.stem for path in (*SOURCE.glob("*.py"), *SOURCE.glob("*/"))}
    assert not modules & set(defquant.__all__)


def test_every_package_imported_is_declared() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"]]
    declared += [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {re.split(r"[^\w-]", line)[0].lower() for line in declared} | {"defquant"}
    called = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
    called |= {"vl_convert": "vl-convert-python"}
    for path in MODULES.values():
        roots = {name.split(".")[0] for name in named(path)} - sys.stdlib_module_names
        assert {called.get(root, root) for root in roots} <= names, path


def test_from_its_sources_alone_it_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import defquant

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert defquant.__version__ == "uninstalled"
