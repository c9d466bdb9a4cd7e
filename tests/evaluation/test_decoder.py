"""Prefill and decode steps against transformers' own forward pass and generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation import decoder as decoder_module
from fasa_trt.evaluation.attention import NAME, Traffic
from fasa_trt.evaluation.decoder import Decoder, answer
from fasa_trt.evaluation.methods import parse_method
from fasa_trt.evaluation.methods.dense import Dense
from fasa_trt.evaluation.model import EvalModel, load_eval_model
from tests.models import make_model

VARIANTS = ("llama", "llama-3", "mistral-sliding", "qwen3", "phi3-longrope", "gemma2", "gemma3", "smollm3", "glm4")
ROWS = [list(range(2, 43)), list(range(50, 83))]  # of 41 and 33 tokens
MORE = [[7, 9, 11], [8, 10, 12, 14, 16]]


def random_model(variant: str, directory: Path, tokenizer_dir: Path) -> EvalModel:
    model = AutoModelForCausalLM.from_pretrained(make_model(variant, directory), dtype=torch.float32).eval()
    model.set_attn_implementation(NAME)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return EvalModel(open_checkpoint(directory), model, tokenizer)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("small", [False, True])
def test_dense_is_transformers(
    variant: str, small: bool, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of different length, part of the prompt read later, steps in one pass or (small) one by one."""
    if small:
        monkeypatch.setitem(decoder_module.LOGITS, "cpu", 1)
    model = random_model(variant, tmp_path, tiny_dir)
    runner = Decoder(model)
    cache = runner.prefill([row[:-2] for row in ROWS], 64)
    runner.read_on(cache, [ROWS[0][-2:], ROWS[1][-2:]])
    branch = cache.branch()
    every = runner.feed(branch, MORE, runner.dense, Traffic(), every=True)
    last = runner.feed(cache.branch(), MORE, runner.dense, Traffic())
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    for row, (prompt, more) in enumerate(zip(ROWS, MORE, strict=True)):
        with torch.no_grad():
            wanted = own(torch.tensor([[*prompt, *more]])).logits[0, -len(more) :]
        torch.testing.assert_close(every[row, : len(more)], wanted, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(last[row], wanted[-1], atol=2e-4, rtol=1e-3)
    assert branch.lengths == [44, 38] and cache.lengths == [41, 33]


def test_answers_are_generations(tiny: EvalModel) -> None:
    prompts = ["def add(a, b):\n    return", "import os\n\n\nclass Path:\n    def __init__(self"]
    tokens = [[*tiny.prefix, *tiny.encode(prompt)] for prompt in prompts]
    runner = Decoder(tiny)
    cache = runner.prefill([row[:-3] for row in tokens], 64)
    found, traffic = answer(runner, cache, Dense(), [row[-3:] for row in tokens], [12, 7])
    own = AutoModelForCausalLM.from_pretrained(tiny.checkpoint.path, dtype=torch.float32).eval()
    for row, given, count in zip(tokens, found, (12, 7), strict=True):
        wanted = own.generate(torch.tensor([row]), max_new_tokens=count, do_sample=False)[0, len(row) :].tolist()
        assert given == wanted[: len(given)] and (len(given) == count or wanted[len(given)] in tiny.eos)
    assert traffic.share == 1.0


def test_an_answer_stops(tiny: EvalModel) -> None:
    tokens = [*tiny.prefix, *tiny.encode("x = [1, 2, 3]\nx = [1, 2, 3]\nx = [1, 2")]
    runner = Decoder(tiny)
    (found,), _ = answer(runner, runner.prefill([tokens[:-1]], 64), Dense(), [tokens[-1:]], [16], stop="\n")
    assert "\n" in tiny.decode(found[-1:]) and "\n" not in tiny.decode(found[:-1])


def test_branches_leave_no_trace(tiny: EvalModel) -> None:
    tokens = [*tiny.prefix, *tiny.encode("for i in range(10):\n    print(i)\n" * 12)]
    runner = Decoder(tiny)
    cache = runner.prefill([tokens], len(tokens) + 8).repeat([2])
    assert cache.keys[0].shape[0] == 2
    spec = parse_method("fasa", 64)
    first = runner.feed(cache.branch(), MORE, runner.start(cache, spec), Traffic())
    runner.feed(cache.branch(), [[1, 2, 3, 4, 5, 6]] * 2, runner.dense, Traffic())
    assert torch.equal(runner.feed(cache.branch(), MORE, runner.start(cache, spec), Traffic()), first)


def test_bytes_are_those_of_the_tokens_attended(tiny: EvalModel) -> None:
    runner, traffic = Decoder(tiny), Traffic()
    cache = runner.prefill([list(range(2, 202))], 210)
    selectors = runner.start(cache, parse_method("streamingllm:dense_layers=2", 50))
    assert [selector is None for selector in selectors] == [True] * 2 + [False] * 4
    runner.feed(cache.branch(), [[5, 6]], selectors, traffic)
    token = 2 * 128 * 4
    assert float(traffic.dense) == 6 * (201 + 202) * token
    assert float(traffic.read) == 2 * (201 + 202) * token + 4 * 2 * 50 * token


def test_only_layers_that_can_be_are_sparse(tiny_dir: Path, tmp_path: Path) -> None:
    model = random_model("smollm3", tmp_path, tiny_dir)
    selectors = Decoder(model).start(Decoder(model).prefill([ROWS[0]], 48), parse_method("oracle", 8))
    assert [selector is not None for selector in selectors] == [True, True, True, False, True]


def test_sparse_logits_differ_and_a_large_budget_is_dense(tiny: EvalModel) -> None:
    tokens = [*tiny.prefix, *tiny.encode("for i in range(10):\n    print(i)\n" * 20)]
    runner = Decoder(tiny)
    cache = runner.prefill([tokens], len(tokens) + 4)
    dense = runner.feed(cache.branch(), [[7, 8]], runner.dense, Traffic())
    for spec in ("fasa", "quest", "snapkv", "streamingllm", "triattention", "oracle"):
        near, far = (
            runner.feed(cache.branch(), [[7, 8]], runner.start(cache, parse_method(spec, budget)), Traffic())
            for budget in (len(tokens) + 16, 48)
        )
        assert torch.equal(near, dense), spec
        assert not torch.equal(far, dense), spec


def test_a_full_cache_is_a_mistake(tiny: EvalModel) -> None:
    runner = Decoder(tiny)
    cache = runner.prefill([[5, 6, 7]], 4)
    with pytest.raises(ValueError, match="do not fit into 4 columns"):
        runner.feed(cache, [[1, 2]], runner.dense, Traffic())


def test_models_that_cannot_be_evaluated(tiny: EvalModel, tmp_path: Path, tiny_dir: Path) -> None:
    with pytest.raises(FasaError, match="no chat template"):
        load_eval_model(tiny.checkpoint, device="cpu", chat=True)
    with pytest.raises(FasaError, match="does not pass arguments on"):
        tiny.model(torch.tensor([[1, 2]]))
    other = open_checkpoint(make_model("llama", tmp_path))
    with pytest.raises(FasaError, match="calibrated on another model"):
        load_eval_model(other, profile=tiny.profile, device="cpu")
