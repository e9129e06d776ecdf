"""The documentation cannot rot: its code runs, its commands parse, its names and links exist."""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nbclient
import nbformat
import pytest
import torch

import defquant
from defquant.attacks.names import parse_attack
from defquant.cli import VERBS, parse, settings_of, verb_app
from defquant.config import ModelConfig
from defquant.data import DATASETS
from defquant.errors import UserError
from defquant.models import build
from defquant.paper.claims import verdicts
from defquant.paper.figures import EXPERIMENTS, render
from defquant.paper.grid import SCALES, read
from defquant.report import claims_markdown, section_markdown
from defquant.typed import from_mapping

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "src", "tests", "benchmarks", "results")
PAGES = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])
SHELLS = ("console", "bash", "sh")
WARN = ("_warn", "warnings.warn")
FILE = re.compile(r".*\.(py|md|json|jsonl|html|ya?ml|mat|npz|gz|toml|lock|safetensors|txt)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    """A fenced block: `language` and `note` come from its first line, ```language note."""

    language: str
    note: str
    code: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    for found in re.finditer(r"^```(\w*) *(.*)\n((?:.*\n)*?)```$", text, re.M):
        yield Block(found[1], found[2].strip(), found[3], text[: found.start(3)].count("\n") + 1)


def prose(text: str) -> str:
    return re.sub(r"^```(?:.*\n)*?```$", "", text, flags=re.M)


def spans(text: str) -> list[str]:
    """What stands between backticks, outside fenced blocks."""
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", prose(text))]


# ------------------------------------------------------------------ (a) code


def run_python(text: str, name: str) -> int:
    """Run the python blocks of one page in one namespace; how many ran."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    ran = 0
    for block in blocks(text):
        if block.language == "python":
            tree = compile("\n" * (block.line - 1) + block.code, name, "exec")
            if block.note != "no-run":
                exec(tree, namespace)
                ran += 1
    return ran


@every_page
@pytest.mark.timeout(60)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_python(page.read_text(), page.name)
    assert ran or page.name != "python.md"


# -------------------------------------------------------------- (b) commands


def commands(text: str) -> Iterator[tuple[list[str], str | None]]:
    """`defquant` command lines of the shell blocks: the words after it, and the file after `>`."""
    for block in blocks(text):
        if block.language == "yaml" and block.note:
            Path(block.note).write_text(block.code)
        if block.language in SHELLS:
            for line in re.sub(r"\\\n", " ", block.code).splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if "defquant" in words:
                    words = words[words.index("defquant") + 1 :]
                    file = words[words.index(">") + 1] if ">" in words else None
                    ends = [words.index(end) for end in (">", "|", "&&", ";") if end in words]
                    yield words[: min(ends, default=len(words))], file


def check(words: list[str]) -> None:
    """Raise unless `defquant words...` would be understood: its flags, and the names in them."""
    if words[0] in ("--help", "--version"):
        return
    found = parse(words)
    if found is None:
        return
    given = settings_of(found[1])
    if words[0] == "train":
        model = from_mapping(ModelConfig, given | {"convex": bool(given["convex"])})
        with torch.device("meta"):
            build(model, num_classes=10, in_channels=3)
        if given["data"] not in DATASETS:
            raise UserError(f"unknown data set {given['data']!r}")
    if words[0] == "attack":
        for name in given["attack"]:
            parse_attack(name, given["eps"][0])


@every_page
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, file in commands(page.read_text()):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                check(words)
        except Exception as error:
            pytest.fail(f"{page.name}: defquant {shlex.join(words)}: {error}")
        if file:
            Path(file).write_text(printed.getvalue())


@cache
def flags() -> set[str]:
    app = verb_app()
    arguments = [a for verb in VERBS for a in app[verb].assemble_argument_collection()]
    names = {name[2:].replace("-", "_") for a in arguments for name in a.names}
    return names | {"config", "print_config", "help", "version", "quiet", "verbose"}


# ----------------------------------------------------------------- (c) names


def resolve(name: str) -> object:
    """What `defquant.` + name names. Raises `ImportError` or `AttributeError`."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = Path(defquant.__file__).parent.joinpath(*parts[:end])
        if path.is_dir() or path.with_suffix(".py").is_file():
            found: object = importlib.import_module(f"defquant.{'.'.join(parts[:end])}")
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    raise ImportError(f"defquant has no module {parts[0]}")


def dotted(text: str) -> list[str]:
    """`module.function` names: all between backticks that look like one and like no file."""
    names = [s for s in spans(text) if re.fullmatch(r"[a-z_]\w*(\.\w+)+", s)]
    return [name for name in names if not FILE.fullmatch(name)]


def named_tests(text: str) -> list[tuple[str, str]]:
    """`file::name`, with or without `tests/`."""
    return re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)`", text)


def has_test(file: str, name: str) -> bool:
    return f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_names_of_the_paper_map_exist() -> None:
    text = (ROOT / "docs" / "paper-map.md").read_text()
    assert len(dotted(text)) > 20
    assert len(named_tests(text)) > 20
    for name in dotted(text):
        resolve(name)


def test_messages_and_warnings_are_those_of_the_code() -> None:
    """The warnings (`### message`) and errors (a table) of flags.md, `…` for what is filled in: the
    parts stand in one string of the sources, and every plain warning of these has its entry.
    """
    messages, warned = [], set()
    for path in Path(defquant.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                pieces = (getattr(v, "value", "") for v in node.values)
                messages.append("".join(p if isinstance(p, str) else "…" for p in pieces))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in WARN:
                warned |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    text, errors = (ROOT / "docs" / "flags.md").read_text().split("\n## Errors\n")
    heads = re.findall(r"^### (.*)$", text, re.M)
    heads += re.findall(r"^\| (.*?) \|", errors.split("\n## ")[0], re.M)[2:]
    assert len(heads) > 30
    plain = [message.replace("`", "") for message in messages]
    for head in heads:
        parts = [part.strip() for part in head.replace("`", "").split("…") if part.strip()]
        assert any(all(part in message for part in parts) for message in plain), head
    assert warned and warned <= set(heads)


# ----------------------------------------------------------------- (d) links


def anchors(path: Path) -> set[str]:
    """GitHub's names of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if not re.match(r"[a-z]+:", target):
            place, _, anchor = target.partition("#")
            path = (page.parent / place).resolve() if place else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(target)
    return broken


@every_page
def test_what_the_text_names_exists(page: Path) -> None:
    """Commands, flags, make's targets, tests, public names, links; and no path of one machine."""
    text = page.read_text()
    for span in spans(text):
        words = shlex.split(span) if span.startswith("defquant ") else []
        if any(word.startswith("--") for word in words[2:]):
            check(words[1:])
        assert not words or words[1][0] in "-." or words[1] in {*VERBS, "VERB"}, span
        if span.startswith("--") and page.parent.name == "docs":
            assert re.split(r"[ =]", span[2:])[0].replace("-", "_") in flags(), span
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    shells = "".join(b.code for b in blocks(text) if b.language in SHELLS)
    lines = shells + "\n".join(spans(text))
    assert set(re.findall(r"^\$? ?make ([\w-]+)", lines, re.M)) <= targets
    assert all(has_test(file, name) for file, name in named_tests(text))
    assert set(re.findall(r"\bdq\.(\w+)", "\n".join(spans(text)))) <= set(defquant.__all__)
    assert not broken_links(page)
    assert not re.findall(r"(?<![\w.])/(?:home|work|root|Users|mnt|tmp)/\S*", text)


# ------------------------------------------------- each check is able to fail


def test_the_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run_python("```python\nx = 0\n```\ntext\n```python\n1 / x\n```\n", "page")
    with pytest.raises(SyntaxError):
        run_python("```python no-run\n1 +\n```\n", "page")
    for command in (
        "$ defquant train --outt runs/a", "defquant fly --out a", "defquant attack a --eps 8",
        "defquant attack a --attack cw", "defquant train --out a --model lenet",
        "torchrun -m defquant train \\\n  --preset none", "defquant train --out a --data mnist",
    ):  # fmt: skip
        ((words, _),) = commands(f"```console\n{command}\n```\n")
        with pytest.raises(UserError):
            check(words)
    for name in ("quantize.missing", "missing.name", "lipschitz.OrthogonalPenalty.missing"):
        with pytest.raises((ImportError, AttributeError)):
            resolve(name)
    assert not has_test("test_docs.py", "test_missing")
    page = tmp_path / "page.md"
    page.write_text("# One head\n[a](page.md) [b](#one-head) [c](gone.md) [d](page.md#gone)\n")
    assert broken_links(page) == ["gone.md", "page.md#gone"]


def test_claims_are_those_of_the_results() -> None:
    """`results/small/claims.md` has the verdicts on that folder; `docs/claims.md` their number.

    `defquant reproduce all --preset small --out results/small --render-only` makes them again.
    """
    results = read(ROOT / "results" / "small")
    found = claims_markdown(verdicts(SCALES["small"], results))
    assert (ROOT / "results" / "small" / "claims.md").read_text() == found
    assert found.splitlines()[0] in (ROOT / "docs" / "claims.md").read_text()
    readme = (ROOT / "README.md").read_text()
    counts = re.findall(r"\d+", found)[:4]
    assert re.findall(r"\d+", readme[readme.index("Of the paper's ") :])[:4] == counts
    tables = [ROOT / "results" / "demo" / "table.md", ROOT / "results" / "small" / "table1.md"]
    measured = re.sub(r"\*|</?ins>", "", "".join(table.read_text() for table in tables))
    assert all(n in measured for n in re.findall(r"[\d.]+ ±[\d.]+", readme))
    judged = json.loads((ROOT / "results" / "judged" / "judgement.json").read_text())
    rates = [judged["rows"][0][name]["rate"] for name in ("usual", "strongest", "reference")]
    assert all(f"{rate:.1%}".replace("%", " %") in readme for rate in rates)
    assert f"`{judged['verdict']}`, and `{judged['paired']}`" in readme


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - {"table2"}))
def test_sections_are_those_of_the_results(name: str) -> None:
    """Tables and words of `results/small` follow from its JSON lines."""
    folder = ROOT / "results" / "small"
    section = render(name, SCALES["small"].placed(None, None, "cpu"), read(folder))
    found = section_markdown(section, figure=f"{name}.png" if section.panels else "")
    assert (folder / f"{name}.md").read_text() == found


def test_the_page_of_an_index_has_code_that_runs_and_no_path() -> None:
    text = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"]["text"]
    (code,) = (block.code for block in blocks(text))
    assert code in (ROOT / "README.md").read_text()  # where it is run
    assert not re.findall(r"\]\((?!https?://)", text)


def test_the_source_archive_has_all_that_the_tests_read() -> None:
    command = ["git", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    taken = [f"{folder}/*" for kind, *names in lines if kind == "graft" for folder in names]
    taken += [name for kind, *names in lines if kind == "include" for name in names]
    taken += ["src/*", "README.md", "LICENSE", "pyproject.toml", "MANIFEST.in"]  # by itself
    left = [f for f in listed.stdout.splitlines() if not any(fnmatch(f, name) for name in taken)]
    assert left in ([".gitignore"], [])  # none: no clone, but the archive


def test_every_field_case_has_its_test() -> None:
    text = (ROOT / "docs" / "field-cases.md").read_text(encoding="utf-8")
    cases = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(cases) > 70
    for case in cases:
        assert named_tests(case), case  # which are looked up above


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: defquant\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(named) == defquant.__all__


def test_ci_runs_the_targets_of_check() -> None:
    made = re.search(r"^check: ([a-z -]+)$", (ROOT / "Makefile").read_text(), re.M)
    ran = re.search(r"target: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())
    assert made and ran
    assert sorted(made[1].split()) == sorted(ran[1].replace(",", "").split())


@pytest.mark.slow  # a minute on two cores
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they hang on the machine
    found = nbclient.execute(notebook, cwd=str(tmp_path), kernel_name="python3")
    assert all(c.execution_count for c in found.cells if c.cell_type == "code")
    assert (tmp_path / "dq4.onnx").is_file()


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r'"([\w/.-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*/README.md")]
    assert {page.relative_to(ROOT).as_posix() for page in pages} < named
