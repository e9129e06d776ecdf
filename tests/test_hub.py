"""The Hub, without a network: a server on this machine that speaks as much of it as is needed."""

import base64
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from defquant import hub
from defquant.cli import main
from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.records import Measurement, Score, append
from defquant.runs import train_run
from test_cli import call, refused

COMMIT = "c" * 40
TOKEN = "hf_never_shown"
CARD = Path(__file__).parents[1] / "results" / "deploy" / "dq4.json"


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, `me/dq`; `sizes` are told in place of the true ones."""

    files: dict[str, bytes]
    sizes: dict[str, int]
    seen: list[str]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append(f"{self.command} {self.path} {self.headers.get('authorization')}")
        where, found = self.path.partition("?")[0], b"{}"
        url = f"http://{self.headers['host']}/me/dq"
        if where == "/api/repos/create":
            asked = json.loads(body)  # older clients: "private"
            self.seen.append(asked.get("visibility") or f"private={asked['private']}")
            found = json.dumps({"url": url}).encode()
        elif where.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            found = json.dumps({"files": modes}).encode()
        elif where.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            found = json.dumps(
                {"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT}
            ).encode()
        elif where == "/api/models/me/dq":
            found = json.dumps({"id": "me/dq", "sha": COMMIT}).encode()
        elif where == f"/api/models/me/dq/tree/{COMMIT}":
            sizes = {name: len(content) for name, content in self.files.items()} | self.sizes
            entries = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
            folder = {"type": "directory", "path": "x.onnx", "oid": "d"}
            found = json.dumps([*entries, folder]).encode()
        elif where.startswith(f"/me/dq/resolve/{COMMIT}/"):
            found = self.files[where.rpartition("/")[2]]
        self.send_response(404 if "gone" in where else 200)
        headers = {"ETag": f'"{hash(found)}"', "X-Repo-Commit": COMMIT}
        headers |= {"X-Error-Code": "RepoNotFound"} if "gone" in where else {}
        for name, value in {**headers, "Content-Length": str(len(found))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found)

    do_GET = answer  # noqa: N815
    do_POST = answer  # noqa: N815
    do_HEAD = answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def live_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is there, and someone has logged in."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    kind: type[Hub] = type("Own", (Hub,), {"files": {}, "sizes": {}, "seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as own:
        threading.Thread(target=own.serve_forever, daemon=True).start()
        live_at(f"http://127.0.0.1:{own.server_port}", monkeypatch)
        yield kind
        own.shutdown()


SCORES = (("clean", 0.0, 24, 0.0), ("FGSM", 8 / 255, 9, 0.0), ("PGD-20", 8 / 255, 8, 0.5))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dq"
    config = TrainConfig(epochs=1, batch_size=64, device="cpu")
    train_run(ModelConfig("wrn-10-1", 4), DataConfig(train_images=64), config, folder, show=False)
    for attack, eps, right, vanishing in SCORES:
        m = Measurement(
            "dq", "vanilla", "wrn-10-1", 4, 0.0, 0, "digits | x", "f00", attack, eps, attack, right,
            30, vanishing,
        )  # fmt: skip
        append(folder / "results.jsonl", m)
    append(folder / "results.jsonl", replace(m, attack="BIM", evidence={"weights_sha256": "x"}))
    return folder


def read(source: Path) -> tuple[ModelCard, Any]:
    """The card, and its front matter by the Hub's own reader."""
    card = ModelCard(hub.model_card(source, "me/dq"))
    return card, card.data


def test_the_card_says_what_was_measured(run: Path) -> None:
    """A masked accuracy is in the table alone, one of other weights nowhere."""
    card, data = read(run)
    assert "BIM" not in card.content
    assert data.model_name == "dq"
    for result, (attack, eps, right, _) in zip(data.eval_results, SCORES[:2], strict=True):
        low, high = Score(right, 30).interval
        args = {"low": low, "high": high, "correct": right, "total": 30, "attack": attack}
        assert args.items() <= result.metric_args.items()
        assert (result.metric_value, result.metric_args["eps"]) == (right / 30, eps)
        assert (result.dataset_name, result.dataset_args) == ("digits | x", {"fingerprint": "f00"})
    low, high = Score(8, 30).interval
    row = f"| digits \\| x | PGD-20 8/255 | 26.7% † | {low:.1%} to {high:.1%} | 30 |"
    assert row in card.content and "† Masked" in card.content


def test_the_card_of_a_file_has_the_numbers_of_the_file(tmp_path: Path) -> None:
    shutil.copy(CARD, tmp_path)
    (card, data), scores = read(tmp_path / "dq4.onnx"), json.loads(CARD.read_text())["scores"]
    shares = [right / total for right, total in (score["deployed"] for score in scores)]
    assert [result.metric_value for result in data.eval_results] == shares
    assert "15 of 15 convolutions in integers" in card.text and "onnx" in data.tags


def test_a_run_comes_back_as_it_went(
    run: Path, server: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = call(capsys, "push", str(run), "me/dq")
    assert (status, out) == (0, [f"{constants.ENDPOINT}/me/dq"])
    assert {"private", "private=True"} & {*server.seen} and server.seen[-1].endswith(TOKEN)
    names = {"checkpoint.safetensors", "results.jsonl", "config.json", "log.jsonl"}
    assert server.files.keys() == names | {"README.md"}
    server.files |= {"evil.pkl": b"cos\nsystem", "a\x1b[2J.bin": b""}
    status, out, err = call(capsys, "pull", "me/dq", "--out", str(tmp_path / "back"))
    assert (status, out) == (0, [str(tmp_path / "back")])
    assert err == ["defquant: left there, as nothing of ours: a\\x1b[2J.bin, evil.pkl"]
    assert {path.name for path in (tmp_path / "back").iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["back"]
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (run / name).read_bytes()
    assert "not empty" in refused(capsys, "pull", "me/dq", "--out", str(tmp_path / "back"))


def cut(server: type[Hub], name: str) -> None:
    server.files[name] = server.files[name][:-9]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda s: cut(s, "checkpoint.safetensors"), "is not a whole safetensors file"),
        (
            lambda s: s.files.update({"results.jsonl": b'{"run": 1}\n'}),
            "me/dq/results.jsonl, line 1: method",
        ),
        (lambda s: s.files.update({"diagnosis.json": b"["}), "is not JSON"),
        (lambda s: s.sizes.update({"checkpoint.safetensors": 1 << 40}), "at most 4,294,967,296"),
        (lambda s: s.sizes.update({"results.jsonl": 3}), "results.jsonl is not of the size"),
        (lambda s: s.files.update({"evil.onnx": b"x"}), "is not a whole ONNX model"),
        (lambda s: s.files.clear(), "holds no run and no ONNX file"),
        (lambda s: s.files.update({"../results.jsonl": b"x"}), ""),
    ],
)
def test_what_is_broken_there_never_arrives(
    harm: Any, message: str, run: Path, server: type[Hub], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = ("checkpoint.safetensors", "results.jsonl")
    server.files |= {name: (run / name).read_bytes() for name in names}
    harm(server)
    if message:
        assert message in refused(capsys, "pull", "me/dq", "--out", str(tmp_path / "back"))
        assert not list(tmp_path.iterdir())
    else:
        assert main(["pull", "me/dq", "--out", str(tmp_path / "back")]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["back"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pull me/gone --out {tmp}/x", "cannot read me/gone (RepositoryNotFoundError"),
        ("pull gone", "names models OWNER/NAME; found 'gone'"),
        ("pull me/..", "names models OWNER/NAME"),
        ("push {tmp} me/dq", "no checkpoint at"),
        ("push {tmp}/none.onnx me/dq", "no file"),
    ],
)
def test_mistakes_are_one_line_without_the_token(
    words: str, message: str, server: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *words.format(tmp=tmp_path).split())
    assert message in said and TOKEN not in said


def test_no_network_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live_at(f"http://127.0.0.1:1/{TOKEN}", monkeypatch)
    said = refused(capsys, "pull", "me/dq", "--out", str(tmp_path / "x"))
    assert "see that the name is right, the network is there" in said and TOKEN not in said
