"""Building the plugin library. A script stands in for nvcc (see tests/plugins/conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import library, toolchain

pytestmark = pytest.mark.skipif(toolchain.WINDOWS, reason="the stand-in for nvcc is a POSIX script")


@pytest.fixture
def adapter(tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder above kernels and a plugin that uses them."""
    folder = tools / "tensorrt"
    folder.mkdir()
    (folder / "plugin.cpp").write_text('#include "tensorrt.h"\n')
    (folder / "tensorrt.h").write_text("#if FASA_TENSORRT_HEADERS\n#endif\n")
    (folder / "step.cpp").write_text('#include "../kernels/api.h"\n')
    (folder / "positions.cu").write_text("// a kernel\n")
    monkeypatch.setattr(library, "TENSORRT", folder)
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    return tools


def commands(tools: Path) -> dict[str, str]:
    """What nvcc was asked since the last call, by the file it made something of."""
    log = tools / "bin" / "log"
    lines = log.read_text().splitlines() if log.is_file() else []
    log.unlink(missing_ok=True)
    return {
        line.split(" -c ")[-1].split(" -o ")[0].rsplit("/", 1)[-1] if " -c " in line else "link": line for line in lines
    }


def headers(folder: Path, version: str) -> None:
    for name in toolchain.TENSORRT_HEADERS:
        (folder / "include").mkdir(parents=True, exist_ok=True)
        (folder / "include" / name).write_text(version)


def test_the_kernels_objects_are_shared(adapter: Path) -> None:
    kernels = library.build("90", (64,))
    commands(adapter)
    plugin = library.build_plugin("90", (64,))
    assert sorted(commands(adapter)) == ["link", "plugin.cpp", "positions.cu", "step.cpp"]
    assert plugin.name.startswith("libfasa_trt_plugin-sm90-64-")
    assert plugin != kernels
    assert library.path("90", (64,), plugin=True) == plugin == library.build_plugin("90", (64,))
    assert commands(adapter) == {}


def test_a_kernels_header_belongs_to_what_includes_it_from_beside(adapter: Path) -> None:
    before = library.build_plugin("90", (64,))
    commands(adapter)
    (adapter / "kernels" / "api.h").write_text("#pragma once\n// edited\n")
    assert library.build_plugin("90", (64,)) != before
    assert sorted(commands(adapter)) == ["api.cu", "link", "step.cpp"]


def test_tensorrts_headers_are_used_where_they_are(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = library.build_plugin("90", (64,))
    assert "TENSORRT" not in commands(adapter)["plugin.cpp"]
    monkeypatch.setenv("TENSORRT_ROOT", str(adapter / "sdk"))
    headers(adapter / "sdk", "10.14")
    first = library.build_plugin("90", (64,))
    asked = commands(adapter)
    assert sorted(asked) == ["link", "plugin.cpp"]
    assert f"-I{adapter / 'sdk' / 'include'} -DFASA_TENSORRT_HEADERS=1" in asked["plugin.cpp"]
    headers(adapter / "sdk", "11.1")
    assert len({without, first, library.build_plugin("90", (64,))}) == 3
    assert sorted(commands(adapter)) == ["link", "plugin.cpp"]


def test_a_tensorrt_without_headers_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(adapter))
    with pytest.raises(FasaError, match="TENSORRT_ROOT names .* lacks include/NvInferRuntime.h"):
        library.build_plugin("90", (64,))
    library.build("90", (64,))  # which needs none


def test_without_a_compiler_the_newest_build_is_found(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = library.build_plugin("90", (64, 128))
    library.build("90", (64, 128))
    monkeypatch.setenv("PATH", "")
    toolchain.nvcc_version.cache_clear()
    assert library.build_plugin("90", (128,)) == built
