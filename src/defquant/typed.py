"""Text from outside as values, and values as annotations say: one reader for JSON and YAML.

What these functions return can be walked, compared, written and shown without a surprise. What
cannot be is a `UserError` that says where it stands.
"""

import json
import math
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from defquant.errors import UserError, near, shown

__all__ = [
    "NOT_NEGATIVE", "POSITIVE", "UNIT", "Rule", "check_fields", "check_sound", "convert", "decode",
    "from_mapping", "parse_json", "parse_yaml", "written",
]  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What a number keeps to, beside its type, as in `Annotated[float, UNIT]`."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("must be positive", lambda x: x > 0)
NOT_NEGATIVE = Rule("must not be negative", lambda x: x >= 0)
UNIT = Rule("must lie in [0, 1]", lambda x: 0 <= x <= 1)

DEEPEST = 60  # lists and mappings within each other
_LARGEST = 1 << 63
_SUSPECT = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")

_T = TypeVar("_T")


def decode(content: bytes, where: str) -> str:
    """`content` as text. Raises `UserError` where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} must be UTF-8; found byte 0x{content[error.start]:02x} at {error.start:,}: "
            "save it as UTF-8"
        ) from None


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; NaN and infinities are left to `convert`.

    Raises `UserError`, which begins with `where`: no JSON, a key that stands twice, lists in lists
    more than 60 deep, a whole number beyond 64 bits, a text with NUL or half a character.
    """
    load = partial(json.loads, text, object_pairs_hook=_once, parse_int=_whole)
    return _parse(text, where, "JSON", load)


def parse_yaml(text: str, where: str) -> Any:
    """The same of a YAML text; aliases are refused, as a few of them can stand for gigabytes."""
    return _parse(text, where, "YAML", lambda: yaml.load(text, _Loader))


def written(source: str, name: str) -> Any:
    """What stands in our own YAML file `name` beside the module `source`, its `__file__`."""
    return yaml.safe_load(Path(source).with_name(name).read_text("utf-8"))


def _parse(text: str, where: str, kind: str, load: Callable[[], Any]) -> Any:
    try:
        found = load()
    except (RecursionError, MemoryError):
        raise UserError(f"{where} is nested too deep to be ours; found {shown(text, 40)}") from None
    except (ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or error
        raise UserError(
            f"{where} is not {kind} ({shown(str(reason))}): it may be cut or edited; make it again"
        ) from None
    brackets = text.count("[") + text.count("{")
    if kind != "JSON" or brackets > DEEPEST or ("\\u" in text and _SUSPECT.search(text)):
        check_sound(found, where)
    return found


def _whole(digits: str) -> int:
    if len(digits) > 18 and not -_LARGEST < int(digits[:21]) < _LARGEST:
        raise ValueError(f"numbers have 64 bits; found {shown(digits, 40)}")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice, 40)} stands twice")
    return found


class _Loader(yaml.SafeLoader):
    """Without aliases and double keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases, as *name, are not read: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        pairs = [(str(key.value), None) for key, _ in node.value]
        _once(pairs)
        return super().construct_mapping(node, deep=deep)


def check_sound(value: Any, where: str) -> None:
    """Raise `UserError`: too deep, a number beyond 64 bits, a text with NUL or half a character."""
    layer = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for item in layer:
            if isinstance(item, str):
                if "\0" in item or re.search("[\ud800-\udfff]", item):
                    raise UserError(
                        f"{where}: a text cannot hold NUL or half a character; found {shown(item)}"
                    )
            elif isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                inner += item
            elif isinstance(item, int) and abs(item) >= _LARGEST:
                raise UserError(f"{where}: numbers have 64 bits; found {shown(item, 40)}")
        layer = inner
        if not layer:
            return
    raise UserError(f"{where} is nested more than {DEEPEST} deep: it is none of ours")


def from_mapping(kind: type[_T], values: object, where: str = "") -> _T:
    """The dataclass `kind` with its fields read from `values`; other keys are left alone.

    Raises `UserError`, `where` and the field first: a field is missing, of another type than its
    annotation, or out of the range that the class checks.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'settings: '}fields by name are needed; found {shown(values)}")
    known: dict[str, Any] = {}
    for name, annotation, required in _fields(kind):  # type: ignore[arg-type]
        if name in values:
            value = values[name]
            plain = annotation is str and type(value) is str  # most of all, and alike
            known[name] = sys.intern(value) if plain else convert(annotation, value, where + name)
        elif required:
            raise UserError(f"{where}{name} is missing")
    try:
        return kind(**known)
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def check_fields(record: Any) -> None:
    """`convert` each field of a frozen dataclass in place; for the head of a `__post_init__`."""
    for name, annotation, _ in _fields(type(record)):  # type: ignore[arg-type]
        object.__setattr__(record, name, convert(annotation, getattr(record, name), name))


def convert(kind: Any, value: Any, name: str) -> Any:
    """`value` as the annotation `kind`: lists become tuples, mappings dataclasses.

    Numbers are finite, have 64 bits and keep to each `Rule`. Raises `UserError`: `name` must be
    this, that was found.
    """
    if type(value) is kind and (
        kind in (str, bool) or (kind is float and math.isfinite(value))
        or (kind is int and abs(value) < _LARGEST)
    ):  # fmt: skip
        return value
    if get_origin(kind) is Annotated:
        inner, *rules = get_args(kind)
        value = convert(inner, value, name)
        for rule in rules:
            if isinstance(rule, Rule) and not rule.holds(value):
                raise UserError(f"{name} {rule.words}; found {value!r}")
        return value
    if (found := _as(kind, value, name)) is not MISSING:
        return found
    words = f"'{shown(value, 78)}'" if isinstance(value, str) else shown(value)
    if isinstance(value, str):  # a slip of one name among several
        words += near(value, [one for one in get_args(kind) if isinstance(one, str)])
    raise UserError(f"{name} must be {_words(kind)}; found {words}")


def _as(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`, or `MISSING` where it is none; errors are those of parts of it."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (kind in (None, type(None)) and value is None):
        return value
    if kind is float and isinstance(value, Real) and not isinstance(value, bool | Integral):
        return float(value) if math.isfinite(value) else MISSING
    if kind in (int, float) and isinstance(value, Integral) and not isinstance(value, bool):
        whole = abs(int(value)) < _LARGEST
        return int(value) if whole else MISSING if kind is int else convert(int, value, name)
    if origin is Literal:
        return value if any(type(value) is type(one) and value == one for one in inner) else MISSING
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, name)
    if origin in (tuple, list, Sequence) and isinstance(value, list | tuple):
        kinds = inner if origin is tuple and inner[-1] is not ... else inner[:1] * len(value)
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(convert(one, item, f"{name}[{i}]") for i, (one, item) in pairs)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        if inner == (str, Any) and all(type(k) is str for k in value):  # evidence
            return dict(value)
        return {convert(inner[0], k, name): convert(inner[1], v, f"{name}.{shown(k, 40)}")
                for k, v in value.items()}  # fmt: skip
    elif isinstance(kind, type) and is_dataclass(kind):
        return value if isinstance(value, kind) else from_mapping(kind, value, f"{name}.")
    return MISSING


def _one_of(kinds: Sequence[Any], value: Any, name: str) -> Any:
    some = [one for one in kinds if one is not type(None)]
    if value is None and len(some) < len(kinds):
        return None
    if len(some) == 1 and (is_dataclass(some[0]) or get_origin(some[0]) is Annotated):
        return convert(some[0], value, name)  # whose error says more
    for one in some:
        with suppress(UserError):
            return convert(one, value, name)
    return MISSING


@cache
def _fields(kind: Any) -> tuple[tuple[str, Any, bool], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        (f.name, hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(kind)
    )


def _words(kind: Any) -> str:
    """What a person would call a value of this annotation."""
    names = {int: "a whole number of 64 bits", float: "a finite number", bool: "true or false",
             str: "a text", type(None): "none"}  # fmt: skip
    inner = get_args(kind)
    if get_origin(kind) is Annotated:
        return _words(inner[0])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if get_origin(kind) in (tuple, list, Sequence):
        count = "" if inner[-1] is ... or get_origin(kind) is not tuple else f"{len(inner)} "
        return f"a list of {count}values, each {_words(inner[0])}"
    return names.get(kind, "fields by name")
