"""Downloads, with servers that behave and servers that do not; no test leaves this machine."""

import hashlib
import http.client
import io
import sys
import tarfile
import threading
import urllib.error
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conftest import refused
from defquant.data import fetch

MODULE = sys.modules["defquant.data.fetch"]  # the package's attribute of this name is the function


def pack(members: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return buffer.getvalue()


class Response(io.BytesIO):
    def __init__(self, content: bytes, length: int | None = None) -> None:
        super().__init__(content)
        self.headers = {} if length is None else {"Content-Length": str(length)}


class Server:
    """Stands in for urlopen: serves `content` and counts the calls."""

    def __init__(self, content: bytes, length: int | None = None) -> None:
        self.content, self.length, self.calls = content, length, 0

    def __call__(self, url: str, timeout: float) -> Response:
        assert 0 < timeout < 120
        self.calls += 1
        return Response(self.content, self.length)


def official(monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    """Make `content` what the archives of `name` must hash to."""
    md5 = hashlib.md5(content).hexdigest()
    host, files = MODULE._ARCHIVES[name]
    monkeypatch.setitem(MODULE._ARCHIVES, name, (host, dict.fromkeys(files, md5)))


def fails(root: Path, opener: Any, *parts: str, name: str = "cifar10") -> None:
    refused(lambda: fetch(name, root, opener=opener, show_progress=False), *parts)


def test_cifar_is_downloaded_once_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = pack({"cifar-10-batches-py/test_batch": b"one", "cifar-10-batches-py/a": b"two"})
    official(monkeypatch, "cifar10", content)
    server = Server(content, len(content))
    root = tmp_path / "new" / "data"
    assert fetch("cifar10", root, opener=server) == root
    output = capsys.readouterr()
    assert output.out == ""
    assert "cifar-10-python.tar.gz" in output.err
    batch = root / "cifar-10-batches-py" / "test_batch"
    assert batch.read_bytes() == b"one"
    assert (root / "cifar-10-python.tar.gz").read_bytes() == content
    before = batch.stat().st_mtime_ns
    (root / "cifar-10-batches-py" / "a").unlink()
    fetch("cifar10", str(root), opener=server, show_progress=False)
    assert server.calls == 1
    assert batch.stat().st_mtime_ns == before
    assert (root / "cifar-10-batches-py" / "a").read_bytes() == b"two"
    (root / "cifar-10-python.tar.gz").write_bytes(b"damaged")
    fetch("cifar10", root, opener=server, show_progress=False)
    assert server.calls == 2


def test_wrong_hash_leaves_no_file(tmp_path: Path) -> None:
    place, found = tmp_path / "cifar-10-python.tar.gz", hashlib.md5(b"other").hexdigest()
    url, md5 = f"https://www.cs.toronto.edu/~kriz/{place.name}", "c58f30108f718f92721af3b95e74349a"
    fails(tmp_path, Server(b"other"), url, md5, found, str(place), "by hand")
    assert list(tmp_path.iterdir()) == []


def test_cut_transfer_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(b"former")
    fails(tmp_path, Server(b"12345", 1000), "cut after 5 of 1,000", "by hand", name="svhn")
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


class Breaking(Response):
    """Raises `error` where it is read; without one it has no end."""

    def __init__(self, error: BaseException | None = None, length: int | None = None) -> None:
        super().__init__(b"", length)
        self.error = error

    def read(self, size: int | None = -1, /) -> bytes:
        if self.error:
            raise self.error
        return bytes(size or 0)


@pytest.mark.parametrize("length", [None, 1 << 40])
def test_a_body_without_end_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int | None
) -> None:
    monkeypatch.setattr(MODULE, "_DOWNLOAD", 3 * MODULE._CHUNK)
    body = Breaking(length=length)
    fails(tmp_path, lambda url, timeout: body, "sends more than 3,145,728 bytes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError(OSError(101, "Network is unreachable")),
        urllib.error.HTTPError("http://x", 404, "Not Found", http.client.HTTPMessage(), None),
        TimeoutError("timed out"),
        ConnectionResetError(104, "Connection reset by peer"),
        http.client.IncompleteRead(b"12"),
        http.client.BadStatusLine("what\nis this"),
    ],
)
@pytest.mark.parametrize("while_reading", [False, True])
def test_network_errors(tmp_path: Path, error: Exception, while_reading: bool) -> None:
    def opener(url: str, timeout: float) -> Response:
        if while_reading:
            return Breaking(error)
        raise error

    fails(tmp_path, opener, "http://ufldl.stanford.edu/", str(tmp_path), "by hand", name="svhn")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_no_file(tmp_path: Path) -> None:
    stopped = Breaking(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fetch("svhn", tmp_path, opener=lambda url, timeout: stopped, show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_network_error_and_names_are_known(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    fails(blocked, Server(b""), "cannot write")
    fails(tmp_path, Server(b""), "'digits'", "cifar10, svhn", name="digits")


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (pack({"../escaped": b"x"}), "'../escaped'"),
        (pack({"a/../../escaped": b"x"}), "'a/../../escaped'"),
        (pack({"/tmp/escaped": b"x"}), "'/tmp/escaped'"),
        (pack({}, special("link", tarfile.SYMTYPE, "..")), "files and folders only; found 'link'"),
        (pack({}, special("hard", tarfile.LNKTYPE, "../x")), "'hard'"),
        (pack({}, special("device", tarfile.CHRTYPE)), "'device'"),
        (pack({}, special("pipe", tarfile.FIFOTYPE)), "'pipe'"),
    ],
    ids=range(7),  # archives hold the time
)
def test_harmful_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, found: str
) -> None:
    official(monkeypatch, "cifar10", content)
    root = tmp_path / "root"
    fails(root, Server(content), found, "not the official archive")
    assert [p.name for p in root.iterdir()] == ["cifar-10-python.tar.gz"]
    assert list(tmp_path.iterdir()) == [root]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official(monkeypatch, "svhn", b"matlab")
    served, root = tmp_path / "served", tmp_path / "root"
    served.mkdir()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=served)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def opener(url: str, timeout: float) -> Any:
            here = f"http://127.0.0.1:{server.server_port}/{url.rsplit('/', 1)[1]}"
            return direct.open(here, timeout=timeout)

        fails(root, opener, "404", "File not found", "by hand", name="svhn")
        for name in ("train_32x32.mat", "test_32x32.mat"):
            (served / name).write_bytes(b"matlab")
        fetch("svhn", root, opener=opener, show_progress=False)
        server.shutdown()
        thread.join()
    assert (root / "test_32x32.mat").read_bytes() == b"matlab"
