"""What a user did wrong, in one line: the rule, the value found, the remedy."""

import importlib.util
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["DefquantWarning", "UserError", "near", "needs", "shown", "visible"]


def visible(text: str) -> str:
    """`text` on one line; what would move a cursor or turn the direction as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, limit: int = 80) -> str:
    """A foreign text, or the repr of another foreign value, as a message may hold it.

    One line of at most `limit` characters that can be seen. Every text that a file, a folder or a
    server gives, and a user did not type, goes through here into a message.
    """
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of 5,000 digits; nested too deep
        text = f"a {type(value).__name__}"
    text = visible(" ".join(text[: 20 * limit].split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def near(found: str, known: Iterable[str]) -> str:
    """` (did you mean train?)` for `tarin`; empty where no name is like the one found."""
    close = get_close_matches(found[:80].lower(), list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


class UserError(ValueError):
    """Bad input: the command line prints the message alone, on one line, and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(" ".join(message.split("\n"))))


class DefquantWarning(UserWarning):
    """A result is usable but easily misread; the message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(" ".join(message.split("\n"))))


def needs(extra: str, *packages: str) -> None:
    """Raise `UserError` where one of the packages of an extra is missing."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"this needs {name}: pip install 'defquant[{extra}]'")
