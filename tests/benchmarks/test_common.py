"""Facts, summaries and result files of the benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import common, decode_cpu, e2e, export_speed, libraries, plot_kernels, recall
from benchmarks.kernels.__main__ import kernels
from fasa_trt.core.errors import FasaError


def test_facts_name_commit_versions_and_processor() -> None:
    facts = common.run_facts()
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", facts["commit"])
    assert facts["versions"]["onnxruntime"] and facts["cpu"] and facts["cpu_count"] >= 1
    json.dumps(facts)


def test_a_result_replaces_the_last_one(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "result.json"
    common.write_result(file, {"a": 1})
    common.write_result(file, {"a": 2})
    assert json.loads(file.read_text("utf-8")) == {"a": 2}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "script",
    [
        recall.recall, decode_cpu.decode_cpu, e2e.e2e, export_speed.export_speed, kernels, libraries.libraries,
        plot_kernels.plot_kernels,
    ],
)  # fmt: skip
def test_help_explains_and_gives_an_example(
    script: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit) as stopped:
        common.main(script)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"Example: python -m benchmarks.{script.__name__}" in text and "--output" in text
    assert str(common.ROOT) not in text


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def script() -> None:
        raise FasaError("no luck", hint="try again")

    monkeypatch.setattr("sys.argv", ["benchmark"])
    with pytest.raises(SystemExit) as stopped:
        common.main(script)
    assert stopped.value.code == "error: no luck (try again)"
