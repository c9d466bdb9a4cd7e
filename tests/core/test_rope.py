"""Frequencies and pairs against transformers' own rotary modules."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BertConfig, GPT2Config

from fasa_trt.core.errors import FasaError
from fasa_trt.core.rope import Rotary, chunk_pairs, head_dim_of, layer_type, rotary_of
from tests.models import BASE, LONGROPE, VARIANTS

T = 40  # positions looked at
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
# Beyond what tests/models.py exports: other scalings, and the rest of the models that rotate neighbouring dims.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "gemma3-scaled": (
        "gemma3_text",
        {
            "sliding_window": 24,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
    ),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": 24}),
    "helium": ("helium", {}),
    "ernie4_5": ("ernie4_5", {}),
}
ALL = {**VARIANTS, **MORE}


def tiny(variant: str, **overrides: Any) -> Any:
    model_type, differences = ALL[variant]
    config = CONFIG_MAPPING[model_type](**{**BASE, **differences, **overrides})
    return AutoModelForCausalLM.from_config(config).eval()


def angles_of(model: Any, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' cos and sin [1, length, rotary dims] of one layer."""
    positions = torch.arange(length)[None]
    x = torch.zeros(1, length, model.config.hidden_size)
    rotary = model.model.rotary_emb
    per_type = isinstance(getattr(rotary, "rope_type", None), dict)
    cos, sin = rotary(x, positions, *([layer_type(model.config, layer)] if per_type else []))
    return cos, sin


def rotate(x: np.ndarray, rotary: Rotary) -> np.ndarray:
    """x [..., T, d], each pair turned by its angle."""
    cos, sin = rotary.angles(np.arange(x.shape[-2]))
    out = np.empty_like(x)
    a, b = x[..., rotary.pairs[:, 0]], x[..., rotary.pairs[:, 1]]
    out[..., rotary.pairs[:, 0]] = a * cos - b * sin
    out[..., rotary.pairs[:, 1]] = b * cos + a * sin
    return out


@pytest.mark.parametrize("variant", ALL)
def test_rotates_as_transformers_does(variant: str) -> None:
    """The same random queries and keys, turned by both, for every layer."""
    model = tiny(variant)
    config, apply = model.config, sys.modules[type(model).__module__].apply_rotary_pos_emb
    heads, head_dim = config.num_attention_heads, head_dim_of(config)
    rng = np.random.default_rng(0)
    for layer in range(config.num_hidden_layers):
        rotary = rotary_of(config, layer, max_seq_len=T)
        if rotary is None:
            continue
        q, k = (rng.normal(size=(1, heads, T, head_dim)).astype(np.float32) for _ in "qk")
        wanted = apply(torch.from_numpy(q), torch.from_numpy(k), *angles_of(model, layer, T))
        np.testing.assert_allclose(rotate(q, rotary), wanted[0].numpy(), atol=2e-5)
        np.testing.assert_allclose(rotate(k, rotary), wanted[1].numpy(), atol=2e-5)
        assert sorted(rotary.pairs.reshape(-1).tolist()) == list(range(head_dim))
        assert rotary.num_chunks == head_dim // 2
        assert rotary.inv_freq.dtype == rotary.scale.dtype == np.float32


def check_angles(model: Any, length: int) -> None:
    """cos and sin of all rotated chunks, up to the very last position."""
    rotary = rotary_of(model.config, 0, max_seq_len=length)
    assert rotary is not None
    cos, sin = rotary.angles(np.arange(length))
    wanted_cos, wanted_sin = (x[0].numpy() for x in angles_of(model, 0, length))
    half = wanted_cos.shape[-1] // 2
    np.testing.assert_allclose(cos[:, :half], wanted_cos[:, :half], atol=1e-4)
    np.testing.assert_allclose(sin[:, :half], wanted_sin[:, :half], atol=1e-4)


@pytest.mark.parametrize("length", [64, 65, 250])
def test_longrope_takes_its_factors_by_length(length: int) -> None:
    model = tiny("phi3-longrope")
    check_angles(model, length)
    rotary = rotary_of(model.config, 0, max_seq_len=length)
    assert rotary is not None
    factors = np.array(LONGROPE["short_factor" if length <= 64 else "long_factor"])
    plain = 10000.0 ** -(np.arange(12) / 12)
    np.testing.assert_allclose(rotary.inv_freq[:12], plain / factors, rtol=1e-5)
    assert rotary.scale[0] == pytest.approx(np.sqrt(1 + np.log(256 / 64) / np.log(64)))
    assert rotary.scale[12:].tolist() == [1, 1, 1, 1]
    assert rotary.inv_freq[12:].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("length", [32, 64, 300])
def test_dynamic_is_resolved_for_the_capacity(length: int) -> None:
    model = tiny("llama-dynamic", max_position_embeddings=64)
    check_angles(model, length)
    rotary, short = (rotary_of(model.config, 0, max_seq_len=n) for n in (length, 32))
    assert rotary is not None and short is not None
    assert (rotary.inv_freq[1:] < short.inv_freq[1:]).all() == (length == 300)


def test_without_a_length_the_trained_one_counts() -> None:
    config = tiny("llama-dynamic", max_position_embeddings=64).config
    default, trained = rotary_of(config, 0), rotary_of(config, 0, max_seq_len=64)
    assert default is not None and trained is not None
    np.testing.assert_array_equal(default.inv_freq, trained.inv_freq)


def test_gemma3_has_frequencies_by_layer_type() -> None:
    config = tiny("gemma3").config
    kinds = {layer_type(config, layer) for layer in range(config.num_hidden_layers)}
    assert kinds == {"sliding_attention", "full_attention"}
    found: dict[str, set[bytes]] = {}
    for layer in range(config.num_hidden_layers):
        rotary = rotary_of(config, layer)
        assert rotary is not None
        found.setdefault(layer_type(config, layer), set()).add(rotary.inv_freq.tobytes())
    assert all(len(tables) == 1 for tables in found.values())
    assert found["sliding_attention"] != found["full_attention"]


def test_layers_without_rope() -> None:
    config = tiny("smollm3").config
    model = tiny("smollm3").model
    rotates = [rotary_of(config, layer) is not None for layer in range(config.num_hidden_layers)]
    assert rotates == [bool(layer.self_attn.use_rope) for layer in model.layers]
    assert set(rotates) == {True, False}


@pytest.mark.parametrize("config", [GPT2Config(), BertConfig()])
def test_model_without_rope(config: Any) -> None:
    with pytest.raises(FasaError, match=f"{config.model_type} has no rotary position embedding.*use a RoPE model"):
        rotary_of(config, 0)


def test_unknown_rope_type() -> None:
    config = SimpleNamespace(
        model_type="llama", head_dim=32, rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0}
    )
    with pytest.raises(FasaError, match=r"rope_type 'spiral' .*known types: default, .*yarn"):
        rotary_of(config, 0)


even = st.integers(1, 32).map(lambda n: 2 * n)


@settings(deadline=None)
@given(even, even, st.booleans())
def test_chunk_pairs(head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    rotary_dim = min(rotary_dim, head_dim)
    pairs = chunk_pairs(head_dim, rotary_dim, interleaved=interleaved).tolist()
    assert sorted(dim for pair in pairs for dim in pair) == list(range(head_dim))
    for i, pair in enumerate(pairs):
        if i < rotary_dim // 2 and not interleaved:
            assert pair == [i, i + rotary_dim // 2]
        else:
            assert pair == [2 * i, 2 * i + 1]


def test_angles() -> None:
    rotary = Rotary(
        pairs=chunk_pairs(6, 4, interleaved=False),
        inv_freq=np.array([1.0, 0.5, 0.0], np.float32),
        scale=np.array([2.0, 2.0, 1.0], np.float32),
    )
    cos, sin = rotary.angles(np.array([[0, 3]]))
    assert cos.shape == sin.shape == (1, 2, 3)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(cos[0], [[2, 2, 1], [2 * np.cos(3), 2 * np.cos(1.5), 1]], rtol=1e-6)
    np.testing.assert_allclose(sin[0], [[0, 0, 0], [2 * np.sin(3), 2 * np.sin(1.5), 0]], rtol=1e-6)


def test_head_dim() -> None:
    assert head_dim_of(SimpleNamespace(head_dim=32, hidden_size=48, num_attention_heads=4)) == 32
    assert head_dim_of(SimpleNamespace(head_dim=None, hidden_size=48, num_attention_heads=4)) == 12
    assert head_dim_of(SimpleNamespace(hidden_size=48, num_attention_heads=4)) == 12


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (SimpleNamespace(layer_types=["full_attention", "sliding_attention"], sliding_window=8), "sliding_attention"),
        (SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=8), "full_attention"),
        (SimpleNamespace(sliding_window=8), "sliding_attention"),
        (SimpleNamespace(sliding_window=None), "full_attention"),
        (SimpleNamespace(), "full_attention"),
    ],
)
def test_layer_type(config: Any, wanted: str) -> None:
    assert layer_type(config, 1) == wanted
