"""The message that users see is one line: what is wrong, then what to do."""

from __future__ import annotations

from fasa_trt.core.errors import FasaError


def test_hint_follows_the_message() -> None:
    error = FasaError("no such file", hint="make one")
    assert str(error) == "no such file (make one)"
    assert error.hint == "make one"


def test_without_hint() -> None:
    error = FasaError("no such file")
    assert str(error) == "no such file"
    assert error.hint is None
