"""Generation with the sample model: batches, limits, reasons to finish, and accounts of what was read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import fasa_trt
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from fasa_trt.runtime import rows
from fasa_trt.runtime.generate import Completion, Engine, load
from fasa_trt.runtime.sampling import Sampling
from tests.engines import random_profile

MAX_SEQ_LEN, BUDGET = 96, 24
SHORT = "import os"
CODE = "def largest(values):\n    best = values[0]\n    for value in values:\n        if value > best:\n"
LONG = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n" + CODE[:60]
PROMPTS = [SHORT, LONG, CODE, "x"]


@pytest.fixture(scope="module")
def directory(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose chunk ranking is random: sparse steps choose badly, but by the same code."""
    checkpoint = open_checkpoint(tiny_dir)
    flags = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": 4, "budget": BUDGET, "sink": 2, "recent": 8, "n_tip": 8}
    config = BuildConfig.resolve(checkpoint, flags={**flags, "dense_layers": [0]})
    path = tmp_path_factory.mktemp("generate") / "engine"
    return build_engine(checkpoint, random_profile(checkpoint), config, path).path


@pytest.fixture(scope="module")
def engine(directory: Path) -> Engine:
    return load(directory, threads=1, provider="cpu")


NEW = 16


@pytest.fixture(scope="module")
def expected(tiny_dir: Path, engine: Engine) -> dict[str, list[int]]:
    """transformers' greedy continuations, NEW tokens each."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    found = {}
    for prompt in (SHORT, CODE, LONG):
        ids = torch.tensor([engine.encode(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        found[prompt] = out[0, ids.shape[1] :].tolist()
    return found


def one(engine: Engine, prompt: str, **options: Any) -> Completion:
    (completion,) = engine.generate(prompt, **options)
    return completion


# --- the same as transformers ---


@pytest.mark.parametrize("prompt", [SHORT, CODE, LONG])
@pytest.mark.parametrize("chunk", [512, 7])
def test_dense_greedy_equals_transformers(
    prompt: str, chunk: int, engine: Engine, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "PREFILL_CHUNK", chunk)
    completion = one(engine, prompt, max_new_tokens=NEW, dense=True)
    assert completion.tokens == expected[prompt]
    assert completion.prompt_tokens == len(engine.encode(prompt))


def test_within_the_budget_sparse_equals_transformers(engine: Engine, expected: dict[str, list[int]]) -> None:
    assert len(engine.encode(SHORT)) + NEW <= BUDGET
    assert one(engine, SHORT, max_new_tokens=NEW).tokens == expected[SHORT]


def test_sparsity_changes_something(engine: Engine) -> None:
    """Otherwise nothing here tells sparse steps from dense ones."""
    assert one(engine, LONG, max_new_tokens=20).tokens != one(engine, LONG, max_new_tokens=20, dense=True).tokens


# --- batches ---


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("chunk", [512, 16])
def test_batch_equals_each_alone(dense: bool, chunk: int, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PREFILL_CHUNK", chunk)
    together = engine.generate(PROMPTS, max_new_tokens=24, dense=dense)
    assert len({completion.prompt_tokens for completion in together}) == 4, "the batch is not ragged"
    alone = [one(engine, prompt, max_new_tokens=24, dense=dense) for prompt in PROMPTS]
    assert together == alone
    assert all(completion.text for completion in together)


def test_more_prompts_than_rows(engine: Engine) -> None:
    """The engine has four rows; the others join as rows fall free."""
    prompts = [*PROMPTS, CODE[:20], LONG[:70], "def f(x):"]
    sampling = Sampling(temperature=1.0, seed=2)
    seven = engine.generate(prompts, max_new_tokens=8, sampling=sampling)
    assert seven[:4] == engine.generate(prompts[:4], max_new_tokens=8, sampling=sampling)
    assert engine.generate(prompts, max_new_tokens=8) == [one(engine, text, max_new_tokens=8) for text in prompts]


def test_a_batch_ends_the_one_before(engine: Engine) -> None:
    first = engine.stream(CODE, max_new_tokens=20)
    next(first)
    assert one(engine, SHORT, max_new_tokens=4) == one(engine, SHORT, max_new_tokens=4)
    with pytest.raises(FasaError, match="a later batch has ended this one"):
        next(first)


def test_row_that_ends_early_does_not_disturb_the_others(engine: Engine) -> None:
    """A stop string that ends the first row at once; the others are sparse and go on."""
    alone = [one(engine, prompt, max_new_tokens=24) for prompt in PROMPTS]
    stop = alone[0].text[:3]
    assert not any(stop in completion.text for completion in alone[1:])
    together = engine.generate(PROMPTS, max_new_tokens=24, stop=[stop])
    assert together[1:] == alone[1:]
    assert (together[0].text, together[0].finish_reason) == ("", "stop")


def test_sampling_is_repeatable_and_row_by_row(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    batch = engine.generate([CODE, CODE, SHORT], max_new_tokens=12, sampling=sampling)
    assert batch == engine.generate([CODE, CODE, SHORT], max_new_tokens=12, sampling=sampling)
    assert batch[0].tokens != batch[1].tokens
    assert one(engine, CODE, max_new_tokens=12, sampling=sampling) == batch[0]


def test_pieces_join_to_the_text(engine: Engine) -> None:
    pieces = list(engine.stream(PROMPTS, max_new_tokens=16))
    for row, completion in enumerate(engine.completions):
        assert "".join(piece.text for piece in pieces if piece.row == row) == completion.text
        assert completion.text == engine.tokenizer.decode(completion.tokens, skip_special_tokens=True)
    assert len(pieces) > 20, "not streamed"


def test_stream_yields_before_the_next_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    backend: Any = engine.backend
    step = backend.step

    def count(*arguments: Any, **options: Any) -> Any:
        steps.append(0)
        return step(*arguments, **options)

    monkeypatch.setattr(engine.backend, "step", count)
    pieces = engine.stream(CODE, max_new_tokens=16)
    assert not steps, "nothing runs before it is asked for"
    next(pieces)
    assert len(steps) < 3


# --- why a row finishes ---


def test_length(engine: Engine) -> None:
    completion = one(engine, CODE, max_new_tokens=5)
    assert (len(completion.tokens), completion.finish_reason) == (5, "length")
    assert engine.statistics.new_tokens == 5


def test_capacity(engine: Engine) -> None:
    """Prompt and answer fill the engine to the last slot, whatever was asked for."""
    for prompts in ([LONG], PROMPTS):
        for completion in engine.generate(prompts, max_new_tokens=1000):
            assert completion.prompt_tokens + len(completion.tokens) == MAX_SEQ_LEN
            assert completion.finish_reason == "length"


def test_eos(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third new token declared an end of text: it counts, and is not part of the text."""
    plain = one(engine, CODE, max_new_tokens=10)
    third = plain.tokens[2]
    assert third not in plain.tokens[:2]
    monkeypatch.setattr(engine, "eos", frozenset({third}))
    completion = one(engine, CODE, max_new_tokens=10)
    assert completion.tokens == plain.tokens[:3]
    assert completion.finish_reason == "eos"
    assert completion.text == engine.tokenizer.decode(plain.tokens[:2])


def test_eos_of_the_sample_model(engine: Engine, tiny_dir: Path) -> None:
    assert engine.eos == {1} == {engine.tokenizer.eos_token_id}


@pytest.mark.parametrize("cut", [slice(0, 1), slice(5, 9), slice(10, 30)])
def test_stop_string(cut: slice, engine: Engine) -> None:
    plain = one(engine, CODE, max_new_tokens=24)
    stop = plain.text[cut]
    completion = one(engine, CODE, max_new_tokens=24, stop=[stop, "never said"])
    assert completion.finish_reason == "stop"
    assert completion.text == plain.text.split(stop)[0]
    assert completion.tokens == plain.tokens[: len(completion.tokens)]
    assert len(completion.tokens) < 24


class OwnWords:
    """The real tokenizer, with other bytes for some tokens."""

    def __init__(self, tokenizer: Any, words: dict[int, bytes]) -> None:
        self.tokenizer, self.words = tokenizer, words

    def __call__(self, text: str) -> Any:
        return self.tokenizer(text)

    def decode(self, tokens: list[int], **_: Any) -> str:
        return b"".join(self.words[token] for token in tokens).decode("utf-8", "replace")


def test_stop_string_that_only_the_end_reveals(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token is "." and the first byte of a character that never comes."""
    tokens = one(engine, CODE, max_new_tokens=3).tokens
    assert len(set(tokens)) == 3
    words = dict(zip(tokens, [b"a", b"b", b".\xf0"], strict=True))
    monkeypatch.setattr(engine, "tokenizer", OwnWords(engine.tokenizer, words))
    completion = one(engine, CODE, max_new_tokens=3, stop=["."])
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


# --- refused ---


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, r"the prompt is empty \(pass some text\)"),
        ([""], {}, "the prompt is empty"),
        ([CODE, ""], {}, "the prompt is empty"),
        (CODE, {"max_new_tokens": 0}, "max-new-tokens must be at least 1, not 0"),
        (CODE, {"max_new_tokens": -3}, "max-new-tokens must be at least 1, not -3"),
        (CODE, {"chat": True}, r"this model has no chat template \(leave --chat out\)"),
    ],
)
def test_impossible_requests(prompts: Any, options: dict[str, Any], message: str, engine: Engine) -> None:
    with pytest.raises(FasaError, match=message):
        engine.generate(prompts, **options)


def of_length(engine: Engine, count: int) -> str:
    text = " x" * count
    while len(engine.encode(text)) > count:
        text = text[:-1]
    assert len(engine.encode(text)) == count
    return text


def test_longest_prompt(engine: Engine) -> None:
    completion = one(engine, of_length(engine, MAX_SEQ_LEN - 1))
    assert (len(completion.tokens), completion.finish_reason) == (1, "length")
    message = rf"the prompt has {MAX_SEQ_LEN} tokens, this engine holds {MAX_SEQ_LEN} with the answer \(shorten it"
    with pytest.raises(FasaError, match=message):
        engine.stream([SHORT, of_length(engine, MAX_SEQ_LEN)])  # refused at once, not when it is consumed


# --- accounts ---


def test_statistics(engine: Engine) -> None:
    engine.generate(PROMPTS, max_new_tokens=6)
    stats = engine.statistics
    assert stats.prompt_tokens == sum(len(engine.encode(prompt)) for prompt in PROMPTS)
    assert (stats.new_tokens, stats.decoded_tokens) == (24, 20)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    assert stats.prefill_rate == stats.prompt_tokens / stats.prefill_seconds
    assert stats.decode_rate == 20 / stats.decode_seconds


def read_by(length: int, sparse: bool) -> tuple[int, int]:
    """Elements that one step of one row reads, of 6 layers, the first dense, and 2 KV heads of 128."""
    dense = 2 * 128 * length
    focused = 2 * 8 * length + 2 * 128 * BUDGET if sparse and length > BUDGET else dense
    return 2 * (dense + 5 * focused), 2 * 6 * dense


@pytest.mark.parametrize("dense", [True, False])
def test_cache_reads(dense: bool, engine: Engine) -> None:
    steps = 10
    engine.generate([SHORT, LONG], max_new_tokens=steps + 1, dense=dense)
    lengths = [len(engine.encode(text)) + step for text in (SHORT, LONG) for step in range(1, steps + 1)]
    counted = np.array([read_by(length, not dense) for length in lengths]).sum(axis=0)
    stats = engine.statistics
    assert [stats.kv_read, stats.kv_dense] == counted.tolist()
    assert stats.kv_share == counted[0] / counted[1]
    assert (stats.kv_share == 1) == dense


def test_rows_that_have_finished_are_not_counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = one(engine, SHORT, max_new_tokens=1).tokens[0]
    assert first not in one(engine, LONG, max_new_tokens=10).tokens
    alone = engine.statistics
    monkeypatch.setattr(engine, "eos", frozenset({first}))
    engine.generate([SHORT, LONG], max_new_tokens=10)
    assert (engine.statistics.kv_read, engine.statistics.kv_dense) == (alone.kv_read, alone.kv_dense)
    assert engine.statistics.decoded_tokens == 9


def test_share_without_decode_steps(engine: Engine) -> None:
    engine.generate(SHORT, max_new_tokens=1)
    assert (engine.statistics.kv_share, engine.statistics.decode_rate) == (1.0, 0.0)


# --- loading ---


def test_public_names() -> None:
    assert (fasa_trt.load, fasa_trt.Engine, fasa_trt.Sampling) == (load, Engine, Sampling)
    with pytest.raises(AttributeError, match="nothing"):
        _ = fasa_trt.nothing


def test_chat_template(engine: Engine, directory: Path) -> None:
    engine = Engine(engine.directory, engine.backend, load_tokenizer(directory))
    engine.tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m.content }}!{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    plain = engine.tokenizer("<bos>hello!:", add_special_tokens=False).input_ids
    assert engine.encode("hello", chat=True) == plain
    assert engine.encode("hello") != plain


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "engine"))


def test_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match="is not an engine directory"):
        load(tmp_path)


def test_changed_weights_are_noticed(copy: Path) -> None:
    file = copy / "model.onnx.data"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(FasaError, match=r"model\.onnx\.data is not the file that was built"):
        load(copy)
    load(copy, verify=False)


def test_unusable_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_bytes(b"{" + b" " * ((copy / "tokenizer.json").stat().st_size - 1))
    with pytest.raises(FasaError, match="has no usable tokenizer: .*build from a checkpoint that has one") as caught:
        load(copy, verify=False)
    assert "\n" not in str(caught.value)


def test_engine_of_a_target_that_does_not_run_here(copy: Path) -> None:
    file = copy / "config.json"
    file.write_text(file.read_text("utf-8").replace('"onnxruntime"', '"tensorrtrtx"'), "utf-8")
    with pytest.raises(FasaError, match="is a tensorrtrtx engine of the standard lowering: .*--target onnxruntime"):
        load(copy, verify=False)
