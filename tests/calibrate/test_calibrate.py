"""Calibrating whole models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTJConfig,
    GPTJForCausalLM,
)

from fasa_trt.calibrate.calibrate import calibrate
from fasa_trt.calibrate.result import Calibration
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from tests.models import BASE, VARIANTS, make_model

SMALL: dict[str, Any] = {"samples": 2, "length": 256, "queries": 4, "device": "cpu"}
TINY: dict[str, Any] = {"samples": 3, "length": 512, "queries": 6}


def run(directory: Path, **options: Any) -> Calibration:
    return calibrate(open_checkpoint(directory), **{**SMALL, **options})


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Calibration:
    return run(tiny_dir, **TINY)


@pytest.fixture
def random_model(tmp_path: Path, tiny_dir: Path) -> Path:
    return with_tokenizer(make_model("llama", tmp_path / "model", vocab_size=2048), tiny_dir)


def with_tokenizer(directory: Path, tiny_dir: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, directory)
    return directory


def chosen(profile: Profile, rule: str, n_tip: int) -> set[tuple[int, int, int]]:
    ranking = profile.ranking(rule, budget=256)[..., :n_tip]
    return {
        (layer, head, int(chunk))
        for layer, heads in enumerate(ranking)
        for head, row in enumerate(heads)
        for chunk in row
    }


def test_tables(tiny: Calibration, tmp_path: Path) -> None:
    profile = tiny.profile
    assert profile.ks == (64, 128)
    assert tiny.agreement.shape == (3, 2, 6, 8, 64) and tiny.spread.shape == (3, 6, 8, 64)
    np.testing.assert_array_equal(profile.agreement, tiny.agreement.mean(0))
    np.testing.assert_array_equal(profile.spread, tiny.spread.mean(0))
    assert profile.agreement.min() >= 0 and profile.agreement.max() <= 1
    assert profile.spread.min() > 0
    assert profile.info["samples"] == 3 and profile.info["length"] == 512 and profile.info["dtype"] == "float32"
    assert set(profile.info["versions"]) == {"fasa-trt", "torch", "transformers"}
    assert not tiny.warnings() and tiny.n_tip == 24 and tiny.k == 128
    profile.save(tmp_path / "p.safetensors")
    again = Profile.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(again.spread, profile.spread)
    assert again.greedy is None and again.info == profile.info


def test_same_seed_same_profile(tiny: Calibration, tiny_dir: Path) -> None:
    again = run(tiny_dir, **TINY)
    np.testing.assert_array_equal(again.profile.agreement, tiny.profile.agreement)
    np.testing.assert_array_equal(again.profile.spread, tiny.profile.spread)
    assert again.profile.info == tiny.profile.info and again.profile.fingerprint == tiny.profile.fingerprint


def test_the_sample_model_has_chunks_of_its_own(tiny: Calibration, tiny_dir: Path) -> None:
    """Another text chooses nearly the same chunks, and they find keys of a text that did not choose them."""
    other = run(tiny_dir, **TINY, seed=1)
    assert other.profile.info["corpus_hash"] != tiny.profile.info["corpus_hash"]
    for n_tip in (16, 24):
        one, two = chosen(tiny.profile, "spread", n_tip), chosen(other.profile, "spread", n_tip)
        assert len(one & two) / len(one) > 0.75  # by chance n_tip / 64
    stability = tiny.stability()
    assert stability is not None and stability.min() > 0.6
    guess = 128 / 512
    found = {rule: float(tiny.found(rule).mean()) for rule in tiny.held_out}
    assert found["spread"] > found["agreement"] > guess + 0.3
    single = tiny.profile.agreement[tiny.at_budget].max(-1).mean()
    assert found["spread"] > single, "24 chunks find more than the best one"


def test_greedy_order_of_the_sample_model(tiny_dir: Path) -> None:
    result = run(tiny_dir, samples=1, length=512, queries=2, greedy=True)
    assert result.profile.greedy is not None
    assert (np.sort(result.profile.greedy) == np.arange(64)).all()
    assert result.found("greedy").min() > 128 / 512 + 0.2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture(variant: str, tmp_path: Path, tiny_dir: Path) -> None:
    directory = with_tokenizer(make_model(variant, tmp_path, vocab_size=2048), tiny_dir)
    result = run(directory)
    checkpoint = open_checkpoint(directory)
    profile = result.profile
    assert profile.spread.shape == (checkpoint.num_layers, checkpoint.num_heads, checkpoint.head_dim // 2)
    assert np.isfinite(profile.spread).all() and np.isfinite(profile.agreement).all()
    profile.check(checkpoint.fingerprint)
    for layer in range(checkpoint.num_layers):
        if layer not in result.rotary:
            assert not profile.spread[layer].any() and not profile.agreement[:, layer].any()
        elif result.keys[layer] < 64:  # a sliding window: every K takes all of its keys
            assert profile.spread[layer].min() > 0 and (profile.agreement[:, layer] == 1).all()
        else:
            assert profile.spread[layer].min() > 0 and profile.agreement[:, layer].max() < 1
    assert (len(result.rotary) < checkpoint.num_layers) == (variant == "smollm3")


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", "bfloat16"), *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in ("float32", "auto"))],
)
def test_devices_and_dtypes_agree(tiny: Calibration, tiny_dir: Path, device: str, dtype: str) -> None:
    result = run(tiny_dir, **TINY, device=device, dtype=dtype)
    assert result.profile.info["device"] == device
    np.testing.assert_allclose(result.profile.spread, tiny.profile.spread, rtol=0.05, atol=0.02)
    one, two = chosen(result.profile, "spread", 24), chosen(tiny.profile, "spread", 24)
    assert len(one & two) / len(one) > 0.95


def test_same_seed_same_greedy_order(random_model: Path) -> None:
    one, two = (run(random_model, samples=3, greedy=True).profile.greedy for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_progress_counts_to_its_end(random_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(random_model, samples=3, greedy=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]


def test_one_sample(random_model: Path) -> None:
    result = run(random_model, samples=1, greedy=True)
    assert result.stability() is None and result.found("spread").min() > 0
    assert sorted(result.held_out) == ["agreement", "greedy", "spread"]


def test_fewer_positions_than_asked(random_model: Path) -> None:
    result = run(random_model, length=8192)
    assert result.warnings() == ["the model has 256 positions: windows are 256 tokens long, not 8192"]
    assert result.profile.info["length"] == 256


def test_less_text_than_asked(random_model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("some words to calibrate on\n" * 150)
    result = run(random_model, samples=50, text=tmp_path / "own.txt")
    windows = result.profile.info["samples"]
    assert 1 < windows < 50 and len(result.spread) == windows
    assert result.warnings() == [f"the text fills {windows} windows of 256 tokens, not 50: calibrated on those"]


def test_weak_heads_are_named(tiny: Calibration) -> None:
    held_out = {rule: table.copy() for rule, table in tiny.held_out.items()}
    held_out["spread"][:, 2, 4:] = 0.3  # by chance 128 / 512
    weak = replace(tiny, held_out=held_out)
    assert weak.weak_heads() == [(2, 1)]
    assert "1 KV heads" in weak.warnings()[0] and "layers 2" in weak.warnings()[0]
    windowed = replace(weak, keys={**weak.keys, 2: 200})  # K takes every key of a sliding window
    held_out["spread"][:, 2] = 1
    assert not windowed.weak_heads()


@pytest.mark.parametrize("config", [GPT2Config(), BertConfig()])
def test_models_without_rope_are_refused(config: Any, random_model: Path) -> None:
    config.save_pretrained(random_model)
    with pytest.raises(FasaError, match="no rotary position embedding"):
        run(random_model)


def test_attention_of_its_own_kind_is_refused(tmp_path: Path, tiny_dir: Path) -> None:
    config = GPTJConfig(n_layer=1, n_embd=32, n_head=2, rotary_dim=8, vocab_size=2048)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    GPTJForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(FasaError, match="attention interface"):
        run(with_tokenizer(tmp_path, tiny_dir))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 255}, "windows of 255 tokens are too short.*at least 256"),
        ({"samples": 0}, "cannot calibrate on 0 samples"),
        ({"queries": 0}, "with 0 queries"),
        ({"queries": 17}, "1 to 16 queries"),
        ({"device": "gpu"}, "no device 'gpu' here"),
        ({"device": "cuda:99"}, "no device 'cuda:99' here"),
        ({"dtype": "int8"}, "unknown dtype 'int8'.*float32, float16, bfloat16"),
        ({"text": Path("nowhere")}, "no calibration text at nowhere"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, random_model: Path) -> None:
    with pytest.raises(FasaError, match=words):
        run(random_model, **options)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match=r"no tokenizer that transformers can load.*tokenizer\.json"):
        run(make_model("llama", tmp_path))


def test_tokenizer_of_another_model(tmp_path: Path, tiny_dir: Path) -> None:
    with pytest.raises(FasaError, match="the model knows 97.*another model"):
        run(with_tokenizer(make_model("llama", tmp_path), tiny_dir))


def test_broken_weights(random_model: Path) -> None:
    weights = load_file(random_model / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][:] = torch.inf
    save_file(weights, random_model / "model.safetensors", {"format": "pt"})
    with pytest.raises(FasaError, match="layer 1 has infinite or NaN"):
        run(random_model)


def test_config_of_another_shape(random_model: Path) -> None:
    config = random_model / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(FasaError, match=r"lacks model\.layers\.3.* which its config calls for"):
        run(random_model)


def test_text_part_of_a_multimodal_model(tmp_path: Path, tiny_dir: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**BASE, **VARIANTS["gemma3"][1], "vocab_size": 2048},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    result = run(with_tokenizer(tmp_path, tiny_dir))
    assert sorted(result.rotary) == list(range(7)) and result.profile.spread.min() > 0
