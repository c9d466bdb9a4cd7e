"""fasa-trt tune."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasa_trt.calibrate.calibrate import calibrate
from fasa_trt.cli.tune import share
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from tests.cli.conftest import Cli
from tests.models import make_model

GRID = ("--n-tips", "16,32", "--budgets", "64,128")
QUICK = (*GRID, "--length", 512, "--windows", 2, "--device", "cpu", "--target", "onnxruntime")


@pytest.fixture(scope="module")
def profile(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "tiny.safetensors"
    calibrate(open_checkpoint(tiny_dir), samples=1, length=512, queries=4, device="cpu").profile.save(path)
    return path


def test_what_it_finds_builds(cli: Cli, tiny_dir: Path, profile: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    command = ("tune", "-m", tiny_dir, "--profile", profile, "--max-loss", "5%", *QUICK, "-o", file)
    result = cli(*command)
    assert result.status == 0, result.err
    assert "chosen: n_tip" in result.out and "bound 5.00%" in result.out and "build it: fasa-trt build" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned.json", "tuned.svg"]

    chosen = json.loads(file.read_text("utf-8"))
    built = cli(
        "build", "-m", tiny_dir, "--profile", profile, "--config", file, "--max-seq-len", 512, "-o", tmp_path / "engine"
    )
    assert built.status == 0, built.err
    found = json.loads(cli("inspect", tmp_path / "engine", "--json").out)
    assert (found["n_tip"], found["budget"]) == (chosen["n_tip"], chosen["budget"])
    assert found["sparse_layers"] == 6 - len(chosen["dense_layers"])

    cli(*command).refused("tuned.json exists already", "--force")
    again = cli(*command, "--force", "--json")
    assert again.status == 0, again.err
    report = json.loads(again.out)
    assert report["settings"] == chosen == json.loads(file.read_text("utf-8"))
    assert report["loss"] <= 0.05 and report["held_out_loss"] <= 0.05
    assert 0 < report["kv_share"] < 1 and len(report["points"]) >= 2
    assert {point["reduction"] for point in report["points"]} == {"sum", "sampled_softmax"}

    named = cli(*command, "--force", "--json", "--reduction", "mean_softmax")
    assert named.status == 0, named.err
    assert json.loads(named.out)["settings"]["reduction"] == "mean_softmax"


def test_keeps_the_profile_that_it_makes(
    cli: Cli, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasa_trt.cli import tune as verb

    monkeypatch.setattr(verb, "CPU_CALIBRATION", {"samples": 1, "length": 256, "queries": 2})
    result = cli("tune", "-m", tiny_dir, "--max-loss", "90%", *QUICK, "-o", tmp_path / "tuned.json")
    assert result.status == 0, result.err
    assert "no --profile: calibrating" in result.err and f"--profile {tmp_path / 'tuned.safetensors'}" in result.err
    assert cli("inspect", tmp_path / "tuned.safetensors").status == 0


def test_a_bound_that_nothing_meets(cli: Cli, tiny_dir: Path, profile: Path, tmp_path: Path) -> None:
    few = ("--n-tips", "1", "--budgets", "40", *QUICK[4:])
    command = ("tune", "-m", tiny_dir, "--profile", profile, "--max-loss", "0", *few, "-o", tmp_path / "tuned.json")
    cli(*command).refused("no setting keeps the loss within 0.00%", "the best, n_tip 1, budget 40, s", "--max-loss")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-loss", "5"), ("--max-loss '5'", "0.5%")),
        (("--max-loss", "-1%"), ("--max-loss '-1%'",)),
        (("--max-loss", "little"), ("--max-loss 'little'",)),
        (("-o", "tuned.yaml"), ("tuned.yaml is not a .json file",)),
        (("--budgets", "a"), ("--budgets 'a'",)),
        (("--budgets", "16"), ("do not fit into a budget of 16",)),
        (("--budgets", "4096"), ("budget of 4096 covers a window of 512",)),
        (("--n-tips", "65"), ("64 frequency chunks",)),
        (("--target", "tensorrt", "--n-tips", "20"), ("no kernel for n-tip 20",)),
        (("--length", "99999"), ("windows of 99999 tokens", "16384")),
        (("--length", "100", "--budgets", "64"), ("too short to tune on",)),
        (("--text", "missing.txt"), ("missing.txt",)),
        (("--profile", "missing"), ("missing",)),
        (("--reduction", "per_head"), ("one token set for each KV head",)),
        (("--device", "tpu"), ("no device 'tpu'",)),
        (("--windows", "99"), ("do not fit into the memory",)),
    ],
)
def test_refused(
    cli: Cli, tiny_dir: Path, profile: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    out = ("-o", tmp_path / "tuned.json")
    command = ("tune", "-m", tiny_dir, "--profile", profile, "--max-loss", "5%", *QUICK, *out, *options)
    cli(*command).refused(*words)
    assert not list(tmp_path.iterdir())


def test_a_profile_of_another_model(cli: Cli, profile: Path, tmp_path: Path) -> None:
    other = make_model("llama", tmp_path / "other", max_position_embeddings=1024, head_dim=64)
    options = ("--max-loss", "5%", *QUICK, "-o", tmp_path / "tuned.json")
    cli("tune", "-m", other, "--profile", profile, *options).refused("calibrated on another model")
    cli("tune", "-m", tmp_path / "none", *options).refused("no such model")


def test_share() -> None:
    assert share("--max-loss", "0.5%") == pytest.approx(0.005)
    assert share("--max-loss", " 0.005 ") == 0.005
    for text in ("", "%", "0.5%%", "nan", "1"):
        with pytest.raises(FasaError, match="is not a share"):
            share("--max-loss", text)


def test_help_teaches(cli: Cli) -> None:
    result = cli("tune", "--help")
    assert result.status == 0
    for word in ("--max-loss", "--n-tips", "held out", "Example"):
        assert word in result.out
