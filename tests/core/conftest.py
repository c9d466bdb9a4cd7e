"""Fixtures of the tests of engine directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.engines_on_disk import build


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A small complete engine directory."""
    build(tmp_path / "engine")
    return tmp_path / "engine"
