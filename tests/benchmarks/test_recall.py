"""The recall benchmark on short documents: its counts are those of its records, its answers those of the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.asking import MAX_ANSWER, Reader
from benchmarks.recall import FIRST_SEED, recall
from fasa_trt.bench.cpu import random_profile
from fasa_trt.calibrate.recall import answer_of, recall_document
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from fasa_trt.runtime.generate import load


@pytest.fixture(scope="module")
def engine(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = open_checkpoint(tiny_dir)
    config = BuildConfig.resolve(checkpoint, flags={"budget": 128, "max_seq_len": 1024})
    path = tmp_path_factory.mktemp("recall") / "engine"
    return build_engine(checkpoint, random_profile(checkpoint, 0), config, path).path


@pytest.fixture(scope="module")
def result(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("result") / "recall.json"
    recall(engine=engine, context=1024, questions=5, per_document=3, notes=8, threads=1, output=output)
    content: dict[str, Any] = json.loads(output.read_text("utf-8"))
    return content


def test_settings_are_recorded(result: dict[str, Any]) -> None:
    assert result["context"] == 1024 and result["budget"] == 128 and result["n_tip"] == 24 and result["notes"] == 8
    assert result["first_seed"] == FIRST_SEED and result["calibration"] == {"random_seed": 0}
    assert result["commit"] and result["versions"] and result["backend"]["backend"] == "onnxruntime"
    assert 0 < result["kv_share_read"] < 1


def test_counts_are_those_of_the_answers(result: dict[str, Any]) -> None:
    answers = result["answers"]
    assert result["questions"] == len(answers) == 6, "whole documents: questions are rounded up"
    assert [answer["document"] for answer in answers] == [0, 0, 0, 1, 1, 1]
    assert len({answer["key"] for answer in answers}) == 6
    for mode in ("dense", "fasa"):
        assert result[f"{mode}_correct"] == sum(answer[mode] == answer["expected"] for answer in answers)
    assert result["same_answer"] == sum(answer["dense"] == answer["fasa"] for answer in answers)
    assert result["dense_correct"] >= 5
    assert all(0 <= answer["depth"] < 1 for answer in answers)


def test_documents_leave_room(result: dict[str, Any]) -> None:
    assert len(result["document_tokens"]) == 2
    assert all(900 < tokens < 1024 - MAX_ANSWER for tokens in result["document_tokens"])
    assert result["steps"]["prefill"] == sum(result["document_tokens"]) + 2, "each with the model's first token"
    assert result["steps"]["dense"] > 6 * 10


@pytest.mark.parametrize("sparse", [True, False])
def test_a_question_leaves_no_trace(engine: Path, sparse: bool) -> None:
    """Every question is answered as if it were the only one; a dense answer is what generation gives."""
    reader = Reader(load(engine, threads=1, verify=False))
    document = recall_document(reader.encode, length=900, notes=8, seed=FIRST_SEED)
    prompts = [question.prompt for question in document.questions[:3]]
    reader.read(document.text)
    together = [reader.ask(prompt, sparse=sparse) for prompt in prompts]
    alone = []
    for prompt in prompts:
        reader.read(document.text)
        alone.append(reader.ask(prompt, sparse=sparse))
    assert together == alone
    assert all("\n" in text or len(text) <= MAX_ANSWER for text in together)
    if not sparse:
        texts = [document.text + prompt for prompt in prompts]
        generated = [reader.engine.generate(text, max_new_tokens=6, dense=True)[0].text for text in texts]
        assert [answer_of(text) for text in together] == [answer_of(text) for text in generated]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 64}, "--model and --budget are for making one"),
        ({"per_document": 9}, "9 questions a document need as many notes, not 8"),
        ({"context": 1025, "per_document": 2}, "this engine holds 1024 tokens, not 1025"),
    ],
)
def test_mistakes(engine: Path, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FasaError, match=message):
        recall(**{"engine": engine, "context": 1024, "notes": 8, "output": tmp_path / "x.json", **options})
    assert not list(tmp_path.iterdir())
