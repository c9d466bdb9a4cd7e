"""The one exception that users are meant to see."""

from __future__ import annotations


class FasaError(Exception):
    """Something the user can mend: the message says what is wrong, the hint what to do about it.

    The command line prints it as one line and exits with status 1; the Python API lets it propagate.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} ({hint})")
        self.hint = hint
