"""fasa-trt eval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasa_trt.cli.eval import numbers
from tests.cli.conftest import Cli
from tests.models import make_model

QUICK = ("--methods", "fasa,quest", "--budgets", "48,64", "--tasks", "recall", "--contexts", 512, "--device", "cpu")


@pytest.fixture(scope="module")
def profile(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fasa_trt.calibrate.calibrate import calibrate
    from fasa_trt.core.checkpoint import open_checkpoint

    path = tmp_path_factory.mktemp("profile") / "tiny.safetensors"
    calibrate(open_checkpoint(tiny_dir), samples=1, length=512, queries=4, device="cpu").profile.save(path)
    return path


def test_table_results_and_plots(cli: Cli, tiny_dir: Path, profile: Path, tmp_path: Path) -> None:
    command = ("eval", "-m", tiny_dir, "--profile", profile, *QUICK, "-o", tmp_path / "out")
    result = cli(*command)
    assert result.status == 0, result.err
    assert "recall, accuracy, 8 samples" in result.out and "quest" in result.out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "quality-budget.svg", "quality-bytes.svg", "recall.svg", "results.json",
    ]  # fmt: skip
    found = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert found["complete"] and len(found["records"]) == 5 * 8
    assert found["config"]["methods"] == ["dense", "fasa", "quest"] and found["config"]["budgets"] == [48, 64]
    assert found["config"]["options"]["fasa"]["dense_layers"] == 1 and found["config"]["options"]["dense"]
    assert found["environment"]["versions"]["torch"]

    again = cli(*command, "--json")
    assert again.status == 0 and "going on with 40 results" in again.err
    summary = json.loads(again.out)
    assert summary["rows"] == found["rows"] and "records" not in summary

    cli(*command, "--seed", 5).refused("other settings (seed)", "--force")
    cli("eval", "-m", tiny_dir, *QUICK[2:], "--methods", "oracle", "-o", tmp_path / "out").refused("other settings")


def test_calibrates_where_no_profile_is_given(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    from fasa_trt.cli import eval as verb

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "CPU_CALIBRATION", {"samples": 1, "length": 256, "queries": 2})
        options = ("--methods", "fasa", "--budgets", 48, *QUICK[4:], "--samples", 1, "-o", tmp_path)
        result = cli("eval", "-m", tiny_dir, *options)
        assert result.status == 0 and "no --profile: calibrating" in result.err
        assert (tmp_path / "profile.safetensors").is_file()
        assert "calibrating" not in cli("eval", "-m", tiny_dir, *options).err, "the profile is kept"


def test_no_profile_is_needed_without_fasa(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    result = cli("eval", "-m", tiny_dir, "--methods", "oracle", *QUICK[2:], "--json", "-o", tmp_path)
    assert result.status == 0 and "calibrating" not in result.err
    assert {row["method"] for row in json.loads(result.out)["rows"]} == {"dense", "oracle"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--methods", "magic"), ("unknown method 'magic'", "quest")),
        (("--methods", "fasa:n_tip=x"), ("fasa:n_tip=x", "whole number")),
        (("--tasks", "chess"), ("unknown task 'chess'", "recall")),
        (("--budgets", "a"), ("--budgets 'a'",)),
        (("--budgets", "16"), ("do not fit into a budget of 16",)),
        (("--contexts", "0"), ("--contexts '0'",)),
        (("--contexts", "99999"), ("contexts of 99999 tokens", "16384")),
        (("--ask", "nicely"), ("'nicely'", "prefill")),
        (("--device", "tpu"), ("no device 'tpu'",)),
        (("--dtype", "int4"), ("unknown dtype 'int4'",)),
        (("--tasks", "longbench"), ("needs its data", "--data")),
        (("--tasks", "perplexity_text", "--text", "missing.txt"), ("missing.txt",)),
        (("--profile", "missing"), ("no such profile",)),
        (("--chat",), ("no chat template",)),
    ],
)
def test_refused(
    cli: Cli, tiny_dir: Path, profile: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    cli("eval", "-m", tiny_dir, "--profile", profile, *QUICK, "-o", tmp_path, *options).refused(*words)


def test_a_profile_of_another_model(cli: Cli, profile: Path, tmp_path: Path, tiny_dir: Path) -> None:
    other = make_model("llama", tmp_path / "other")
    short = ("--contexts", 256, "-o", tmp_path)
    cli("eval", "-m", other, "--profile", profile, *QUICK, *short).refused("calibrated on another model")
    cli("eval", "-m", tmp_path / "none", *QUICK, "-o", tmp_path).refused("no such model")


def test_numbers() -> None:
    assert numbers("--budgets", "64, 128,64") == [64, 128]


def test_help_teaches(cli: Cli) -> None:
    result = cli("eval", "--help")
    assert result.status == 0
    for word in ("--methods", "triattention", "--data", "Example", "budget"):
        assert word in result.out
