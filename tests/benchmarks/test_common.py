"""Facts, summaries and result files of the benchmarks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common, decode_cpu, export_speed, plot_kernels, recall
from benchmarks.kernels.__main__ import kernels
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from tests.models import make_model


def test_summary_agrees_with_numpy() -> None:
    samples = np.random.default_rng(0).random(11).tolist()
    got = common.summary(samples)
    wanted = np.quantile(samples, [0.5, 0.25, 0.75, 0, 1])
    assert list(got.values()) == pytest.approx(wanted)
    assert common.summary([3.0]) == {"median": 3.0, "quartile_1": 3.0, "quartile_3": 3.0, "min": 3.0, "max": 3.0}


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


def test_random_profile_fits_its_checkpoint_and_repeats(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model("llama", tmp_path))
    profile = common.random_profile(checkpoint, 3)
    profile.check(checkpoint.fingerprint)
    rankings = [common.random_profile(checkpoint, seed).ranking("spread", budget=9) for seed in (3, 3, 4)]
    assert rankings[0].shape == (3, 2, 16)
    np.testing.assert_array_equal(rankings[0], rankings[1])
    assert (rankings[0] != rankings[2]).any()


@pytest.mark.parametrize(
    "script", [recall.recall, decode_cpu.decode_cpu, export_speed.export_speed, kernels, plot_kernels.plot_kernels]
)
def test_help_explains_and_gives_an_example(
    script: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit) as stopped:
        common.main(script)  # type: ignore[arg-type]
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "Example: python -m benchmarks." in text and "--output" in text
    assert str(common.ROOT) not in text


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def script() -> None:
        raise FasaError("no luck", hint="try again")

    monkeypatch.setattr("sys.argv", ["benchmark"])
    with pytest.raises(SystemExit) as stopped:
        common.main(script)
    assert stopped.value.code == "error: no luck (try again)"
