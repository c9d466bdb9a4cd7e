"""The sample model's training code, on a fraction of the data and a fraction of the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.train_tiny import corpus
from examples.train_tiny.model import Shape, TinyLlama, save_checkpoint
from examples.train_tiny.sequences import FIRST_DIGIT, LAST_DIGIT, SequenceGenerator
from examples.train_tiny.train import Settings, length_at, train
from fasa_trt.calibrate.corpus import bundled_files

SHAPE = Shape(vocab=400, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=64, max_positions=1024)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small Python files."""
    folder = tmp_path_factory.mktemp("source")
    lines = bundled_files("source")[0].read_text(encoding="utf-8").splitlines(keepends=True)
    for start in range(0, len(lines), 300):
        (folder / f"part{start}.py").write_text("".join(lines[start : start + 300]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def generator(source: Path, tmp_path_factory: pytest.TempPathFactory) -> SequenceGenerator:
    work = tmp_path_factory.mktemp("sequences")
    texts = list(corpus.read_sources([source], max_mb=1).values())
    tokenizer = corpus.train_tokenizer(texts, SHAPE.vocab)
    tokenizer.save(str(work / "tok.json"))
    tokens = np.array([token for text in texts for token in tokenizer.encode(text).ids], np.uint16)
    return SequenceGenerator(tokens, seed=3, tokenizer=work / "tok.json")


@pytest.mark.parametrize("length", [513, 2049])
def test_training_sequences_have_their_exact_length(generator: SequenceGenerator, length: int) -> None:
    for _ in range(20):
        sample = generator.training(length)
        assert sample.tokens.shape == sample.weights.shape == sample.answers.shape == (length,)
        assert sample.tokens[0] == corpus.BOS


def test_recalls_follow_their_notes(generator: SequenceGenerator) -> None:
    sample = generator.recalls(1500, notes=8, recalls=8, unique=True, tail=1.0, tail_tokens=300)
    firsts, lasts = (np.flatnonzero(sample.answers == mark) for mark in (FIRST_DIGIT, LAST_DIGIT))
    assert len(firsts) == len(lasts) == 8
    text = sample.tokens.tolist()
    for first, last in zip(firsts, lasts, strict=True):
        answer = text[first : last + 1]
        before = text[:first]
        assert any(before[i : i + 5] == answer for i in range(len(before) - 5))
        assert (sample.weights[first : last + 1] == 5).all()


def test_only_the_second_of_two_copies_is_learnt(generator: SequenceGenerator) -> None:
    sample = generator.recalls(800, notes=1, recalls=1, copies=1)
    (learnt,) = np.split(np.flatnonzero(sample.weights == 2), 1)
    copied = sample.tokens[learnt].tolist()
    before = sample.tokens[: learnt[0]].tolist()
    assert any(before[i : i + len(copied)] == copied for i in range(len(before)))


def test_checkpoint_computes_the_same_in_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyLlama(SHAPE)
    save_checkpoint(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens = torch.randint(0, SHAPE.vocab, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(model(tokens, model.rope(50))), theirs(tokens).logits, atol=2e-2, rtol=2e-2
        )


def test_a_held_out_file_stays_held_out() -> None:
    texts = {f"{number:064x}": str(number) for number in range(1, 200)}
    training, held_out = corpus.split(texts)
    assert held_out == ["50", "100", "150"]
    assert len(training) + len(held_out) == len(texts)


def test_lengths_grow_with_the_training_time() -> None:
    assert [length_at(p, (1, 2, 3)) for p in (0.0, 0.19, 0.2, 0.59, 0.6, 0.99)] == [1, 1, 2, 2, 3, 3]


def test_trains_and_saves(source: Path, tmp_path: Path) -> None:
    settings = Settings(
        work=tmp_path,
        source=[source],
        seconds=2.0,
        lengths=(640, 700, 768),
        batch_tokens=768,
        workers=1,
        eval_documents=2,
        cpu=True,
        shape=SHAPE,
    )
    results = train(settings)
    assert results == json.loads((tmp_path / "final.json").read_text())
    assert 1 < results["perplexity@768"] < 1.5 * SHAPE.vocab
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("#")[0] == corpus.BOS
