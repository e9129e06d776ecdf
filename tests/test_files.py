import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from defquant.errors import UserError
from defquant.files import (
    append_line,
    owned_folder,
    read_json,
    write_bytes,
    write_json,
    write_whole,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "a.bin"
    write_bytes(target, b"old")

    def stops_half_way(path: Path) -> None:
        path.write_bytes(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(target, stops_half_way)
    assert target.read_bytes() == b"old"
    assert names(tmp_path / "sub") == ["a.bin"]
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new"


def test_what_a_kill_leaves_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    half = f"write_whole(Path({str(target)!r}), lambda p: (p.write_bytes(b'half'), "
    code = "import os; from pathlib import Path; from defquant.files import write_whole; " + half
    subprocess.run([sys.executable, "-c", code + "os.kill(os.getpid(), 9)))"], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "a.bin").read_bytes() == b"half"
    other = tmp_path / "b.bin"
    write_whole(other, lambda p: (p.write_bytes(b"b"), write_bytes(other, b"meanwhile")))
    assert names(tmp_path) == ["b.bin"]
    assert other.read_bytes() == b"b"  # what is in use stays


def test_full_disk_is_one_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})

    def full(path: Path) -> None:
        path.write_bytes(b"a bit")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"a\.json: No space left on device") as error:
        write_whole(target, full)
    assert "\n" not in str(error.value)
    assert read_json(target) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_device_that_is_full(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left"):
        append_line(Path("/dev/full"), {"a": 1})
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(blocked / "below", b"")


def test_cut_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"x\.json is not JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path / "none.json")


def _append_many(path: Path, who: int) -> None:
    for number in range(100):
        append_line(path, {"who": who, "number": number, "text": "x" * 500})


def test_parallel_writers_never_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 400
    for who in range(4):
        assert [r["number"] for r in records if r["who"] == who] == list(range(100))


def test_a_line_cut_by_a_crash_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    append_line(path, {"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'  # what is left can be read
    long = '{"text": "' + 9000 * "x"
    for tail in (long, "\0\0\0", long + "\0", '{"a": 3}\n\0'):  # NULs: the power was cut
        whole = tail.rstrip("\0") if tail.endswith("\n\0") else ""
        path.write_text('{"a": 1}\n' + tail)
        append_line(path, {"a": 2})
        assert path.read_text() == f'{{"a": 1}}\n{whole}{{"a": 2}}\n'


def test_a_line_is_on_the_disk_when_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    append_line(tmp_path / "lines.jsonl", {"a": 1})
    write_bytes(tmp_path / "whole", b"1")
    assert flushed == [(tmp_path / name).stat().st_ino for name in ("lines.jsonl", "whole", "")]


def test_a_folder_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        append_line(tmp_path / "removed" / "lines.jsonl", {"a": 1})
    assert names(tmp_path) == []


def test_what_people_wrote_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for text in (
        '{"a": 1}',
        "no line of ours",
        '{"a": 0}\n{"a": 1}',
        '{"a": "' + 9000 * "x" + '"}',
    ):
        path.write_text(text)  # no newline at the end: an editor left it out
        append_line(path, {"a": 2})
        assert path.read_text() == text + '\n{"a": 2}\n'


def test_one_folder_one_run(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from defquant.files import owned_folder\n"
        "with owned_folder(pathlib.Path(sys.argv[1])): print('mine', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(UserError, match="in use by another run"), owned_folder(tmp_path):
            pass
        other.kill()
        other.wait()
    with owned_folder(tmp_path):  # a killed run leaves no lock behind
        pass
