"""The Hugging Face Hub: a run, or an exported ONNX file, with a card that holds its numbers.

What comes from there is anyone's: files of known names and bounded size alone, which the readers
of this package have read, running no code, before they are moved into place. No torch on import.
"""

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from defquant.errors import UserError, needs, shown
from defquant.files import make_folder, read_json
from defquant.progress import quiet, say
from defquant.records import Measurement, read_folder
from defquant.report.cards import KIND, Card
from defquant.report.names import attack_at, markdown
from defquant.typed import from_mapping

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["model_card", "pull", "push"]

RUN = {
    "checkpoint.safetensors": 4 << 30, "results.jsonl": 1 << 28, "diagnosis.json": 1 << 24,
}  # fmt: skip
"""Files of a run, and the bytes that each may have; `config.json` and `log.jsonl` are made anew
from the checkpoint's header."""
FILE = {".onnx": 2 << 30, ".json": 1 << 24}
_CHECKPOINT = next(iter(RUN))
_ENDS = (
    "A robust accuracy is an upper bound: a stronger attack can only lower it. The intervals are "
    "Wilson's, of the images; no interval here covers the chance in training."
)
_MASKED = (
    "† Masked: on more than 1 % of the images that are classified rightly the loss gradient is "
    "zero. It proves no robustness and is not in the evaluation block.\n\n"
)


def push(source: Path, repo: str, *, public: bool = False) -> str:
    """Put a run's folder, or an ONNX file of `export` with its sidecar, on the Hub, in one commit.

    A repository that is made for it is private unless `public`. The token is that of
    `hf auth login`, or HF_TOKEN. Returns the address. Raises `UserError` for a run that is not
    finished or has no results, a file without its sidecar, and where the Hub cannot be written.
    """
    api, files = _api(repo), _files(source)
    from huggingface_hub import CommitOperationAdd

    added: dict[str, str | bytes] = {**files, "README.md": model_card(source, repo).encode()}
    with _asked("write", repo):
        url = api.create_repo(repo, private=not public, exist_ok=True)
        api.create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in added.items()],
            commit_message=f"defquant push: {source.name}",
        )
    return str(url)


def pull(repo: str, out: Path, *, revision: str | None = None) -> Path:
    """Bring what `push` put there into the new folder `out`, which appears whole or not at all.

    Raises `UserError`: `out` holds something, the Hub cannot be read, or has nothing of ours there,
    or a file that is larger than such a file can be, or broken.
    """
    api = _api(repo)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there and not empty: choose another --out")
    with _asked("read", repo):
        commit = api.repo_info(repo, revision=revision).sha
        tree = api.list_repo_tree(repo, revision=commit)
        sizes = {str(f.path): int(f.size) for f in tree if hasattr(f, "size")}
    names = _ours(repo, sizes)
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=".defquant-pull-", dir=out.parent) as place:
        found = Path(place) / out.name
        for name in names:
            with _asked("read", repo):
                api.hf_hub_download(repo, name, revision=commit, local_dir=found)
            if (found / name).stat().st_size != sizes[name]:
                raise UserError(f"{repo}: {name} is not of the size that was announced: try again")
        shutil.rmtree(found / ".cache", ignore_errors=True)  # the client's own
        try:
            _check(found, names)
        except UserError as error:
            raise UserError(str(error).replace(str(found), repo)) from None
        found.replace(out)
    return out


def _ours(repo: str, sizes: Mapping[str, int]) -> list[str]:
    """The files of a repository to bring. Raises `UserError` for none, and for enormous ones."""
    files = {name for name in sizes if re.fullmatch(r"\w[\w.-]*\.onnx", name)}
    cards = {Path(name).with_suffix(".json").name for name in files} & sizes.keys()
    run = RUN.keys() & sizes.keys() if _CHECKPOINT in sizes else set()
    ours = [*sorted(run), *sorted(files | cards)]
    if not ours:
        raise UserError(f"{repo} holds no run and no ONNX file of defquant")
    for name in ours:
        most = RUN.get(name) or FILE[Path(name).suffix]
        if sizes[name] > most:
            raise UserError(f"{repo}: {name} has {sizes[name]:,} bytes; at most {most:,} are read")
    told = {*ours, "README.md", ".gitattributes", "config.json", "log.jsonl"}
    if others := sorted(sizes.keys() - told):
        say(f"defquant: left there, as nothing of ours: {shown(', '.join(others), 200)}")
    return ours


def _check(folder: Path, names: Iterable[str]) -> None:
    """Read all of it. Raises `UserError` for what is broken."""
    for path in (folder / name for name in names):
        if path.name == _CHECKPOINT:
            from defquant.checkpoint import load_model, write_companions

            write_companions(folder, load_model(folder)[1])
        elif path.suffix == ".onnx":
            _open(path)
        elif path.name == "results.jsonl":
            read_folder(folder)
        elif path.name == "diagnosis.json":
            read_json(path)
        else:
            _sidecar(path)


def _files(source: Path) -> dict[str, str]:
    """What there is to push, by its name there. Raises `UserError` where that is not whole."""
    if source.suffix == ".onnx":
        _open(source)
        return {path.name: str(path) for path in (source, source.with_suffix(".json"))}
    import torch

    from defquant.checkpoint import load_on

    load_on(source, torch.device("cpu"))
    paths = (source / name for name in (*RUN, "config.json", "log.jsonl"))
    return {path.name: str(path) for path in paths if path.is_file()}


def _open(path: Path) -> None:
    needs("deploy", "onnx", "onnxruntime")
    from defquant.deploy.runtime import facts_of, open_model

    facts_of(open_model(path), path)


def _sidecar(path: Path) -> Card:
    record = read_json(path)
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise UserError(f"{path} is not the card that `defquant export` writes beside its file")
    return from_mapping(Card, record | {"place": path.name}, f"{path}: ")


# --- the card -----------------------------------------------------------------------------


def model_card(source: Path, repo: str) -> str:
    """README.md of a run or an exported file: numbers with intervals, for people and as YAML.

    Each accuracy is a metric of `model-index` with its interval, counts and the attack's settings
    in `args`; masked ones are left out of that. Of a run, only what was measured on the weights
    that it has now. Raises `UserError` where there are no results.
    """
    described, name = _of_file if source.suffix == ".onnx" else _of_run, _name(source)
    text, tags, use, rows = described(source)
    front = {
        "library_name": "defquant", "pipeline_tag": "image-classification",
        "tags": ["defquant", "quantization", "adversarial-robustness", *tags],
        "model-index": [{"name": repo.rpartition("/")[2], "results": list(_index(rows))}],
    }  # fmt: skip
    masked = _MASKED * any(row.masked for row in rows)
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {markdown(name)}

{markdown(text)}

| data | attack | accuracy | 95 % interval | images |
| --- | --- | ---: | ---: | ---: |
{"".join(map(_line, rows))}
{_ENDS}

{masked}```console
$ defquant pull {repo} --out {shlex.quote(name)}
$ {shlex.join(["defquant", *use])}
```
"""


def _of_file(source: Path) -> tuple[str, list[str], list[str], list[Measurement]]:
    """Words of the card, its tags, how it is used, and its scores."""
    card = _sidecar(source.with_suffix(".json"))
    integer, every = card.convolutions
    text = (
        f"{card.model} ({card.method}) as an ONNX file: {card.bits}-bit activations, "
        f"{card.weight_bits}-bit weights, {integer} of {every} convolutions in integers. "
        f"The same answer as the trained network on {card.parity.agreement:.2%} of "
        f"{card.parity.images:,} images."
    )
    rows = [
        Measurement(
            card.run, card.method, card.model, card.bits, card.beta, card.seed, card.data,
            card.fingerprint, p.attack, p.eps, p.settings, *p.deployed,
        )
        for p in card.scores
    ]  # fmt: skip
    use = ["judge", f"{source.stem}/{source.name}", "--data", "DATA"]
    return text, ["onnx"], use, rows


def _of_run(source: Path) -> tuple[str, list[str], list[str], list[Measurement]]:
    """The same of a run."""
    import torch

    from defquant.checkpoint import load_on
    from defquant.measure import weights_hash

    model, facts = load_on(source, torch.device("cpu"))
    own = ("", weights_hash(model))  # lines from before hashes were kept have none
    measured = [m for m in read_folder(source) if m.network[0] in own]
    if not measured:
        raise UserError(f"{source} has results of other weights alone: run `defquant attack` again")
    bits = "full precision" if facts.model.bits is None else f"{facts.model.bits}-bit activations"
    text = (
        f"{facts.model.model} ({facts.method}), {bits}, trained on {len(facts.classes)} classes of "
        f"{facts.data_name} ({facts.fingerprint}): {facts.train.epochs} epochs, seed "
        f"{facts.train.seed}, beta {facts.train.beta:g}."
    )
    return text, [], ["attack", _name(source), "--attack", "adaptive"], measured


def _name(source: Path) -> str:
    return source.stem if source.suffix == ".onnx" else source.resolve().name


def _line(row: Measurement) -> str:
    low, high = row.score.interval
    name = markdown(attack_at(row.attack, row.eps))
    return (
        f"| {markdown(row.data)} | {name} | {row.score.accuracy:.1%}{' †' * row.masked} "
        f"| {low:.1%} to {high:.1%} | {row.score.total:,} |\n"
    )


def _index(rows: Iterable[Measurement]) -> Iterator[dict[str, Any]]:
    """The evaluation block: a result for each set of test images."""
    sets: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if not row.masked:
            low, high = row.score.interval
            name = f"Robust accuracy, {attack_at(row.attack, row.eps)}" if row.eps else "Accuracy"
            args = {
                "low": low, "high": high, "interval": "Wilson, 95 %", "correct": row.score.correct,
                "total": row.score.total, "attack": row.settings, "eps": row.eps,
            }  # fmt: skip
            metric = {"type": "accuracy", "name": name, "value": row.score.accuracy, "args": args}
            sets.setdefault((row.data, row.fingerprint), []).append(metric)
    for (data, fingerprint), metrics in sets.items():
        kind = re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-") or "images"
        yield {
            "task": {"type": "image-classification"},
            "dataset": {"type": kind, "name": data, "args": {"fingerprint": fingerprint}},
            "metrics": metrics,
        }


# --- the client ---------------------------------------------------------------------------


def _api(repo: str) -> "HfApi":
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise UserError(f"the Hub names models OWNER/NAME; found {shown(repo)!r}")
    needs("hub", "huggingface_hub")
    from huggingface_hub import HfApi, utils

    if quiet() or not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    return HfApi(library_name="defquant")


@contextmanager
def _asked(what: str, repo: str) -> Iterator[None]:
    """`UserError`, without the token, for all that may go wrong between here and the Hub."""
    try:
        yield
    except Exception as error:  # the client's, the network's and the disk's errors, all unlike
        from huggingface_hub import get_token

        said = next((line for line in str(error).splitlines() if line.strip()), "")
        said = said.replace(get_token() or "\0", "***")
        raise UserError(
            f"cannot {what} {repo} ({type(error).__name__}: {shown(said, 200)}): see that the name "
            "is right, the network is there, and `hf auth login` was done"
        ) from None
