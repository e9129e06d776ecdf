"""Files are whole or as they were, lines are not mixed, folders have one owner."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import refused
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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_written_whole_or_not_at_all(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "sub" / "a.json"
    write_json(target, {"old": 1})

    def stops_half_way(path: Path) -> None:
        path.write_bytes(b"half of the new")
        raise error

    if isinstance(error, OSError):
        refused(lambda: write_whole(target, stops_half_way), "a.json: No space left")
    else:
        with pytest.raises(KeyboardInterrupt):
            write_whole(target, stops_half_way)
    assert read_json(target) == {"old": 1}
    assert names(tmp_path / "sub") == ["a.json"]
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


def test_a_device_that_is_full_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ')
    calls: dict[str, Callable[[], object]] = {
        "No space left": lambda: append_line(Path("/dev/full"), {"a": 1}),
        "cannot write": lambda: write_bytes(tmp_path / "x.json" / "below", b""),
        "null is a device or a pipe": lambda: write_bytes(Path("/dev/null"), b""),
        "x.json is not JSON": lambda: read_json(tmp_path / "x.json"),
        "cannot read": lambda: read_json(tmp_path / "none.json"),
        "No such file or directory": lambda: append_line(tmp_path / "removed" / "l", {"a": 1}),
    }
    for part, call in calls.items():
        refused(call, part)
    assert names(tmp_path) == ["x.json"]


def test_the_file_behind_a_link_is_replaced_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link", tmp_path / "there" / "file"
    link.symlink_to(file)
    write_bytes(link, b"new")
    assert link.is_symlink() and file.read_bytes() == b"new"


def _append_many(path: Path, who: int) -> None:
    for number in range(100):
        append_line(path, {"who": who, "number": number, "text": "x" * 500})


def test_parallel_writers_never_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, i)) for i in range(4)]
    for step in (multiprocessing.Process.start, multiprocessing.Process.join):
        for writer in writers:
            step(writer)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 400
    for who in range(4):
        assert [r["number"] for r in records if r["who"] == who] == list(range(100))


LONG = '{"text": "' + 9000 * "x"


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ('{"a": 1}\n{"a": ', '{"a": 1}\n'),
        ('{"a": 1}\n' + LONG, '{"a": 1}\n'),
        ('{"a": 1}\n\0\0\0', '{"a": 1}\n'),  # NULs: the power was cut
        ('{"a": 1}\n' + LONG + "\0", '{"a": 1}\n'),
        ('{"a": 1}\n{"a": 3}\n\0', '{"a": 1}\n{"a": 3}\n'),
        *((text, text + "\n") for text in  # no newline at the end: an editor left it out
          ('{"a": 1}', "no line of ours", '{"a": 0}\n{"a": 1}', LONG + '"}')),
    ],
)  # fmt: skip
def test_a_line_cut_by_a_crash_does_not_swallow_the_next(
    tmp_path: Path, before: str, kept: str
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(before)
    append_line(path, {"a": 2})
    assert path.read_text() == kept + '{"a": 2}\n'


def test_a_line_is_on_the_disk_when_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    append_line(tmp_path / "lines.jsonl", {"a": 1})
    write_bytes(tmp_path / "whole", b"1")
    assert flushed == [(tmp_path / name).stat().st_ino for name in ("lines.jsonl", "whole", "")]


def test_one_folder_one_run(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from defquant.files import owned_folder\n"
        "with owned_folder(pathlib.Path(sys.argv[1])): print('mine', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"mine\n"
        refused(owned_folder(tmp_path).__enter__, "in use by another run")
        other.kill()
        other.wait()
    with owned_folder(tmp_path):  # a killed run leaves no lock behind
        pass
