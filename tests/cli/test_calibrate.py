"""fasa-trt calibrate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fasa_trt.core.profile import Profile
from tests.cli.conftest import Cli

QUICK = ("--samples", 2, "--length", 256, "--queries", 4)


def test_profile_table_and_report(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    profile, report = tmp_path / "sub" / "p.safetensors", tmp_path / "report"
    result = cli("calibrate", "-m", tiny_dir, "-o", profile, "--report", report, *QUICK, "--seed", 5)
    assert result.status == 0, result.err
    assert "Top 64 keys found by 24 of 64 chunks" in result.out
    assert result.err.replace("\n", "").count("wrote ") == 3
    made = Profile.load(profile)
    assert made.num_layers == 6 and made.num_chunks == 64 and made.greedy is None
    assert {key: made.info[key] for key in ("samples", "length", "queries", "seed")} == {
        "samples": 2, "length": 256, "queries": 4, "seed": 5,
    }  # fmt: skip
    assert sorted(file.name for file in report.iterdir()) == ["calibration.json", "calibration.png"]


def test_json_is_all_of_stdout(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    profile, picture = tmp_path / "p.safetensors", tmp_path / "map.png"
    options = ("--json", "--greedy", "--report", picture, "--device", "cpu", "--dtype", "bfloat16")
    result = cli("calibrate", "-m", tiny_dir, "-o", profile, "--samples", 1, "--length", 256, "--queries", 2, *options)
    content = json.loads(result.out)
    assert content["profile"] == str(profile) and content["report"] == [str(picture)]
    assert content["info"]["dtype"] == "bfloat16" and len(content["layers"]) == 6
    assert sorted(content["layers"][0]["found"]) == ["agreement", "greedy", "spread"]
    assert Profile.load(profile).greedy is not None and picture.is_file()


def test_own_text_and_its_warning(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words to calibrate on, again and again\n" * 40)
    result = cli(
        "calibrate", "-m", tiny_dir, "-o", tmp_path / "p.safetensors", "--text", tmp_path / "notes.txt",
        "--samples", 30, "--length", 256, "--queries", 4, "--json",
    )  # fmt: skip
    assert result.status == 0
    assert "warning: the text fills" in result.err and "not 30" in result.err.replace("\n", " ")
    assert "the text fills" in json.loads(result.out)["warnings"][0]


def test_existing_output_needs_force(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    profile = tmp_path / "p.safetensors"
    profile.write_text("precious")
    cli("calibrate", "-m", tiny_dir, "-o", profile, *QUICK).refused("exists already", "--force")
    assert profile.read_text() == "precious"
    assert cli("calibrate", "-m", tiny_dir, "-o", profile, *QUICK, "--force").status == 0
    assert Profile.load(profile).info["samples"] == 2


def test_impossible_output(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    cli("calibrate", "-m", tiny_dir, "-o", tmp_path, "--force", *QUICK).refused("is a directory", "file name")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--length", 100), ("windows of 100 tokens are too short", "at least 256")),
        (("--device", "tpu"), ("no device 'tpu' here",)),
        (("--dtype", "int4"), ("unknown dtype 'int4'", "bfloat16")),
        (("--text", "nowhere.txt"), ("no calibration text at nowhere.txt",)),
        (("--report", "report.pdf"), ("cannot write a report to report.pdf", ".png")),
    ],
)
def test_bad_options(
    cli: Cli, tiny_dir: Path, tmp_path: Path, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    profile = tmp_path / "p.safetensors"
    cli("calibrate", "-m", tiny_dir, "-o", profile, *QUICK, *options).refused(*words)
    assert not profile.exists()


def test_model_without_tokenizer(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model, ignore=shutil.ignore_patterns("tokenizer*"))
    cli("calibrate", "-m", model, "-o", tmp_path / "p", *QUICK).refused("no tokenizer", "tokenizer.json")


def test_help_teaches(cli: Cli) -> None:
    result = cli("calibrate", "--help")
    assert result.status == 0
    for word in ("--model", "--samples", "--greedy", "--report", "Example", "profile"):
        assert word in result.out
