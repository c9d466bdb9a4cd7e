"""The table of targets, on machines that have this and lack that."""

from __future__ import annotations

import pytest

from fasa_trt.plugins import plugin_library
from fasa_trt.plugins.library import HEAD_DIMS
from fasa_trt.runtime import machine, targets
from fasa_trt.runtime.machine import Cuda, Gpu
from fasa_trt.runtime.targets import Target, default_target

COMPLETE = {
    "onnx": "1.21",
    "onnx_ir": "0.1.12",
    "onnxruntime": "1.32.0",
    "tensorrt_rtx": "1.7.1.116",
    "cuda.bindings": "13.5.0",
}


def cuda(*capability: int) -> Cuda:
    return Cuda("13.0", (Gpu("NVIDIA Example", (capability[0], capability[1]), 24 << 30),))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages and versions that seem to be installed; change it to install and remove."""
    packages = dict(COMPLETE)
    monkeypatch.setattr(machine, "package_version", lambda module, *names: packages.get(module))
    monkeypatch.setattr(machine, "cuda", lambda: Cuda(None, ()))
    return packages


@pytest.fixture
def with_plugin(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What keeps the plugin library from being there, by head_dim: nothing; change it."""
    reasons: list[str | None] = [None, None, None, None]
    monkeypatch.setattr(plugin_library, "missing", lambda head_dim, arch: reasons[HEAD_DIMS.index(head_dim)])
    return reasons


def find(name: str, driver: Cuda | None = None) -> Target:
    return next(target for target in targets.targets(driver) if target.name == name)


def test_onnxruntime(installed: dict[str, str]) -> None:
    assert find("onnxruntime") == Target("onnxruntime", True, True)
    installed["onnxruntime"] = "1.22.1"
    (need,) = find("onnxruntime").needs
    assert "1.24 or newer, not 1.22.1" in need
    del installed["onnxruntime"], installed["onnx"]
    target = find("onnxruntime")
    assert (target.can_build, target.can_run, len(target.needs)) == (False, False, 2)
    assert default_target() == "onnxruntime"  # which says what it lacks when it is used


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        *(((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 7), False), ((8, 9), True)),
        *(((9, 0), False), ((10, 0), False), ((12, 0), True), ((12, 1), True)),
    ],
)
def test_tensorrt_rtx_wants_certain_gpus(
    capability: tuple[int, int], runs: bool, installed: dict[str, str], with_plugin: list[str | None]
) -> None:
    target = find("tensorrt-rtx", cuda(*capability))
    assert (target.can_build, target.can_run) == (True, runs)
    assert target.needs == () if runs else "NVIDIA Example has {}.{}".format(*capability) in target.needs[0]


def test_tensorrt_rtx_says_what_it_lacks(installed: dict[str, str], with_plugin: list[str | None]) -> None:
    assert find("tensorrt-rtx", Cuda(None, ())).needs[0].endswith("no CUDA driver is installed here")
    assert find("tensorrt-rtx", Cuda("13.0", ())).needs[0].endswith("the CUDA driver shows none here")
    del installed["tensorrt_rtx"]
    target = find("tensorrt-rtx", cuda(8, 9))
    assert (target.can_build, target.can_run) == (False, False)
    assert target.needs[0].endswith('pip install "fasa-trt[tensorrt-rtx]"')


def test_tensorrt(installed: dict[str, str], with_plugin: list[str | None]) -> None:
    installed["tensorrt"] = "11.1.0.3"
    assert find("tensorrt", cuda(9, 0)) == Target("tensorrt", True, True)
    assert default_target(targets.targets(cuda(9, 0))) == "tensorrt"
    installed["tensorrt"] = "10.13.2"
    assert "tensorrt 10.14 or newer, not 10.13.2" in find("tensorrt", cuda(9, 0)).needs[0]
    del installed["tensorrt"]
    assert 'pip install "fasa-trt[tensorrt]"' in find("tensorrt", cuda(9, 0)).needs[0]


def test_tensorrt_llm(installed: dict[str, str], with_plugin: list[str | None]) -> None:
    installed |= {"tensorrt": "10.14.1.48", "tensorrt_llm": "1.2.1"}
    assert find("tensorrt-llm", cuda(9, 0)) == Target("tensorrt-llm", True, True)
    assert default_target(targets.targets(cuda(9, 0))) == "tensorrt-llm"
    installed["tensorrt_llm"] = "1.4.0"
    target = find("tensorrt-llm", cuda(9, 0))
    assert (target.can_build, target.can_run) == (True, False)
    assert "tensorrt-llm 1.2.1, not 1.4.0, which runs no engines" in target.needs[0]
    installed["tensorrt"] = "10.15.0.1"
    target = find("tensorrt-llm", cuda(9, 0))
    assert (target.can_build, len(target.needs)) == (False, 2)
    assert 'tensorrt 10.14.1, no other, not 10.15.0.1: pip install "tensorrt==10.14.1.*"' in target.needs[0]


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-llm"])
def test_a_gpu_and_the_plugin_are_needed(name: str, installed: dict[str, str], with_plugin: list[str | None]) -> None:
    installed |= {"tensorrt": "10.14.1.48", "tensorrt_llm": "1.2.1"}
    for driver, word in ((Cuda(None, ()), "no CUDA driver is installed"), (Cuda("13.0", ()), "shows none here")):
        target = find(name, driver)
        assert (target.can_build, target.can_run, len(target.needs)) == (False, False, 1)
        assert word in target.needs[0]
    with_plugin[:] = ["no CUDA compiler found"] * 4
    (need,) = find(name, cuda(9, 0)).needs
    assert need == "to build and run: the plugin library: no CUDA compiler found"
    with_plugin[2] = None
    assert find(name, cuda(9, 0)).can_build, "for models of one head_dim"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_running_needs_cuda_bindings(name: str, installed: dict[str, str], with_plugin: list[str | None]) -> None:
    installed |= {"tensorrt": "10.14.1.48"}
    del installed["cuda.bindings"]
    target = find(name, cuda(8, 9))
    assert (target.can_build, target.can_run) == (True, False)
    assert target.needs == ("to run: cuda-bindings 12.8 or newer: pip install cuda-bindings",)


def test_tensorrt_rtx_runs_plugin_engines(installed: dict[str, str], with_plugin: list[str | None]) -> None:
    with_plugin[:] = ["no CUDA compiler found"] * 4
    target = find("tensorrt-rtx", cuda(8, 9))
    assert (target.can_build, target.can_run) == (True, False)
    assert target.needs == ("to run: the plugin library: no CUDA compiler found",)


def test_default_is_the_best_that_runs(installed: dict[str, str], with_plugin: list[str | None]) -> None:
    assert default_target() == "onnxruntime"
    assert default_target(targets.targets(cuda(9, 0))) == "onnxruntime"
    assert default_target(targets.targets(cuda(8, 9))) == "tensorrt-rtx"
    del installed["tensorrt_rtx"]
    assert default_target(targets.targets(cuda(8, 9))) == "onnxruntime"
