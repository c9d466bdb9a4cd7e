"""What TensorRT has timed is kept between builds. TensorRT for RTX, which has the same interface and times nothing,
stands in for TensorRT."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.export import tensorrt
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from fasa_trt.export.timing_cache import keep_timing_cache, timing_cache_file, use_timing_cache
from tests.engines import random_profile
from tests.models import make_model
from tests.plugin_engine import overrides_of

FLAGS = {"max_seq_len": 128, "max_batch_size": 2, "budget": 32, "sink": 2, "recent": 4, "dtype": "float16"}


class Config:
    """IBuilderConfig as far as caches go. stale: content that is of another GPU; broken: what cannot be read."""

    def __init__(self, stale: bytes = b"-", broken: bytes = b"-") -> None:
        self.stale, self.broken = stale, broken
        self.cache: Any = None

    def create_timing_cache(self, content: bytes) -> Any:
        return None if content == self.broken else [content]

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        fits: bool = cache[0] != self.stale
        self.cache = cache if fits else self.cache
        return fits

    def get_timing_cache(self) -> Any:
        class Cache:
            def serialize(self) -> bytes:
                return b"timed"

        return Cache()


def test_a_cache_is_read_and_kept(tmp_path: Path) -> None:
    file, config = tmp_path / "timing" / "a.cache", Config()
    use_timing_cache(config, file)
    assert config.cache == [b""]
    assert keep_timing_cache(config, file) is None
    use_timing_cache(config, file)
    assert config.cache == [b"timed"]
    assert [each.name for each in file.parent.iterdir()] == ["a.cache"]


@pytest.mark.parametrize("wrong", ["stale", "broken"])
def test_a_cache_of_no_use_is_left_aside(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "a.cache").write_bytes(b"old")
    config = Config(**{wrong: b"old"})
    use_timing_cache(config, tmp_path / "a.cache")
    assert config.cache == [b""]


def test_a_cache_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    lost = keep_timing_cache(Config(), tmp_path / "file" / "a.cache")
    assert lost is not None and "the timing cache is not kept: cannot write" in lost


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`import tensorrt` gives the interface of 10.14.1 by TensorRT for RTX."""
    rtx = pytest.importorskip("tensorrt_rtx")
    tensorrt.load_tensorrt("tensorrt_rtx")  # makes its parser find plugins
    module = ModuleType("tensorrt")
    module.__dict__.update({name: getattr(rtx, name) for name in dir(rtx) if not name.startswith("__")})
    module.__dict__["__version__"] = "10.14.1.48"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path / "cache"))
    return module


def build(tmp_path: Path, **flags: Any) -> EngineDirectory:
    if not (tmp_path / "checkpoint").exists():
        make_model("llama", tmp_path / "checkpoint", num_hidden_layers=1, **overrides_of("llama", 128))
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    config = BuildConfig.resolve(checkpoint, flags={**FLAGS, **flags})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of caches in TensorRT for RTX
        return build_engine(checkpoint, random_profile(checkpoint), config, tmp_path / "engine", force=True)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-llm"])
def test_tensorrt_builds_with_a_cache(target: str, tmp_path: Path, stand_in: ModuleType, plugin_named: Path) -> None:
    for _ in range(2):
        engine = build(tmp_path, target=target, arch="90")
        assert engine.model_file.name == "rank0.engine"
        assert b"FasaAttention" in engine.model_file.read_bytes()
        facts = engine.manifest["tensorrt"]
        assert (facts["builder"], facts["builder_version"], facts["architecture"]) == ("tensorrt", "10.14.1.48", "90")
        file = timing_cache_file(stand_in, "90")
        assert file == tmp_path / "cache" / "timing" / "tensorrt-10.14.1.48-sm90.cache"
        assert file.stat().st_size > 0


def test_the_wrong_tensorrt_leaves_nothing(
    tmp_path: Path, stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch, plugin_named: Path
) -> None:
    monkeypatch.setattr(stand_in, "__version__", "10.15.1")
    with pytest.raises(FasaError, match="TensorRT 10.15.1 will not do: 10.14.1 is needed"):
        build(tmp_path, target="tensorrt-llm")
    assert not (tmp_path / "engine").exists()


def test_a_builder_that_does_not_start(
    tmp_path: Path, stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch, plugin_named: Path
) -> None:
    """As TensorRT's without a GPU."""

    def refuse(log: Any) -> None:
        log.log(stand_in.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(stand_in, "Builder", refuse)
    with pytest.raises(FasaError, match="TensorRT cannot start: CUDA initialization failure with error: 35"):
        build(tmp_path, target="tensorrt")
    assert not (tmp_path / "engine").exists()
