"""Data flows one way: a file imports only from files above it in this list."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "defquant"
ORDER = (
    "errors", "files", "config", "results", "quantize", "weights", "lipschitz", "data", "models",
    "attacks", "defenses", "progress", "distributed", "evaluate", "deploy", "diagnose",
    "monitor", "training_state", "training", "checkpoint", "runs", "replay", "measure",
    "manifest", "saved", "rescored", "foreign", "transfers", "diagnoses", "detection",
    "shipping", "experiments", "report", "commands", "flags_anyone", "flags", "cli", "__main__",
)  # fmt: skip
TORCHLESS = ("flags", "errors", "files", "config", "results", "report", "cli", "commands")


def imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    names = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    parts = [name.split(".") for name in names if name.startswith("defquant.")]
    return {part[1] for part in parts}


def test_one_way() -> None:
    for path in SOURCE.rglob("*.py"):
        home = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if home != "__init__":
            late = {i for i in imports(path) - {home} if ORDER.index(i) > ORDER.index(home)}
            assert not late, f"{path.name} imports {late}, which come after it"


def test_no_torch_before_it_is_needed() -> None:
    modules = ", ".join(f"defquant.{name}" for name in TORCHLESS)
    code = f"import sys, defquant, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    for words in (["--help"], ["train", "--help"], ["attack", "--bits"], ["train", "--bits", "9"]):
        code = f"from defquant.cli import main; main({words}); import sys; assert 'torch' not in "
        code += "sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_public_names_all_exist() -> None:
    import defquant

    for name in defquant.__all__:
        assert getattr(defquant, name) is not None
    assert set(defquant.__all__) <= set(dir(defquant))


def test_no_public_name_is_also_a_module() -> None:
    """Importing `defquant.x` would put the module in the place of the function `dq.x`."""
    import defquant

    modules = {path.stem for path in SOURCE.glob("*.py")} | {p.name for p in SOURCE.glob("*/")}
    assert not modules & set(defquant.__all__)
