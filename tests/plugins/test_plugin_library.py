"""Which file is the plugin library, and how a TensorRT gets to know it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fasa_trt.core.engine_dir import sha256
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import library, plugin_library, toolchain
from fasa_trt.plugins.plugin_library import CREATOR, describe, find, load, missing, provide

pytestmark = pytest.mark.skipif(toolchain.WINDOWS, reason="the stand-in for nvcc is a POSIX script")


@pytest.fixture
def adapter(tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretended compiler, kernels for heads of 64 and 128 dims, and a plugin around them."""
    folder = tools / "tensorrt"
    folder.mkdir()
    (folder / "plugin.cpp").write_text("// the plugin\n")
    monkeypatch.setattr(library, "TENSORRT", folder)
    for name in ("TENSORRT_ROOT", plugin_library.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return tools


def test_what_was_built_is_found(adapter: Path) -> None:
    assert find(64) is None and find(64, "90") is None
    built = library.build_plugin("90", (64,))
    assert find(64, "90") == find(64) == built
    assert find(64, "80") is None and find(128) is None
    everything = library.build_plugin("80")
    assert find(64, "80") == find(128) == everything


def test_the_variable_names_a_library(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = library.build_plugin("90", (64,))
    (adapter / "mine.so").write_bytes(b"library")
    monkeypatch.setenv(plugin_library.VARIABLE, str(adapter / "mine.so"))
    assert find(64) == find(128, "80") == provide(64) == (adapter / "mine.so").resolve() != built
    monkeypatch.setenv(plugin_library.VARIABLE, str(adapter / "gone.so"))
    with pytest.raises(FasaError, match="FASA_TRT_PLUGIN names .*gone.so, which is no file"):
        find(64)
    assert "which is no file" in str(missing(64, "90"))


def test_a_library_is_compiled_where_there_is_none(adapter: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    assert missing(64, "90") is None
    built = provide(64, "90", progress=lambda *step: seen.append(step))
    assert built == library.path("90", (64,), plugin=True) and built.is_file()
    assert seen[-1][1:] == (4, 4)
    assert provide(64) == built, "any will do"


def test_what_is_missing(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no GPU here" in str(missing(64))
    with pytest.raises(FasaError, match="no plugin library is at hand, and no GPU here"):
        provide(64)
    assert "no kernels for head_dim 80" in str(missing(80, "90"))
    assert "unknown GPU architecture '75'" in str(missing(64, "75"))
    monkeypatch.setenv("TENSORRT_ROOT", str(adapter))
    assert "TENSORRT_ROOT names" in str(missing(64, "90"))
    monkeypatch.delenv("TENSORRT_ROOT")
    monkeypatch.setenv("FLASHINFER_ROOT", str(adapter / "nowhere"))
    assert "FLASHINFER_ROOT names" in str(missing(64, "90"))
    monkeypatch.setenv("PATH", "")
    assert "no CUDA compiler" in str(missing(64, "90"))


def test_description(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (library.build_plugin(architecture, (64,)) for architecture in ("80", "90"))
    facts = describe(first)
    assert facts == {"name": first.name, "sha256": sha256(first), "version": "1", "sources": facts["sources"]}
    assert describe(second)["sources"] == facts["sources"], "the same kernels for another GPU"
    (adapter / "kernels" / "dense.cuh").write_text("// edited\n")
    assert plugin_library.source_digest() != facts["sources"]
    (adapter / "mine.so").write_bytes(b"library")
    assert describe(adapter / "mine.so")["sources"] is None, "nobody knows what it was built from"
    monkeypatch.setenv(plugin_library.VARIABLE, str(first))
    assert describe(first)["sources"] is None


class Registry:
    """IPluginRegistry: silent when it fails, and one library at a time."""

    def __init__(self, contains: str = "FasaAttention") -> None:
        self.contains, self.loaded, self.creators = contains, list[str](), dict[str, object]()

    def load_library(self, file: str) -> object:
        self.loaded.append(file)
        self.creators.setdefault(self.contains, object())
        return file

    def deregister_library(self, handle: object) -> None:
        assert handle == self.loaded[-1]
        self.creators.clear()

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        assert (name, version, namespace) == CREATOR
        return self.creators.get(name)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(plugin_library, "_loaded", {})
    monkeypatch.setattr(ctypes, "CDLL", lambda file: file)
    return Registry()


def tensorrt(registry: Registry) -> Any:
    return SimpleNamespace(__name__="tensorrt", get_plugin_registry=lambda: registry)


def test_one_library_at_a_time(registry: Registry) -> None:
    for name in ("a.so", "a.so", "b.so"):
        load(tensorrt(registry), Path(name))
        assert registry.creators.keys() == {"FasaAttention"}
    assert registry.loaded == ["a.so", "b.so"]


def test_a_creator_that_is_there_stays(registry: Registry) -> None:
    registry.creators["FasaAttention"] = object()
    load(tensorrt(registry), Path("a.so"))
    assert registry.loaded == []


def test_a_library_without_the_plugin(registry: Registry) -> None:
    registry.contains = "SomethingElse"
    with pytest.raises(FasaError, match="a.so has no TensorRT plugin FasaAttention"):
        load(tensorrt(registry), Path("a.so"))


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_library, "_loaded", {})
    (tmp_path / "text.so").write_text("no library")
    registry = Registry()
    with pytest.raises(FasaError, match="the plugin library does not load: .*text.so"):
        load(tensorrt(registry), tmp_path / "text.so")
    assert registry.loaded == []
