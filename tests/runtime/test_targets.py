"""The table of targets, on machines that have this and lack that."""

from __future__ import annotations

import pytest

from fasa_trt.runtime import machine, targets
from fasa_trt.runtime.machine import Cuda, Gpu
from fasa_trt.runtime.targets import Target, default_target

COMPLETE = {"onnx": "1.21", "onnx_ir": "0.1.12", "onnxruntime": "1.32.0", "tensorrt_rtx": "1.7.1.116"}


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
def rtx_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this version could run TensorRT for RTX."""
    monkeypatch.setattr(targets, "RUNNABLE", ("onnxruntime", "tensorrt-rtx"))


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
    capability: tuple[int, int], runs: bool, installed: dict[str, str], rtx_backend: None
) -> None:
    target = find("tensorrt-rtx", cuda(*capability))
    assert (target.can_build, target.can_run) == (True, runs)
    assert target.needs == () if runs else "NVIDIA Example has {}.{}".format(*capability) in target.needs[0]


def test_tensorrt_rtx_says_what_it_lacks(installed: dict[str, str], rtx_backend: None) -> None:
    assert find("tensorrt-rtx", Cuda(None, ())).needs[0].endswith("no CUDA driver is installed here")
    assert find("tensorrt-rtx", Cuda("13.0", ())).needs[0].endswith("the CUDA driver shows none here")
    del installed["tensorrt_rtx"]
    target = find("tensorrt-rtx", cuda(8, 9))
    assert (target.can_build, target.can_run) == (False, False)
    assert target.needs[0].endswith('pip install "fasa-trt[tensorrt-rtx]"')


def test_tensorrt_rtx_is_not_run_by_this_version(installed: dict[str, str]) -> None:
    """Take this test out, and add the target to RUNNABLE, together with the backend."""
    target = find("tensorrt-rtx", cuda(8, 9))
    assert (target.can_build, target.can_run) == (True, False)
    assert "runs onnxruntime ones only" in target.needs[0]
    assert default_target(targets.targets(cuda(8, 9))) == "onnxruntime"


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-llm", "trtllm")])
def test_later_targets(name: str, extra: str, installed: dict[str, str]) -> None:
    installed["tensorrt"] = installed["tensorrt_llm"] = "11.0"
    target = find(name, cuda(9, 0))
    assert (target.can_build, target.can_run) == (False, False)
    assert f"plugin-and-engine release (extra fasa-trt[{extra}])" in target.needs[0]


def test_default_is_the_best_that_runs(installed: dict[str, str], rtx_backend: None) -> None:
    assert default_target() == "onnxruntime"
    assert default_target(targets.targets(cuda(9, 0))) == "onnxruntime"
    assert default_target(targets.targets(cuda(8, 9))) == "tensorrt-rtx"
    del installed["tensorrt_rtx"]
    assert default_target(targets.targets(cuda(8, 9))) == "onnxruntime"
