"""FASA in transformers models: every architecture against the reference, padding, generation, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.plan import plan_layers
from fasa_trt.runtime.torch import load, load_fasa, unload_fasa
from fasa_trt.runtime.torch.paged import PagedLayer
from tests.engines import Exported, Planned, random_profile, reference_steps, relative
from tests.kernels_on_cpu import operators_on_cpu
from tests.models import VARIANTS, make_model

SETTINGS: dict[str, Any] = {"budget": 16, "n_tip": 4, "sink": 2, "recent": 4}
PROMPT, STEPS = 40, 12


@pytest.fixture(params=["reference", "paged"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Models on the CPU run with the reference's layers, or with the GPU's over the operators' stand-ins."""
    if request.param == "paged":
        monkeypatch.setattr("fasa_trt.runtime.torch.reference.ReferenceLayer", PagedLayer)
    with operators_on_cpu():
        yield str(request.param)


def tokens(batch: int = 2, length: int = PROMPT + STEPS) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 97, (batch, length))


def steps_of(model: Any, ids: np.ndarray, start: int, mask: torch.Tensor | None = None) -> np.ndarray:
    """Logits [batch, T - start + 1, vocab] of a prefill of `start` columns and of every step after it."""
    rows = torch.from_numpy(ids)
    out = model(rows[:, :start], attention_mask=None if mask is None else mask[:, :start])
    found = [out.logits[:, -1:]]
    for t in range(start, ids.shape[1]):
        columns = None if mask is None else mask[:, : t + 1]
        out = model(rows[:, t : t + 1], past_key_values=out.past_key_values, attention_mask=columns)
        found.append(out.logits)
    return torch.cat(found, dim=1).detach().numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture(variant: str, layers: str, tmp_path: Path) -> None:
    """Dense prefill equals transformers, sparse steps equal the reference."""
    directory = make_model(variant, tmp_path)
    checkpoint = open_checkpoint(directory)
    profile = random_profile(checkpoint)
    model = load_fasa(directory, profile, **SETTINGS, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    spec = SparseSpec(**SETTINGS).resolve(head_dim=32, num_layers=checkpoint.num_layers, max_seq_len=256)
    plans = plan_layers(checkpoint, profile, spec, max_seq_len=256)
    ids = tokens()
    wanted, comparable = reference_steps(cast(Exported, Planned(checkpoint, plans, spec, plain)), ids, PROMPT)
    with torch.no_grad():
        dense = plain(torch.from_numpy(ids)).logits.numpy()
    got = steps_of(model, ids, PROMPT)
    assert relative(got[:, 0], dense[:, PROMPT - 1]) < 2e-4
    assert comparable.mean() > 0.3
    assert relative(got[:, 1:][comparable], wanted[comparable]) < 2e-4
    if any(plan.sparse for plan in plans):
        assert relative(got[:, 1:], dense[:, PROMPT:]) > 1e-3, "sparsity changed nothing: the test proves nothing"


@pytest.mark.parametrize("variant", ["llama", "gemma2", "mistral-sliding"])
def test_left_padding(variant: str, layers: str, tmp_path: Path) -> None:
    """A padded row computes what it computes alone; the prefill comes in two chunks."""
    directory = make_model(variant, tmp_path)
    model = load_fasa(directory, random_profile(open_checkpoint(directory)), **SETTINGS, device="cpu")
    ids = tokens(3)
    padding = [0, 7, PROMPT - 3]
    mask = torch.stack([(torch.arange(PROMPT + STEPS) >= pad).long() for pad in padding])
    together = steps_of(model, ids, PROMPT, mask)
    for row, pad in enumerate(padding):
        alone = steps_of(model, ids[row : row + 1, pad:], PROMPT - pad)
        assert relative(together[row], alone[0]) < 1e-4

    rows = torch.from_numpy(ids)
    first = model(rows[:, :20], attention_mask=mask[:, :20])
    rest = model(rows[:, 20:PROMPT], attention_mask=mask[:, :PROMPT], past_key_values=first.past_key_values)
    assert relative(rest.logits[:, -1].detach().numpy(), together[:, 0]) < 1e-4


def test_generate(layers: str, tmp_path: Path) -> None:
    """Greedy, in a padded batch, equals each prompt alone; sampling draws by the seed; prompts do not mix."""
    directory = make_model("llama", tmp_path)
    model: Any = load_fasa(directory, random_profile(open_checkpoint(directory)), **SETTINGS, device="cpu")
    ids = torch.from_numpy(tokens(2, 30))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, do_sample=False, **options)
    alone = model.generate(ids[1:, 9:], attention_mask=mask[1:, 9:], do_sample=False, **options)
    assert together.shape == (2, 40)
    assert together[1, 30:].tolist() == alone[0, 21:].tolist()

    def drawn(seed: int) -> list[int]:
        torch.manual_seed(seed)
        found: list[int] = (
            model.generate(ids, attention_mask=mask, do_sample=True, **options)[:, 30:].flatten().tolist()
        )
        return found

    assert drawn(1) == drawn(1) != drawn(2)
    three = model.generate(ids[:1], do_sample=True, num_return_sequences=3, attention_mask=mask[:1], **options)
    assert three.shape == (3, 40)


def test_other_settings_and_back(tmp_path: Path) -> None:
    """A loaded model takes a new budget, and gets its own attention back."""
    directory = make_model("llama", tmp_path)
    profile, ids = random_profile(open_checkpoint(directory)), tokens(1)
    plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    before, wanted = plain.config._attn_implementation, steps_of(plain, ids, PROMPT)
    model: Any = load_fasa(plain, profile, **SETTINGS, device="cpu")
    assert model is plain
    sparse = steps_of(model, ids, PROMPT)
    load_fasa(model, profile, budget=64, n_tip=4)
    assert relative(steps_of(model, ids, PROMPT), wanted) < 1e-5
    assert relative(sparse[:, 1:], wanted[:, 1:]) > 1e-3
    unload_fasa(model)
    unload_fasa(model)
    assert model.config._attn_implementation == before
    assert (steps_of(model, ids, PROMPT) == wanted).all()


def test_defaults(tiny_dir: Path) -> None:
    model: Any = load_fasa(tiny_dir, random_profile(open_checkpoint(tiny_dir)), device="cpu")
    cache = model(torch.tensor([[0, 5]])).past_key_values
    assert [layer.settings.plan.n_tip for layer in cache.layers] == [0] + [32] * 5
    assert cache.layers[1].settings.labels == "int4"
    assert cache.get_seq_length() == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    assert model(torch.tensor([[0, 5]]), past_key_values=cache).logits.shape[:2] == (1, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("small"))


def test_refused_loads(small: Path, tmp_path: Path) -> None:
    profile = random_profile(open_checkpoint(small))
    for settings, message in (
        ({"budget": 0}, "budget must be at least 1 token"),
        ({"budget": 1000}, "larger than the engine's capacity"),
        ({"labels": "int2"}, "unknown labels 'int2'"),
        ({"n_tip": 17}, "n-tip 17 is out of range"),
        ({"dense_layers": [9]}, "dense layer 9 does not exist"),
        ({"device": "cuda:99"}, "no device 'cuda:99' here"),
    ):
        with pytest.raises(FasaError, match=message):
            load_fasa(small, profile, **settings)
    with pytest.raises(FasaError, match="no such profile"):
        load_fasa(small, tmp_path / "missing.safetensors")
    with pytest.raises(FasaError, match="no such model"):
        load_fasa(tmp_path / "missing", profile)
    other = make_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(FasaError, match="calibrated on another model"):
        load_fasa(other, profile)
    nameless = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(small).config)
    nameless.name_or_path = ""
    with pytest.raises(FasaError, match="does not say which checkpoint"):
        load_fasa(nameless, profile)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(FasaError, match="architecture 'gpt_neox' is not supported"):
        load_fasa(tmp_path, random_profile(open_checkpoint(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({}, torch.bfloat16, "no head_dim 32"),
        ({"budget": 8, "n_tip": 8, "sink": 1, "recent": 2}, torch.bfloat16, "no budget of 8"),
        ({"n_tip": 12}, torch.bfloat16, "no n_tip 12"),
        ({}, torch.float32, "no torch.float32"),
    ],
)
def test_what_the_kernels_lack(settings: dict[str, Any], dtype: torch.dtype, message: str, small: Path) -> None:
    checkpoint = open_checkpoint(small)
    spec = SparseSpec(**{"n_tip": 8, **settings})
    if "head_dim" not in message:
        checkpoint.config.head_dim = 64
    with pytest.raises(FasaError, match=message):
        load._check_kernels(checkpoint, spec, "int4", torch.device("cuda"), dtype)


def test_refused_passes(small: Path) -> None:
    model: Any = load_fasa(small, random_profile(open_checkpoint(small)), **SETTINGS, device="cpu")
    ids = torch.from_numpy(tokens(2, 6))
    right = torch.ones_like(ids)
    right[1, 4:] = 0
    with pytest.raises(FasaError, match='padding_side = "left"'):
        model(ids, attention_mask=right)
    with pytest.raises(FasaError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(FasaError, match="cannot go on with a DynamicCache"):
        cache = DynamicCache()
        cache.update(torch.zeros(2, 2, 3, 32), torch.zeros(2, 2, 3, 32), 0)
        model(ids, past_key_values=cache)
    with pytest.raises(FasaError, match="no beam search"):
        model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=2)
    past = model(ids).past_key_values
    with pytest.raises(FasaError, match="holds 2 sequences"):
        model(ids[:1, :1], past_key_values=past)
    with pytest.raises(FasaError, match="changes the padding"):
        mask = torch.ones(2, 9)
        mask[0, 0] = 0
        model(ids[:, :3], past_key_values=past, attention_mask=mask)
    model.train()
    with pytest.raises(FasaError, match="no gradients"):
        model(ids)
    bare: Any = AutoModelForCausalLM.from_pretrained(small, attn_implementation="fasa")
    with pytest.raises(FasaError, match="needs a profile"):
        bare(ids)
