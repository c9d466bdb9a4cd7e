"""Fixtures of the exporter's tests: TensorRT for RTX, and the plugin library for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasa_trt.plugins import plugin_library
from tests.plugin_library import compile_stub_plugin


@pytest.fixture(scope="session")
def stub_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub_plugin(tmp_path_factory.mktemp("plugin"))


@pytest.fixture
def plugin_named(stub_plugin: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if the user had named the library."""
    monkeypatch.setenv(plugin_library.VARIABLE, str(stub_plugin))
    return stub_plugin


@pytest.fixture
def no_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if there were no plugin library, and no compiler to make one."""
    monkeypatch.delenv(plugin_library.VARIABLE, raising=False)
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path / "empty-cache"))
    monkeypatch.setenv("FLASHINFER_ROOT", str(tmp_path / "nowhere"))
