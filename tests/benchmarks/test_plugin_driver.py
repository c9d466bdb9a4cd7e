"""The script that records the plugin's cases, over kernels that run on the host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plugin_driver
from fasa_trt.plugins import toolchain
from tests.plugins.tensorrt.driver import COMPILER, Driver, compile_cpu_library, compile_driver, cuda_include

ROOT = Path(plugin_driver.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if toolchain.WINDOWS or COMPILER is None or cuda_include() is None:
        pytest.skip("needs a C++ compiler and CUDA's headers")
    return tmp_path_factory.mktemp("driver")


@pytest.fixture(scope="module")
def plugin(folder: Path) -> Path:
    return compile_cpu_library(folder)


@pytest.fixture
def driver(folder: Path, plugin: Path) -> Driver:
    return Driver(compile_driver(folder), plugin)


def started(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.plugin_driver", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_one_command_records_the_cases(plugin: Path, tmp_path: Path) -> None:
    output = tmp_path / "results" / "driver.json"
    output.parent.mkdir()
    done = started(
        "--output", output, "--commit", "abc", "--library", plugin, "--device", "cpu", "--only", "graph, int4"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"2 passed, 0 failed; recorded {output}"
    record = json.loads(output.read_text("utf-8"))
    assert [case["name"] for case in record["cases"]] == ["graph, int4, bf16", "graph, int4, fp16"]
    assert all(case["passed"] and case["replays"] == 40 and case["choices"] > 100 for case in record["cases"])
    assert (record["commit"], record["library"], record["torch"]) == ("abc", "plugin.so", torch.__version__)
    assert (record["gpu"], record["dtypes"], record["unfinished"]) == (None, ["bf16", "fp16"], [])
    assert (record["passed"], record["failed"], record["failures"]) == (2, 0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cpu", "--library", "nowhere.so"), "error: there is no library nowhere.so"),
        (("--device", "cpu", "--only", "nothing"), "error: no case has 'nothing' in its name"),
        pytest.param(
            (), "error: no CUDA GPU here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    output = tmp_path / "driver.json"
    done = started("--output", output, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1 and done.stderr.count("(") <= 1, "what to do is said once"
    assert not output.exists()


def run(driver: Driver, *cases: Callable[..., dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record, and those that were kept on the way."""
    kept: list[dict[str, Any]] = []
    chosen = {f"case {index}": (case, torch.float16) for index, case in enumerate(cases)}
    return plugin_driver.run(driver, chosen, "cpu", {"commit": "abc"}, kept.append, 100.0), kept


def test_a_case_that_fails_does_not_stop_the_others(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(*_: object) -> dict[str, Any]:
        raise AssertionError("output off by 7 times\nand more")

    record, kept = run(driver, lambda *_: {"worst": 0.25}, failing, lambda *_: {"worst": 0.5})
    assert (record["passed"], record["failed"]) == (2, 1)
    assert record["failures"] == ["case 1: AssertionError: output off by 7 times"]
    assert [case.get("worst") for case in record["cases"]] == [0.25, None, 0.5]
    assert [each["unfinished"] for each in kept] == [
        ["case 0", "case 1", "case 2"], ["case 1", "case 2"], ["case 2"], [],
    ]  # fmt: skip
    assert "FAILED" in capsys.readouterr().out


def test_no_case_is_run_on_a_lost_gpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_driver, "usable", lambda: False)

    def passing(*_: object) -> dict[str, Any]:
        return {}

    chosen = {name: (passing, torch.float16) for name in ("first", "second")}
    record = plugin_driver.run(driver, chosen, "cuda", {}, lambda _: None, 100.0)
    assert (record["passed"], record["unfinished"]) == (1, ["second"])


def test_a_case_that_hangs_ends_the_process(plugin: Path, tmp_path: Path) -> None:
    """It stays in the record as unfinished."""
    output = tmp_path / "driver.json"
    code = (
        "import sys, time; from benchmarks import plugin_driver as script; "
        "script.CASES = {'endless': lambda *_: time.sleep(60)}; script.main()"
    )
    options = ["--output", str(output), "--device", "cpu", "--library", str(plugin), "--timeout", "0.5"]
    command = [sys.executable, "-c", code, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert json.loads(output.read_text("utf-8"))["unfinished"] == ["endless, bf16", "endless, fp16"]
