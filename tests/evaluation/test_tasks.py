"""Every task's documents: they fit, they hold their answers, they repeat; and what is measured on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.decoder import Decoder
from fasa_trt.evaluation.methods import parse_method
from fasa_trt.evaluation.methods.dense import Dense
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.run import read
from fasa_trt.evaluation.tasks import TASKS, parse_tasks
from fasa_trt.evaluation.tasks.base import Batch, Document, TaskSettings

GRID = [name for name, task in TASKS.items() if task.grid and name != "perplexity_text"]
RULER = ["niah_multikey", "niah_multivalue", "niah_multiquery", "variable_tracking", "common_words", "qa"]
SETTINGS = TaskSettings(samples=2, new_tokens=24)


def documents(name: str, model: EvalModel, context: int, **settings: Any) -> list[Document]:
    return TASKS[name].documents(model, context, TaskSettings(**{"samples": 2, "new_tokens": 24, **settings}))


def batch_of(name: str, model: EvalModel, made: list[Document], ask: str = "auto") -> Batch:
    return read(Decoder(model), TASKS[name], [(document, document.questions) for document in made], ask)


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("context", [1024, 3000])
def test_documents_fill_the_context(name: str, context: int, tiny: EvalModel) -> None:
    found = documents(name, tiny, context)
    assert len(found) == 2 and found == documents(name, tiny, context)
    assert found[0].tokens != found[1].tokens
    for document in found:
        total = len(document.tokens) + max(question.room for question in document.questions)
        assert 0.9 * context < total <= context
        assert list(document.tokens[: len(tiny.prefix)]) == tiny.prefix
        assert len({question.id for question in document.questions}) == len(document.questions)


@pytest.mark.parametrize("name", GRID)
def test_a_context_that_is_too_short(name: str, tiny: EvalModel) -> None:
    with pytest.raises(FasaError, match="does not fit into 40 tokens|--contexts"):
        documents(name, tiny, 40)


@pytest.mark.parametrize("name", [*RULER, "recall"])
def test_answers_stand_in_the_document(name: str, tiny: EvalModel) -> None:
    for document in documents(name, tiny, 2048):
        text = tiny.decode(list(document.tokens))
        for question in document.questions:
            assert question.answers and all(answer in text for answer in question.answers)
            right = " ".join(question.answers)
            assert TASKS[name].score(question, f" {right}\n") == 1.0
            assert TASKS[name].score(question, "nothing of the kind") == 0.0


def test_several_answers_count_in_part(tiny: EvalModel) -> None:
    question = documents("niah_multivalue", tiny, 1024)[0].questions[0]
    assert len(question.answers) == 4 and len(set(question.answers)) == 4
    assert TASKS["niah_multivalue"].score(question, question.answers[2]) == 0.25
    assert len(documents("niah_multiquery", tiny, 1024)[0].questions[0].answers) == 4


def test_recall_asks_at_all_depths_and_the_model_answers(tiny: EvalModel) -> None:
    made = documents("recall", tiny, 1024, samples=1)
    depths = [question.facts["depth"] for question in made[0].questions]
    assert depths == sorted(depths) and depths[0] < 0.2 and depths[-1] > 0.8
    found = TASKS["recall"].measure(batch_of("recall", tiny, made), Dense())
    assert TASKS["recall"].aggregate(found) >= 0.9
    near = TASKS["recall"].measure(batch_of("recall", tiny, made), parse_method("streamingllm", 40))
    assert TASKS["recall"].aggregate(near) <= 0.1, "the notes are out of its sight"
    assert all(record["kv_share"] < 0.1 for record in near)


def test_a_method_sees_questions_that_are_prefilled(tiny: EvalModel) -> None:
    """SnapKV keeps what the prompt's end asks for; it cannot know a question that comes later."""
    made = documents("recall", tiny, 1024, samples=1)
    method = parse_method("snapkv:window=8:kernel=13", 200)
    later, prompt = (
        TASKS["recall"].aggregate(TASKS["recall"].measure(batch_of("recall", tiny, made, ask), method))
        for ask in ("decode", "prefill")
    )
    assert prompt > later + 0.3


def test_copies(tiny: EvalModel) -> None:
    made = documents("copy", tiny, 1024, samples=1)
    for question in made[0].questions:
        line = [*question.tokens, *question.facts["expected"]]
        tokens = list(made[0].tokens)
        assert any(tokens[i : i + len(line)] == line for i in range(len(tokens)))
    found = TASKS["copy"].measure(batch_of("copy", tiny, made), Dense())
    assert TASKS["copy"].aggregate(found) >= 0.5
    assert all(len(record["tokens"]) <= 16 for record in found)


def test_perplexity_is_the_models(tiny: EvalModel) -> None:
    made = documents("perplexity_code", tiny, 512)
    found = TASKS["perplexity_code"].measure(batch_of("perplexity_code", tiny, made), Dense())
    own = AutoModelForCausalLM.from_pretrained(tiny.checkpoint.path, dtype=torch.float32).eval()
    for document, record in zip(made, found, strict=True):
        tokens = torch.tensor([[*document.tokens, *document.questions[0].tokens]])
        scored = len(document.questions[0].tokens) - 1
        assert scored == 128
        with torch.no_grad():
            logits = own(tokens).logits[0, -scored - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(logits, tokens[0, -scored:])
        assert record["score"] == pytest.approx(math.exp(wanted), rel=1e-3)
    assert TASKS["perplexity_code"].aggregate([{"score": 2.0}, {"score": 8.0}]) == pytest.approx(4.0)


def test_perplexity_of_ones_own_text(tiny: EvalModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("every line is the same line, more or less\n" * 200)
    made = documents("perplexity_text", tiny, 256, text=tmp_path / "a.txt")
    assert "every line" in tiny.decode(list(made[0].tokens))
    with pytest.raises(FasaError, match="needs a text"):
        documents("perplexity_text", tiny, 256)


def test_long_generation(tiny: EvalModel) -> None:
    made = documents("generation", tiny, 512)
    batch = batch_of("generation", tiny, made)
    rows, _ = batch.reference
    assert [len(row) for row in rows] == [24, 24]
    dense = TASKS["generation"].measure(batch, Dense())
    for record in dense:
        assert record["score"] == record["agreement"] == 1.0 and record["exact"]
        assert abs(record["divergence"]) < 1e-3
    for record in TASKS["generation"].measure(batch, parse_method("streamingllm", 8)):
        assert record["score"] <= record["agreement"] < 1.0 and not record["exact"]
        assert record["divergence"] > 0.01


def test_divergence_begins_where_its_own_generation_does(tiny: EvalModel) -> None:
    from fasa_trt.evaluation.decoder import answer

    made = documents("generation", tiny, 512)
    batch, method = batch_of("generation", tiny, made), parse_method("streamingllm", 24)
    own, _ = answer(batch.decoder, batch.cache, method, batch.rows, [24, 24])
    for row, dense, record in zip(own, batch.reference[0], TASKS["generation"].measure(batch, method), strict=True):
        same = next((i for i, (a, b) in enumerate(zip(row, dense, strict=False)) if a != b), len(row))
        assert record["score"] == same / 24


def write(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_longbench_files(tiny: EvalModel, tmp_path: Path) -> None:
    common = {"length": 9, "language": "en", "all_classes": None, "_id": "1"}
    write(
        tmp_path / "hotpotqa.jsonl",
        {"input": "Who?", "context": "Ada did. " * 40, "answers": ["Ada", "Ada L."], "dataset": "hotpotqa", **common},
        {"input": "Who?", "context": "Bob did. " * 900, "answers": ["Bob"], "dataset": "hotpotqa", **common},
    )
    write(
        tmp_path / "data" / "trec_e.jsonl",
        {"input": "Q: ?", "context": "Q: a", "answers": ["City"], "dataset": "trec", **common, "all_classes": ["City"]},
    )
    write(tmp_path / "dureader.jsonl", {"input": "", "context": "", "answers": [""]})
    found = documents("longbench", tiny, 512, data=tmp_path)
    assert [document.group for document in found] == ["trec_e", "hotpotqa", "hotpotqa"]
    trec, short, long = found
    assert "The following are given passages.\nAda did." in tiny.decode(list(short.tokens))
    assert "Question: Who?\nAnswer:" in tiny.decode(list(short.questions[0].tokens))
    assert "truncated" not in short.questions[0].facts and long.questions[0].facts["truncated"]
    assert len(long.tokens) + long.questions[0].room == 512
    task = TASKS["longbench"]
    assert task.score(short.questions[0], " Ada L.") == 1.0 and task.score(short.questions[0], "Bob") == 0.0
    assert task.score(trec.questions[0], "\nCity\nanything") == 1.0


def test_ruler_files(tiny: EvalModel, tmp_path: Path) -> None:
    text = "Memorize.\nThe number for x is 12.\nThe number for y is 34.\nWhat are the numbers for x, y?"
    write(
        tmp_path / "niah_single_1" / "validation.jsonl",
        {"index": 0, "input": text, "outputs": ["12", "34"], "length": 30, "answer_prefix": " They are"},
    )
    write(tmp_path / "qa_1.jsonl", {"index": 0, "input": text, "outputs": ["Rome", "Roma"], "length": 30})
    niah, qa = documents("ruler", tiny, 512, data=tmp_path)
    assert tiny.decode(list(niah.questions[0].tokens)) == "What are the numbers for x, y? They are"
    assert niah.questions[0].max_new_tokens == 128 and qa.questions[0].max_new_tokens == 32
    assert TASKS["ruler"].score(niah.questions[0], "12 and 35") == 0.5
    assert TASKS["ruler"].score(qa.questions[0], "It is roma.") == 1.0
    with pytest.raises(FasaError, match="needs .* tokens, not 100"):
        documents("ruler", tiny, 100, data=tmp_path)


def test_aime_files(tiny: EvalModel, tmp_path: Path) -> None:
    write(tmp_path / "aime24.jsonl", {"problem": "What is 2 + 2?", "answer": "004"})
    (document,) = documents("aime", tiny, 256, data=tmp_path, new_tokens=None)
    assert len(document.tokens) + document.questions[0].room == 256
    assert TASKS["aime"].score(document.questions[0], "so it is \\boxed{4}.") == 1.0
    write(tmp_path / "aime25.jsonl", {"problem": "?", "answer": "four"})
    with pytest.raises(FasaError, match="'four' is not a whole number"):
        documents("aime", tiny, 256, data=tmp_path)


@pytest.mark.parametrize("name", ["longbench", "ruler", "aime"])
def test_files_that_are_not_there(name: str, tiny: EvalModel, tmp_path: Path) -> None:
    with pytest.raises(FasaError, match="--data DIR"):
        documents(name, tiny, 512)
    with pytest.raises(FasaError, match="no such folder"):
        documents(name, tiny, 512, data=tmp_path / "missing")
    with pytest.raises(FasaError, match="files in"):
        documents(name, tiny, 512, data=tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "record 1: "), ("[1]", "not an object"), ('{"context": "x"}', "without answers"), ("\xff", "codec")],
)
def test_files_that_are_broken(line: str, words: str, tiny: EvalModel, tmp_path: Path) -> None:
    (tmp_path / "hotpotqa.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(FasaError, match=words):
        documents("longbench", tiny, 512, data=tmp_path)


def test_tasks_are_parsed() -> None:
    assert [task.name for task in parse_tasks("recall, qa,recall")] == ["recall", "qa"]
    for text in ("chess", ""):
        with pytest.raises(FasaError, match="recall"):
            parse_tasks(text)


def test_chat_prompts_are_split(tiny: EvalModel) -> None:
    import dataclasses

    class Templated:
        chat_template = "x"

        def __getattr__(self, name: str) -> Any:
            return getattr(tiny.tokenizer, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tiny.tokenizer(*args, **kwargs)

        def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> str:
            return f"<user>{turns[0]['content']}</user>"

    model = dataclasses.replace(tiny, tokenizer=Templated(), chat=True)  # type: ignore[arg-type]
    before, after = model.prompt("a text", "a question")
    assert (model.decode(before), model.decode(after)) == ("<user>a text", "a question</user>")
