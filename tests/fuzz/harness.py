"""Files from elsewhere, mutated: a reader answers, or says in one line why not, within bounds.

Each input is read in a forked child, so that a dead process, a hang in native code or a flood of
memory is a failed test that names the bytes, not a lost test run.
"""

import mmap
import os
import random
import resource
import signal
import sys
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from defquant.errors import UserError

SECONDS = float(os.environ.get("DEFQUANT_FUZZ_SECONDS", "15"))
"""Of each reader; 15 keep all readers together under six minutes."""
PATIENCE = 5
"""Seconds of CPU time that one small input may take; twelve times as many on the clock."""
MEMORY = 256
"""MiB by which one small input may make the process grow."""
_ROOM = 1 << 22

Read = Callable[[bytes], object]


def fuzz(
    read: Read, seeds: Sequence[bytes], *, tokens: Sequence[bytes] = (), seconds: float = SECONDS
) -> None:
    """Give `read` mutated `seeds` (whole small files) for `seconds`; see `outcome`.

    `read` gets bytes: it wraps them (gzip, CRCs), writes them to a file and calls the reader.
    `tokens` are words of the format that are put in: numbers, braces, names of fields. Draws
    depend on the seeds alone. Before each seed itself, which must be read, is tried.
    """

    def inputs() -> Iterator[bytes]:
        end, rng = time.monotonic() + seconds, random.Random(0)
        while time.monotonic() < end:
            yield mutated(rng, seeds, tokens)

    for whole in seeds:
        assert outcome(read, whole) is None, f"a valid file was refused: {outcome(read, whole)}"
    _in_child(read, inputs())


def outcome(read: Read, raw: bytes) -> str | None:
    """None where `read(raw)` returns, and the message where it raises a `UserError` of one line.

    Fails for any other error, for a message with control characters, for a dead process, and
    beyond `PATIENCE` and `MEMORY`.
    """
    return _in_child(read, [raw])


def mutated(rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes] = ()) -> bytes:
    """One to four changes to one of `seeds`."""
    raw = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change(rng, raw, rng.choice(seeds), tokens)
    return bytes(raw[: _ROOM - 8])


def _change(rng: random.Random, raw: bytearray, other: bytes, tokens: Sequence[bytes]) -> None:
    kinds = ("bit", "byte", "number", "cut", "gap", "again", "noise", "splice", "token", "token")
    kind, place = rng.choice(kinds if tokens else kinds[:-2]), rng.randrange(len(raw) + 1)
    if kind in ("bit", "byte") and place < len(raw):
        odd = (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))
        raw[place] = raw[place] ^ 1 << rng.randrange(8) if kind == "bit" else rng.choice(odd)
    elif kind == "number":  # a length, a count or an offset that cannot be
        size, ends = rng.choice((2, 4, 8)), rng.choice(_ENDS)
        value = rng.choice((0, 1, -1, 1 << 15, 1 << 28, (1 << 31) - 1, 1 << 31, 1 << 62))
        raw[place : place + size] = (value % (1 << (8 * size))).to_bytes(size, ends)
    elif kind == "cut":
        del raw[place:]
    elif kind == "gap":
        del raw[place : place + rng.choice((1, 4, 64))]
    elif kind == "again":
        part = raw[place : place + rng.choice((1, 8, 256))]
        raw[place:place] = part * rng.choice((1, 1, 2, 200))
    elif kind == "noise":
        raw[place:place] = rng.randbytes(rng.choice((1, 4, 32)))
    elif kind == "splice":
        raw[place:] = other[rng.randrange(len(other) + 1) :]
    elif kind == "token":  # put in, or in the place of what stands there
        word = rng.choice(tokens)
        raw[place : place + rng.choice((0, 1, len(word)))] = word


_ENDS: tuple[Literal["little"], Literal["big"]] = ("little", "big")


def _in_child(read: Read, inputs: Sequence[bytes] | Iterator[bytes]) -> str | None:
    """Read `inputs` one after the other in a fork; what `outcome` says of the last."""
    with mmap.mmap(-1, _ROOM) as current, mmap.mmap(-1, 1 << 16) as said:
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of threads; the child starts none
            child = os.fork()
        if not child:
            code = 3
            try:
                code = _read_all(read, inputs, current, said)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        text = said[4:][: int.from_bytes(said[:4], "little")].decode()
        raw = current[8:][: int.from_bytes(current[:8], "little")]
    if -code in (signal.SIGALRM, signal.SIGPROF):
        text = f"still at it after {PATIENCE} s"
    elif code < 0:
        text = f"the process died of {signal.Signals(-code).name}"
    start = raw if len(raw) < 2000 else raw[:2000] + b"..."
    assert code in (0, 1), f"{text}\n{len(raw)} bytes: {start!r}"
    return text if code else None


def _read_all(
    read: Read, inputs: Sequence[bytes] | Iterator[bytes], current: mmap.mmap, said: mmap.mmap
) -> int:
    """0: the last input was read; 1: refused in one line; 2: a fault."""
    for kind in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(kind, signal.SIG_DFL)  # ends the process, whatever runs
    room = _size() + (4 << 30)  # address space: the machine's own safety, not the bound
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))
    text, code = "", 0
    for raw in inputs:
        current[8 : 8 + len(raw)] = raw
        current[:8] = len(raw).to_bytes(8, "little")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.alarm(12 * PATIENCE)
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        text, code = _one(read, raw)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        if code < 2 and grown > MEMORY:
            text, code = f"took {grown} MiB", 2
        if code == 2:
            break
    line = text.encode(errors="backslashreplace")[-60_000:]
    said[4 : 4 + len(line)] = line
    said[:4] = len(line).to_bytes(4, "little")
    return code


def _one(read: Read, raw: bytes) -> tuple[str, int]:
    try:
        read(raw)
    except UserError as error:
        text = str(error)
        control = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        if control or len(text) > 1000:
            return f"not one short line: {text[:1000]!r}", 2
        return text, 1
    except BaseException:
        return traceback.format_exc(), 2
    return "", 0


def _size() -> int:
    """Address space of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * resource.getpagesize()
