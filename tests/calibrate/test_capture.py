"""Captured queries and keys: the right ones, after RoPE, for every architecture, without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fasa_trt.calibrate.capture import capture
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.rope import rotary_of, window_of
from tests.models import VARIANTS, make_model

Captured = dict[int, tuple[Tensor, Tensor, float]]
TOKENS = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))


def load(directory: Path, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention, dtype=dtype).eval()


def captured(model: Any, tokens: Tensor, **options: Any) -> tuple[Captured, Any]:
    found: Captured = {}

    def observe(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        assert layer not in found
        found[layer] = q.clone(), k.clone(), scale

    with capture(model, observe, **options):
        output = model(tokens, use_cache=False, output_attentions=model.config._attn_implementation == "eager")
    return found, output


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield make_model(request.param, tmp_path_factory.mktemp(request.param))


def test_softmax_of_the_captured_is_the_attention(variant: Path) -> None:
    checkpoint = open_checkpoint(variant)
    found, output = captured(load(variant), TOKENS)
    assert sorted(found) == list(range(checkpoint.num_layers))
    length = TOKENS.shape[1]
    behind = torch.arange(length)[:, None] - torch.arange(length)
    for layer, (q, k, scale) in found.items():
        assert q.shape == (2, checkpoint.num_heads, length, checkpoint.head_dim)
        assert k.shape == (2, checkpoint.num_kv_heads, length, checkpoint.head_dim)
        logits = scale * q @ k.repeat_interleave(checkpoint.num_heads // checkpoint.num_kv_heads, 1).transpose(2, 3)
        softcap = checkpoint.config.attn_logit_softcapping if checkpoint.config.model_type == "gemma2" else None
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        hidden = (behind < 0) | (behind >= (window_of(checkpoint.config, layer) or length))
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        torch.testing.assert_close(weights, output.attentions[layer], atol=1e-5, rtol=1e-4)


def test_chunks_are_the_pairs_that_rotate(variant: Path) -> None:
    """One token everywhere: layer 0's keys differ by their rotation alone, a fixed angle from each to the next."""
    checkpoint = open_checkpoint(variant)
    found, _ = captured(load(variant), torch.full((1, 30), 5))
    rotary = rotary_of(checkpoint.config, 0)
    assert rotary is not None
    pairs = found[0][1][0][:, :, torch.from_numpy(rotary.pairs)].double()  # [kv_heads, length, F, 2]
    turning = torch.view_as_complex(pairs.contiguous())
    torch.testing.assert_close(turning.abs(), turning.abs()[:, :1].expand_as(turning), atol=1e-4, rtol=1e-3)
    turns = torch.exp(1j * torch.from_numpy(rotary.inv_freq).double())
    torch.testing.assert_close(turning[:, 1:], turning[:, :-1] * turns, atol=1e-3, rtol=1e-3)


def test_rotation_by_hand(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model("llama", tmp_path))
    model = load(tmp_path)
    found, _ = captured(model, TOKENS)
    with torch.no_grad():
        attention, layer = model.model.layers[0].self_attn, model.model.layers[0]
        hidden = layer.input_layernorm(model.model.embed_tokens(TOKENS))
        q = attention.q_proj(hidden).view(2, 40, checkpoint.num_heads, checkpoint.head_dim).transpose(1, 2)
    half = checkpoint.head_dim // 2
    theta = checkpoint.config.rope_parameters["rope_theta"]
    angle = torch.arange(40)[:, None] * theta ** (-torch.arange(half) / half)
    first, second = q[..., :half], q[..., half:]
    rotated = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    torch.testing.assert_close(found[0][0], torch.cat(rotated, -1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_implementation_and_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    make_model("qwen3", tmp_path)
    eager, _ = captured(load(tmp_path, "eager", dtype), TOKENS)
    sdpa, _ = captured(load(tmp_path, "sdpa", dtype), TOKENS)
    assert all(tensor.dtype == dtype for tensor in sdpa[0][:2])
    for ours, theirs in zip(sdpa[0], eager[0], strict=True):  # later layers see other rounding
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_and_functions_stay_as_they_are(tmp_path: Path, attention: str) -> None:
    make_model("llama", tmp_path)
    model = load(tmp_path, attention)
    before, functions = model(TOKENS).logits, dict(ALL_ATTENTION_FUNCTIONS)
    _, output = captured(model, TOKENS)
    assert torch.equal(output.logits, before)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions

    def fail(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        raise KeyError(layer)

    with pytest.raises(KeyError), capture(model, fail):
        model(TOKENS)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert torch.equal(model(TOKENS).logits, before)


def test_somebody_elses_function_is_called_and_put_back(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    model, calls = load(tmp_path, "sdpa"), []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = counting
    try:
        captured(model, TOKENS)
        assert len(calls) == 3 and ALL_ATTENTION_FUNCTIONS["sdpa"] is counting
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    model, other, seen = load(tmp_path), load(tmp_path), []
    with capture(model, lambda layer, q, k, scale: seen.append(layer)):
        other(TOKENS)
    assert not seen


def test_last_layer_is_captured_but_not_computed(tmp_path: Path) -> None:
    make_model("glm", tmp_path)
    model = load(tmp_path, "sdpa")
    whole, _ = captured(model, TOKENS)
    found, output = captured(model, TOKENS, last_layer=2)
    assert torch.equal(found[2][0], whole[2][0]) and torch.equal(found[2][1], whole[2][1])
    assert not torch.allclose(output.logits, model(TOKENS).logits)


def test_attention_of_its_own_kind_is_refused() -> None:
    model = GPTJForCausalLM(GPTJConfig(n_layer=1, n_embd=32, n_head=2, rotary_dim=8, vocab_size=50))
    with pytest.raises(FasaError, match="GPTJForCausalLM"), capture(model, lambda layer, q, k, scale: None):
        pass
