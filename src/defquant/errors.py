"""What a user did wrong, in one line: the rule, the value found, the remedy."""

__all__ = ["DefquantWarning", "UserError"]


class UserError(ValueError):
    """Bad input: the command line prints the message alone and exits with 2."""


class DefquantWarning(UserWarning):
    """A result is usable but easily misread; the message says why."""
