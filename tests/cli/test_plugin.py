"""`fasa-trt plugin` with a compiler that only pretends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fasa_trt.plugins import library, toolchain
from fasa_trt.runtime import machine
from fasa_trt.runtime.machine import Cuda, Gpu
from tests.cli.conftest import Cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the pretended compiler is a shell script")
# Writes the file that -o names, keeps a list of what it was asked for, and fails when told to.
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; fi
echo "$@" >> "$NVCC_LOG"
if [ -n "$NVCC_FAILS" ]; then echo "x.cu(1): error: $NVCC_FAILS" >&2; exit 2; fi
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then echo library > "$2"; fi
    shift
done
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nvcc, FlashInfer's headers and an empty cache; returns nvcc's log."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(NVCC)
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    for header in toolchain.FLASHINFER_HEADERS:
        (tmp_path / "flashinfer" / header).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "flashinfer" / header).write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FLASHINFER_ROOT", str(tmp_path / "flashinfer"))
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NVCC_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(toolchain, "TOOLKIT", tmp_path / "toolkit")
    monkeypatch.setattr(machine, "cuda", lambda: Cuda(None, ()))
    return tmp_path / "log"


def built(cli: Cli, *arguments: object, kind: str = "torch") -> list[dict[str, object]]:
    result = cli("plugin", "build", "--kind", kind, *arguments, "--json")
    assert result.status == 0, result.err
    libraries: list[dict[str, object]] = json.loads(result.out)["libraries"]
    return libraries


def test_building_twice(cli: Cli, tools: Path) -> None:
    first, again = (built(cli, "--arch", 90, "--head-dim", 128)[0] for _ in range(2))
    assert first["arch"] == "90" and first["head_dims"] == [128]
    assert first["path"] == again["path"] and Path(str(first["path"])).is_file()
    assert (first["cached"], again["cached"]) == (False, True)
    assert isinstance(first["seconds"], float)
    commands = tools.read_text()
    assert "code=sm_90 " in commands and "attend_128.cu" in commands
    assert "attend_64.cu" not in commands, "only what was asked for"
    assert built(cli, "--arch", 90, "--head-dim", 128, "--force")[0]["cached"] is False


def test_paths_alone_are_on_stdout(cli: Cli, tools: Path) -> None:
    options = ("--arch", 90, "--head-dim", 128)
    result = cli("plugin", "build", *options)
    files = result.out.split()
    assert result.status == 0 and all(Path(file).is_file() for file in files)
    assert "tensorrt, sm_90: compiled in" in result.err and "torch, sm_90: compiled in" in result.err
    assert cli("plugin", "build", *options).err.count("was in the cache") == 2
    assert [cli("plugin", "path", *options, "--kind", kind).out.strip() for kind in ("tensorrt", "torch")] == files
    assert cli("plugin", "path", *options).out.strip() == files[0]
    assert "libfasa_trt_plugin-sm90-128-" in files[0] and "libfasa_kernels-sm90-128-" in files[1]


def test_both_kinds_share_the_kernels(cli: Cli, tools: Path) -> None:
    options = ("--arch", 90, "--head-dim", 128)
    cli("plugin", "build", *options)
    commands = tools.read_text().splitlines()
    assert sum("attend_128.cu" in line for line in commands) == 1
    assert sum("creator.cpp" in line for line in commands) == 1
    tools.unlink()
    assert [
        library["cached"]
        for library in json.loads(cli("plugin", "build", *options, "--force", "--json").out)["libraries"]
    ] == [False, False]
    assert sum("attend_128.cu" in line for line in tools.read_text().splitlines()) == 1
    assert sum("-shared" in line for line in tools.read_text().splitlines()) == 2


def test_a_copy(cli: Cli, tools: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "libfasa_trt_plugin.so"
    options = ("--arch", 90, "--head-dim", 128, "-o", target)
    cli("plugin", "build", *options).refused("--output takes one library", "--kind")
    assert not tools.exists(), "before anything is compiled"
    result = cli("plugin", "build", *options, "--kind", "tensorrt")
    assert result.out.strip() == str(target)
    assert target.read_bytes() == library.path("90", (128,), plugin=True).read_bytes()
    (tmp_path / "file").write_text("")
    options = (*options[:-1], tmp_path / "file" / "x.so")
    cli("plugin", "build", *options, "--kind", "tensorrt").refused("cannot write", "x.so")


def test_path_compiles_nothing(cli: Cli, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("plugin", "path", "--arch", 90).refused("no tensorrt library", "build --kind tensorrt --arch 90)")
    options = ("--kind", "torch", "--arch", 90, "--arch", 80, "--head-dim", 64)
    built(cli, "--arch", 90, "--head-dim", 64)
    cli("plugin", "path", *options).refused("run fasa-trt plugin build --kind torch --arch 80 --head-dim 64)")
    built(cli, "--arch", 80)
    before = tools.read_text()
    paths = cli("plugin", "path", *options).out.split()
    assert "sm90-64-" in paths[0] and "sm80-64.96.128.256-" in paths[1], "more head_dims will do"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(path=[]))
    assert cli("plugin", "path", *options).out.split() == paths, "without a compiler, too"
    assert tools.read_text() == before


def test_several_architectures(cli: Cli, tools: Path) -> None:
    found = built(cli, "--arch", "sm_90", "--arch", "8.9", "--arch", 90, "--head-dim", 128, "--head-dim", 64)
    assert [entry["arch"] for entry in found] == ["90", "89"]
    assert all(entry["head_dims"] == [64, 128] for entry in found)
    assert len({entry["path"] for entry in found}) == 2
    everything = built(cli, "--arch", "all", "--head-dim", 128)
    assert [entry["arch"] for entry in everything] == list(library.ARCHITECTURES)


def test_the_gpus_here_are_the_default(cli: Cli, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("plugin", "build").refused("no GPU here to compile for", "--arch 80 | ", "| all")
    cli("plugin", "path").refused("no GPU here to compile for")
    gpus = tuple(Gpu("Example", capability, 1 << 30) for capability in ((9, 0), (9, 0), (12, 0)))
    monkeypatch.setattr(machine, "cuda", lambda: Cuda("13.0", gpus))
    assert [entry["arch"] for entry in built(cli, "--head-dim", 128)] == ["90", "120"]
    monkeypatch.setattr(machine, "cuda", lambda: Cuda("13.0", (Gpu("Old", (7, 5), 1 << 30),)))
    cli("plugin", "build").refused("unknown GPU architecture '75'", "one of 80")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "90", "--arch", "75"], ["unknown GPU architecture '75'", "one of 80, 86"]),
        (["--arch", ""], ["unknown GPU architecture ''"]),
        (["--arch", "hopper"], ["unknown GPU architecture 'hopper'"]),
        (["--arch", "90", "--head-dim", "100"], ["head_dim 100", "64, 96, 128, 256"]),
        (["--arch", "90", "--kind", "onnx"], ["unknown kind of library 'onnx'", "tensorrt or torch"]),
    ],
)
def test_bad_options(cli: Cli, tools: Path, options: list[str], words: list[str]) -> None:
    cli("plugin", "build", *options).refused(*words)
    assert not tools.exists(), "nothing was compiled"
    assert cli("plugin", "build", "--head-dim", "wide").status == 2


def test_no_compiler(cli: Cli, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(path=[str(tmp_path)]))
    cli("plugin", "build", "--arch", 90).refused("no CUDA compiler found", "install the CUDA toolkit")


def test_no_flashinfer(cli: Cli, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_ROOT", str(tmp_path))
    cli("plugin", "build", "--arch", 90).refused("FLASHINFER_ROOT names", "flashinfer-python")
    monkeypatch.delenv("FLASHINFER_ROOT")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cli("plugin", "build", "--arch", 90).refused("FlashInfer's headers are not installed", "pip install --no-deps")


def test_an_unwritable_cache(cli: Cli, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path / "file" / "cache"))
    cli("plugin", "build", "--arch", 90).refused("cannot write", "set FASA_TRT_CACHE")


@pytest.mark.parametrize("message", ["expected a ;", "error writing /tmp/x.o: No space left on device"])
def test_a_compiler_that_fails(cli: Cli, tools: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    monkeypatch.setenv("NVCC_FAILS", message)
    cli("plugin", "build", "--arch", 90, "--head-dim", 128).refused("nvcc failed", message)
    monkeypatch.delenv("NVCC_FAILS")
    assert built(cli, "--arch", 90, "--head-dim", 128)[0]["cached"] is False, "a failed attempt leaves nothing"


def test_doctor_says_whether_it_can_be_built(cli: Cli, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(cli("doctor", "--json").out)["kernels"] == {"can_build": True, "needs": []}
    assert json.loads(cli("doctor", "--json").out)["nvcc"] == "13.0"
    assert "can be built" in cli("doctor").out
    monkeypatch.delenv("FLASHINFER_ROOT")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kernels = json.loads(cli("doctor", "--json").out)["kernels"]
    assert not kernels["can_build"]
    assert len(kernels["needs"]) == 1 and "pip install --no-deps flashinfer-python" in kernels["needs"][0]
    assert "CUDA kernels FlashInfer's headers are not installed" in cli("doctor").out
