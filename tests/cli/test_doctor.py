"""`fasa-trt doctor`, here and on machines that have this and lack that."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from fasa_trt.plugins import library
from fasa_trt.plugins.plugin_library import VARIABLE
from fasa_trt.runtime import machine
from fasa_trt.runtime.machine import Cuda, Gpu
from tests.cli.conftest import Cli


def doctor(cli: Cli, *arguments: str) -> str:
    result = cli("doctor", *arguments)
    assert (result.status, result.err) == (0, "")
    return result.out


def test_json_describes_this_machine(cli: Cli) -> None:
    facts = json.loads(doctor(cli, "--json"))
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["onnxruntime"] == onnxruntime.__version__
    assert "CPUExecutionProvider" in facts["onnxruntime_providers"]
    assert [target["name"] for target in facts["targets"]] == [
        "onnxruntime",
        "tensorrt-rtx",
        "tensorrt",
        "tensorrt-llm",
    ]
    assert facts["targets"][0] == {"name": "onnxruntime", "can_build": True, "can_run": True, "needs": []}
    assert facts["default_target"] == "onnxruntime"


def test_commands_are_shown_whole(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not wrapped at the terminal's width, and their brackets not taken for markup."""
    monkeypatch.setattr(machine, "package_version", lambda module, *names: None)
    output = doctor(cli)
    assert 'pip install "fasa-trt[tensorrt-rtx]"' in output
    assert 'tensorrt-llm to build and run: tensorrt 10.14.1, no other: pip install "tensorrt==10.14.1.*"' in output
    assert "not installed" in output


def test_a_gpu_is_shown(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("NVIDIA [Example]", (9, 0), 80 << 30)
    monkeypatch.setattr(machine, "cuda", lambda: Cuda("12.8", (gpu,)))
    monkeypatch.setattr(machine, "nvcc_version", lambda: "12.8")
    output = doctor(cli)
    assert "NVIDIA [Example], 80.0 GiB, compute capability 9.0" in output
    assert "NVIDIA [Example] has 9.0" in output
    facts = json.loads(doctor(cli, "--json"))
    assert facts["gpus"] == [{"name": "NVIDIA [Example]", "compute_capability": "9.0", "memory_bytes": 80 << 30}]
    assert (facts["cuda_driver"], facts["nvcc"]) == ("12.8", "12.8")


def test_a_broken_onnxruntime_does_not_stop_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert json.loads(doctor(cli, "--json"))["onnxruntime_providers"] == []


def test_the_plugin_library(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    nothing: dict[str, Any] = {"libraries": {"64": None, "96": None, "128": None, "256": None}, "needs": []}
    assert json.loads(doctor(cli, "--json"))["plugin"] == nothing
    assert "not built yet" in doctor(cli)
    file = library.path("90", (128,), plugin=True)
    file.write_bytes(b"library")
    assert json.loads(doctor(cli, "--json"))["plugin"]["libraries"] == {**nothing["libraries"], "128": str(file)}
    assert "built for head_dim 128" in doctor(cli)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone.so"))
    assert json.loads(doctor(cli, "--json"))["plugin"]["libraries"] == {}
    assert f"TensorRT plugin FASA_TRT_PLUGIN names {tmp_path / 'gone.so'}, which is no file" in doctor(cli)
