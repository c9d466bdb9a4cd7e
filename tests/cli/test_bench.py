"""`fasa-trt bench`: a small model on the CPU, reports, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fasa_trt.cli.bench import points_of
from tests.cli.conftest import Cli
from tests.models import make_model

SMALL = ("--device", "cpu", "--contexts", "48", "--budget", "40", "--repeats", "5", "--threads", "1")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("bench"))


def test_steps_on_a_cpu(model: Path, cli: Cli, tmp_path: Path) -> None:
    record, page = tmp_path / "record.json", tmp_path / "page.html"
    result = cli("bench", "e2e", "--model", model, *SMALL, "-o", record, "--report", page)
    assert result.status == 0, result.err
    assert "no GPU was used" in result.out and "48 x 1" in result.out
    found = json.loads(record.read_text("utf-8"))
    assert found["sparse"]["dense_layers"] == [0]
    assert found["device"] == "cpu" and "gpu" not in found and len(found["rows"]) == 1
    assert found["run_id"] in page.read_text("utf-8")

    again = tmp_path / "again.html"
    assert cli("bench", "report", record, "-o", again).status == 0
    assert again.read_text("utf-8") == page.read_text("utf-8")


def test_json_is_all_there_is_on_stdout(model: Path, cli: Cli) -> None:
    result = cli("bench", "e2e", "--model", model, *SMALL, "--dense-layers", "none", "--json")
    found = json.loads(result.out)
    assert found["rows"][0]["batch"] == 1 and found["sparse"]["dense_layers"] == []
    assert "dense" in result.err


def test_points() -> None:
    assert points_of(None, None) is None
    assert points_of("64,128", "1,2") == [(64, 1), (128, 1), (64, 2), (128, 2)]
    assert points_of(None, "4") == [(8192, 4)]
    assert points_of("64", None) == [(64, 1)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("e2e", "--device", "cpu"), "needs a checkpoint"),
        (("e2e", "--model", "x", "--shape", "qwen3-8b"), "exclude each other"),
        (("e2e", "--device", "tpu"), "unknown device 'tpu'"),
        (("e2e", "--model", "x", "--contexts", "many"), "--contexts 'many' is not a list"),
        (("e2e", "--model", "x", "--batches", "0"), "--batches '0' is not a list"),
        (("e2e", "--model", "x", "--device", "cpu", "--dense-layers", "first"), "not a list of layers"),
        (("e2e", "--model", "missing", "--device", "cpu"), "no such model"),
        (("kernels", "--only", "speed"), "no such section"),
        (("report", "missing.json"), "cannot read missing.json"),
    ],
)
def test_refused(arguments: tuple[str, ...], words: str, cli: Cli) -> None:
    cli("bench", *arguments).refused(words)


@without_gpu
def test_without_a_gpu(cli: Cli) -> None:
    cli("bench", "e2e", "--device", "cuda").refused("no CUDA GPU here", "--device cpu")
    cli("bench", "kernels").refused("no CUDA GPU here")


def test_a_context_within_the_budget(model: Path, cli: Cli, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    cli("bench", "e2e", "--model", model, "--device", "cpu", "--contexts", "100", "-o", record).refused("budget of 256")
    assert not record.exists()


def test_runs_are_not_mixed(cli: Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(json.dumps({"benchmark": "e2e", "run_id": name, "shape": "s", "rows": []}))
    page = tmp_path / "page.html"
    cli("bench", "report", tmp_path / "a", tmp_path / "b", "-o", page).refused("of 2 runs (a, b)")
    assert not page.exists()
