"""The cache of what the compiler builds. A script stands in for nvcc (see conftest.py)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import library, toolchain

pytestmark = pytest.mark.skipif(toolchain.WINDOWS, reason="the stand-in for nvcc is a POSIX script")


def runs(tools: Path) -> list[str]:
    """What nvcc was asked to make since the last call."""
    log = tools / "bin" / "log"
    lines = log.read_text().splitlines() if log.is_file() else []
    log.unlink(missing_ok=True)
    return [line.split(" -c ")[-1].split(" -o ")[0].rsplit("/", 1)[-1] if " -c " in line else "link" for line in lines]


def test_builds_only_the_head_dims_that_are_asked_for(tools: Path) -> None:
    library.build("90", (64,))
    assert sorted(runs(tools)) == ["api.cu", "dense_64.cu", "link", "score.cu"]


def test_a_second_head_dim_reuses_what_is_common(tools: Path) -> None:
    first = library.build("90", (64,))
    runs(tools)
    second = library.build("90", (64, 128))
    assert sorted(runs(tools)) == ["api.cu", "dense_128.cu", "link"]
    assert first != second
    assert library.build("90", (128, 64, 64)) == second
    assert runs(tools) == []


def test_another_architecture_shares_nothing(tools: Path) -> None:
    library.build("90", (64,))
    runs(tools)
    library.build("80", (64,))
    assert len(runs(tools)) == 4


def test_force_compiles_again(tools: Path) -> None:
    library.build("90", (64,))
    runs(tools)
    library.build("90", (64,), force=True)
    assert len(runs(tools)) == 4


def test_an_edited_header_rebuilds_what_includes_it(tools: Path) -> None:
    before = library.build("90", (64, 128))
    runs(tools)
    (tools / "kernels" / "dense.cuh").write_text("#include <flashinfer/page.cuh>\n")
    assert library.build("90", (64, 128)) != before
    assert sorted(runs(tools)) == ["dense_128.cu", "dense_64.cu", "link"]


def test_another_compiler_rebuilds_all(tools: Path) -> None:
    before = library.build("90", (64,))
    runs(tools)
    (tools / "bin" / "version").write_text("release 12.8")
    toolchain.nvcc_version.cache_clear()
    toolchain.tools_version.cache_clear()
    assert library.build("90", (64,)) != before
    assert len(runs(tools)) == 4


def test_other_headers_of_flashinfer_rebuild_what_includes_them(tools: Path) -> None:
    library.build("90", (64,))
    runs(tools)
    (tools / "flashinfer" / toolchain.FLASHINFER_HEADERS[0]).write_text("// newer")
    toolchain.tools_version.cache_clear()
    library.build("90", (64,))
    assert sorted(runs(tools)) == ["dense_64.cu", "link"]


def test_flags(tools: Path) -> None:
    library.build("90", (64, 128))
    lines = (tools / "bin" / "log").read_text().splitlines()
    by_source = {line.split(" -c ")[1].split(" -o ")[0].rsplit("/", 1)[-1]: line for line in lines if " -c " in line}
    assert "-DFASA_HAS_64=1 -DFASA_HAS_128=1" in by_source["api.cu"]
    assert "FASA_HAS" not in by_source["dense_64.cu"]
    assert "code=sm_90 " in by_source["score.cu"]
    assert "flashinfer" not in by_source["score.cu"]
    includes = [f"-I{tools / 'flashinfer' / path}" for path in library.FLASHINFER_INCLUDES]
    assert " ".join(includes) in by_source["dense_64.cu"]


def test_hopper_sources(tools: Path) -> None:
    (tools / "kernels" / "prefill_hopper_64.cu").write_text("#include <flashinfer/attention/hopper/x.cuh>\n")
    library.build("80", (64,))
    assert "HOPPER" not in (tools / "bin" / "log").read_text()
    assert "prefill_hopper_64.cu" not in runs(tools)
    library.build("90", (64,))
    lines = (tools / "bin" / "log").read_text().splitlines()
    assert ["code=sm_90a " in line for line in lines if "prefill_hopper_64.cu" in line] == [True]
    assert ["-DFASA_HAS_HOPPER=1" in line for line in lines if "api.cu" in line] == [True]
    library.build("90", (128,))
    assert runs(tools).count("prefill_hopper_64.cu") == 1


def test_progress(tools: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    library.build("90", (64,), progress=lambda *report: seen.append(report))
    assert sorted(name for name, _, _ in seen) == ["api", "dense_64", "score"]
    assert [(done, total) for _, done, total in seen] == [(1, 3), (2, 3), (3, 3)]


def test_a_library_that_is_built_needs_no_tools(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = library.build("90", (64,))
    monkeypatch.setenv("FLASHINFER_ROOT", str(tools / "nowhere"))
    assert library.build("90", (64,)) == library.path("90", (64,)) == built
    with pytest.raises(FasaError, match="FLASHINFER_ROOT names"):
        library.build("90", (128,))
    with pytest.raises(FasaError, match="FLASHINFER_ROOT names"):
        library.build("90", (64,), force=True)
    assert not library.path("90", (128,)).exists()


def test_where_nothing_can_be_built_more_head_dims_will_do(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = library.build("90", library.HEAD_DIMS)
    some = library.build("90", (64, 128))
    assert library.path("90", (64,)) not in (everything, some), "what can be built is built for what is asked for"
    monkeypatch.setenv("FLASHINFER_ROOT", str(tools / "nowhere"))
    assert library.build("90", (64,)) == library.path("90", (64,)) == some, "the fewer head_dims, the better"
    assert library.build("90", (96,)) == everything
    assert library.build("90", (64, 128)) == some
    with pytest.raises(FasaError, match="FLASHINFER_ROOT names"):
        library.build("80", (64,))
    (tools / "kernels" / "score.cu").write_text("// edited\n")
    assert not library.path("90", (64,)).exists(), "it was built from other sources"


@pytest.mark.parametrize("compiler", [True, False])
def test_load_takes_a_library_for_more_head_dims(tools: Path, monkeypatch: pytest.MonkeyPatch, compiler: bool) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    everything = library.build("90")
    runs(tools)
    if not compiler:
        monkeypatch.setenv("PATH", "")
    library.load("90", (128,))
    assert loaded == [str(everything)] and runs(tools) == []


def test_load_builds_where_nothing_is_found(
    tools: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    library.build("120", (64,))
    library.load("120", (64,))
    assert not caplog.messages
    library.load("120", (128,))
    assert loaded == [str(library.path("120", (head_dim,))) for head_dim in (64, 128)]
    assert ["for compute capability 12.0, head_dim 128: minutes" in message for message in caplog.messages] == [True]


def test_load_announces_nothing_that_cannot_be_done(
    tools: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FasaError, match="no CUDA compiler found"):
        library.load("90", (128,))
    assert not caplog.messages


def test_what_is_found_is_of_this_compiler(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.find("90", (64,)) is None
    before = library.build("90", (64, 128))
    assert library.find("90", (64,)) == library.find("90", (128, 64)) == before
    assert library.find("90", (96,)) is None is library.find("80", (64,))
    (tools / "bin" / "version").write_text("release 12.8")
    toolchain.nvcc_version.cache_clear()
    toolchain.tools_version.cache_clear()
    assert library.find("90", (64,)) is None, "the compiler that is here would make another one"
    monkeypatch.setenv("PATH", "")
    assert library.find("90", (64,)) == before, "but there is none"


def test_what_nvcc_says_is_passed_on(tools: Path) -> None:
    (tools / "kernels" / "broken.cu").write_text("int\n")
    with pytest.raises(FasaError, match="nvcc failed on broken.cu: broken.cu.1.: error: expected a declaration"):
        library.build("90", (64,))
    assert not library.path("90", (64,)).exists()
    assert not [path for path in (tools / "cache" / "objects").iterdir() if path.name.startswith(".")]


def test_a_cache_that_cannot_be_written(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tools / "file").write_text("")
    monkeypatch.setenv("FASA_TRT_CACHE", str(tools / "file"))
    with pytest.raises(FasaError, match="cannot write"):
        library.build("90", (64,))


@pytest.mark.parametrize(
    ("architecture", "head_dims", "message"),
    [("75", (64,), "unknown GPU architecture '75'"), ("90", (80,), "head_dim 80"), ("90", (), "no head_dim")],
)
def test_unknown_targets(architecture: str, head_dims: tuple[int, ...], message: str) -> None:
    with pytest.raises(FasaError, match=message):
        library.build(architecture, head_dims)
