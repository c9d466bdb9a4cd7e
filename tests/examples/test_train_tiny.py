"""The sample models' training code, on a fraction of the data and a fraction of the model."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.train_tiny import __main__ as command
from examples.train_tiny import corpus
from examples.train_tiny.evaluate import greedy
from examples.train_tiny.mix import KINDS, SHARES, Sequences
from examples.train_tiny.model import TinyLlama, losses, save_checkpoint
from examples.train_tiny.sequences import FIRST, LAST, SequenceGenerator
from examples.train_tiny.settings import TINY_TOKENIZER, Settings, Shape, Stage, settings_of
from examples.train_tiny.state import Progress, load_state, save_state
from examples.train_tiny.tasks import TASKS, TaskGenerator
from examples.train_tiny.train import train
from examples.train_tiny.trainer import Trainer
from fasa_trt.calibrate.corpus import bundled_files
from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation import wording
from fasa_trt.evaluation.tasks import common_words, niah, qa, variables

SHAPE = Shape(vocab=400, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=64, max_positions=1024)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small Python files."""
    folder = tmp_path_factory.mktemp("source")
    for number, file in enumerate(bundled_files("source")):
        (folder / f"part{number}.py").write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def work(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of the mix `tasks`, in the words of fasa-tiny's tokenizer."""
    work = tmp_path_factory.mktemp("work")
    settings = settings_of("medium", output=work / "hf", work=work, source=[source])
    corpus.prepare(dataclasses.replace(settings, stages=(Stage(0.0, 2048),)))
    return work


@pytest.fixture(scope="module")
def generator(work: Path) -> SequenceGenerator:
    return Sequences(work, "recall", seed=3).code


@pytest.fixture(scope="module")
def tasks(work: Path) -> TaskGenerator:
    found = Sequences(work, "tasks", seed=3).tasks
    assert found is not None
    return found


@pytest.mark.parametrize("length", [513, 2049])
def test_training_sequences_have_their_exact_length(generator: SequenceGenerator, length: int) -> None:
    for _ in range(20):
        sample = generator.training(length)
        assert sample.tokens.shape == sample.weights.shape == sample.answers.shape == (length,)
        assert sample.tokens[0] == corpus.BOS


def test_recalls_follow_their_notes(generator: SequenceGenerator) -> None:
    sample = generator.recalls(1500, notes=8, recalls=8, unique=True, tail=1.0, tail_tokens=300)
    firsts, lasts = (np.flatnonzero(sample.answers == mark) for mark in (FIRST, LAST))
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


def test_only_repetitions_are_learnt(generator: SequenceGenerator) -> None:
    for _ in range(10):
        sample = generator.repeated(400)
        first = int(np.flatnonzero(sample.weights)[0])
        period = next(n for n in range(8, 200) if (sample.tokens[1 + n :] == sample.tokens[1:-n]).all())
        assert first > period
        assert (sample.weights[first:] == 0.5).all()


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


def test_bundled_text_is_kept_out_of_training(source: Path, tmp_path: Path) -> None:
    before = corpus.read_sources([source], max_mb=1)
    (source / "contextlib.py").write_text(bundled_files("source")[0].read_text(encoding="utf-8"), encoding="utf-8")
    try:
        assert corpus.read_sources([source], max_mb=1) == before
    finally:
        (source / "contextlib.py").unlink()


def test_prose_is_what_docstrings_say() -> None:
    words = "a sentence of some length, again and again. " * 8
    code = f'def f():\n    """{words}of it.\n\n    The end."""\n    return 1\n\ndef g():\n    """Short."""\n'
    assert corpus.prose_of([code, "x = 1\n"]) == [f"{words}of it.\nThe end.\n"]


def test_without_source_the_bundled_text_is_the_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of("medium", output=tmp_path / "hf", work=tmp_path / "work", source=[tmp_path])
    facts = corpus.prepare(dataclasses.replace(settings, stages=(Stage(0.0, 512),)))
    assert facts["bundled_text"]
    assert "bundles" in capsys.readouterr().out
    assert min(facts["sets"][name]["tokens"] for name in ("train", "val", "prose-train", "prose-val")) >= 1024


def test_a_corpus_of_other_settings_is_refused(work: Path) -> None:
    settings = Settings(output=work / "hf", work=work, source=[])
    with pytest.raises(FasaError, match="other settings"):
        corpus.prepare(settings)


def test_the_wording_is_the_evaluations() -> None:
    assert (wording.NEEDLES_BEFORE, wording.NEEDLES_AFTER) == (niah.BEFORE, niah.AFTER)
    assert (wording.VARIABLES_BEFORE, wording.VARIABLES_AFTER) == (variables.BEFORE, variables.AFTER)
    assert (wording.WORDS_BEFORE, wording.WORDS_AFTER) == (common_words.BEFORE, common_words.AFTER)
    assert (wording.QA_BEFORE, wording.QA_AFTER, wording.SYLLABLES) == (qa.BEFORE, qa.AFTER, qa.SYLLABLES)


@pytest.mark.parametrize("task", TASKS)
def test_problems_have_their_exact_length_and_answers(tasks: TaskGenerator, task: str) -> None:
    for length in (513, 2049) * 30:
        sample = tasks.training(task, length)
        assert sample.tokens.shape == sample.weights.shape == sample.answers.shape == (length,)
        assert sample.tokens[0] == corpus.BOS
        firsts, lasts = (np.flatnonzero(sample.answers == mark) for mark in (FIRST, LAST))
        assert len(firsts) == len(lasts) >= 1
        assert (sample.tokens[lasts] == corpus.EOS).all()
        assert lasts[-1] == length - 1


@pytest.mark.parametrize("task", TASKS)
def test_prompts_hold_what_they_ask_for(tasks: TaskGenerator, task: str) -> None:
    prompt, wanted = tasks.prompt(task, 1500)
    assert prompt.shape == (1500,)
    text = tasks.decode(prompt.tolist())
    assert len(wanted) == {"multikey": 1, "multivalue": 4, "multiquery": 4, "variables": 5, "common_words": 10}.get(
        task, 1
    )
    assert all(text.count(word) >= 1 for word in wanted)
    assert text.endswith({"qa": "Answer:", "variables": "they are:", "common_words": "list are:"}.get(task, "text are"))


@pytest.mark.parametrize("task", TASKS)
def test_pieces_are_the_tokens_of_the_whole_text(tasks: TaskGenerator, task: str) -> None:
    """Instructions, needles and questions are put together from pieces; the tokenizer must see them the same way."""
    problem = tasks.problem(task, 2048, most_asks=2)
    ask = problem.asks[0]
    for ids in (problem.before, *problem.needles, problem.body or [], [*ask.question, *ask.answer]):
        assert tasks.encode(tasks.decode(ids)) == ids


def test_a_length_that_no_problem_fits_is_refused(tasks: TaskGenerator) -> None:
    with pytest.raises(ValueError, match="no problem of the task qa fits into 100 tokens"):
        tasks.training("qa", 100)


def test_needles_come_before_their_questions(tasks: TaskGenerator) -> None:
    for _ in range(20):
        prompt, (value,) = tasks.prompt("multikey", 1000)
        text = tasks.decode(prompt.tolist())
        key = text[text.rindex("numbers for ") + 12 : text.rindex(" mentioned")]
        assert f"One of the special magic numbers for {key} is: {value}.\n" in text


def test_a_chain_of_variables_leads_from_the_value_to_every_name(tasks: TaskGenerator) -> None:
    prompt, names = tasks.prompt("variables", 1000)
    text = tasks.decode(prompt.tolist())
    value = text[text.rindex("the value ") + 10 : text.rindex(", they are")]
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    places = [text.index(f"{line}\n") for line in lines]
    assert places == sorted(places)


def test_common_words_are_the_most_common(tasks: TaskGenerator) -> None:
    prompt, wanted = tasks.prompt("common_words", 1900)
    listed = tasks.decode(prompt.tolist()).split("most often.\n")[1].split("\nQuestion")[0].split()[1::2]
    counts = {word: listed.count(word) for word in set(listed)}
    assert min(counts[word] for word in wanted) > max(count for word, count in counts.items() if word not in wanted)


def test_the_mix_draws_every_kind(work: Path) -> None:
    sequences = Sequences(work, "tasks", seed=1)
    kinds = [sequences.training(600).kind for _ in range(300)]
    assert set(kinds) == set(range(len(KINDS)))
    assert sum(SHARES) == pytest.approx(1)
    assert {KINDS[sequences.training(129).kind] for _ in range(50)} == {"text", "copy"}


def test_reseeded_sequences_are_drawn_again(work: Path) -> None:
    sequences = Sequences(work, "tasks", seed=1)
    drawn = []
    for _ in range(2):
        sequences.reseed(4)
        drawn.append([sequences.training(600) for _ in range(20)])
    for first, second in zip(*drawn, strict=True):
        assert first.kind == second.kind
        assert (first.sample.tokens == second.sample.tokens).all()


def test_losses_are_weighted_means() -> None:
    torch.manual_seed(0)
    hidden, norm, embedding = torch.randn(2, 3, 8), torch.ones(8), torch.randn(10, 8)
    targets = torch.randint(0, 10, (2, 3))
    weights = torch.tensor([[1.0, 0, 5], [0, 1, 5]])
    answers = weights == 5
    measured = losses(hidden, norm, embedding, targets, weights, weights == 1, answers)
    scores = torch.nn.functional.rms_norm(hidden, (8,), norm, 1e-5) @ embedding.T
    entropy = -scores.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(measured.loss, (entropy * weights).sum() / 12)
    torch.testing.assert_close(measured.text, (entropy[0, 0] + entropy[1, 1]) / 2)
    torch.testing.assert_close(measured.answer, entropy[:, 2].mean())
    assert measured.right.tolist() == (scores.argmax(-1) == targets)[:, 2].float().tolist()
    assert measured.asked.tolist() == [1, 1]


def test_greedy_answers_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(TinyLlama(SHAPE), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = torch.randint(2, SHAPE.vocab, (3, 20))
    theirs = model.generate(prompts, max_new_tokens=12, do_sample=False, pad_token_id=corpus.EOS)[:, 20:].tolist()
    ours = greedy(model, prompts, 12)
    assert ours == [row[: row.index(corpus.EOS)] if corpus.EOS in row else row for row in theirs]


def test_lengths_grow_with_the_training_time() -> None:
    settings = Settings(Path(), Path(), [], stages=(Stage(0.0, 1), Stage(0.2, 2), Stage(0.6, 3)))
    assert [settings.length_at(p) for p in (0.0, 0.19, 0.2, 0.59, 0.6, 0.99, 1.1)] == [1, 1, 2, 2, 3, 3, 3]


def _small(work: Path, source: Path, **changes: Any) -> Settings:
    settings = Settings(
        output=work / "hf",
        work=work,
        source=[source],
        minutes=2 / 60,
        stages=(Stage(0.0, 640), Stage(0.2, 700), Stage(0.6, 768)),
        batch_tokens=768,
        workers=1,
        eval_documents=2,
        cpu=True,
        compile=False,
        shape=SHAPE,
    )
    return dataclasses.replace(settings, **changes)


def test_trains_saves_and_resumes(source: Path, tmp_path: Path) -> None:
    settings = _small(tmp_path, source)
    log = train(settings)
    assert json.loads(json.dumps(log)) == json.loads((tmp_path / "hf" / "train_log.json").read_text())
    assert log["evaluation"].keys() >= {"perplexity@768", "single@1280", "multi@700"}
    assert 1 < log["evaluation"]["perplexity@768"] < 1.5 * SHAPE.vocab
    assert log["training"][-1]["tokens"] == log["tokens"] > 0
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("#")[0] == corpus.BOS

    longer = train(dataclasses.replace(settings, minutes=(log["seconds"] + 1) / 60, resume=True))
    assert longer["step"] > log["step"]
    assert longer["training"][0]["step"] > log["step"]


def test_trains_on_tasks(source: Path, tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, vocab=2048)
    settings = _small(
        tmp_path,
        source,
        size="medium",
        mix="tasks",
        tokenizer=TINY_TOKENIZER,
        shape=shape,
        stages=(Stage(0.0, 128), Stage(0.3, 512)),
    )
    log = train(settings)
    assert log["evaluation"].keys() >= {f"{task}@1024" for task in TASKS}
    assert log["training"][-1]["answer_tokens_right"].keys() <= set(KINDS[1:])


def test_a_state_brings_back_model_and_optimizer(tmp_path: Path) -> None:
    settings = _small(tmp_path, tmp_path)
    first = Trainer(settings)
    for parameter in first.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    first.optimizer.step()
    save_state(tmp_path / "state", "tiny", first.model, first.optimizer, Progress(7, 8, 9.0))
    second = Trainer(dataclasses.replace(settings, seed=5))
    assert load_state(tmp_path / "state", "tiny", second.model, second.optimizer) == Progress(7, 8, 9.0)
    for mine, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(first.optimizer.state[mine]["exp_avg_sq"], second.optimizer.state[theirs]["exp_avg_sq"])


@pytest.mark.parametrize(("content", "match"), [(None, "nothing to resume"), (b"\x08" * 40, "cannot be resumed")])
def test_a_state_that_is_missing_or_broken_is_refused(tmp_path: Path, content: bytes | None, match: str) -> None:
    if content is not None:
        (tmp_path / "state").write_bytes(content)
    trainer = Trainer(_small(tmp_path, tmp_path))
    with pytest.raises(FasaError, match=match):
        load_state(tmp_path / "state", "tiny", trainer.model, trainer.optimizer)


def test_training_goes_on_where_compilation_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> Any:
        def call(*_: object) -> None:
            raise RuntimeError("no compiler\nin sight")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    trainer = Trainer(_small(tmp_path, tmp_path, compile=True))
    trainer.warm_up()
    assert "torch.compile failed, training without it, slower: no compiler\n" in capsys.readouterr().out
    assert trainer.losses is losses


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--lengths", "512", "1024"], "takes 5 numbers"),
        (["--lengths", "128", "512", "1024", "2048", "32768"], "takes 5 numbers"),
        (["--lengths", "64", "64", "128", "128", "256"], "must end with 512"),
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--source", "no/such/folder"], "no folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--size", "medium", *arguments]) == 1
    assert match in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--work", str(tmp_path / "work")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_the_sizes_are_what_the_readme_says() -> None:
    sizes = {size: settings_of(size, output=Path(), work=Path(), source=[]).shape for size in ("tiny", "medium")}
    with torch.device("meta"):
        counts = {size: sum(p.numel() for p in TinyLlama(shape).parameters()) for size, shape in sizes.items()}
    assert counts == {"tiny": 7_998_720, "medium": 31_732_224}
