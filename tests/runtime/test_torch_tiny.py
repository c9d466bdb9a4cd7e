"""The sample model: the torch runtime against the exported engine on the CPU, and against itself on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from fasa_trt.runtime.generate import load
from fasa_trt.runtime.torch import load_fasa
from tests.engines import random_profile, relative

BUDGET, NEW = 24, 20
SETTINGS: dict[str, Any] = {"budget": BUDGET, "sink": 2, "recent": 8, "n_tip": 8, "dense_layers": [0]}
LONG = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
PROMPTS = ["import os", LONG, "def largest(values):\n    best = values[0]\n    for value in values:\n"]
TEXT = Path(__file__).read_text("utf-8")


def test_greedy_equals_the_engine(tiny_dir: Path, tmp_path: Path) -> None:
    """Token for token, a batch padded on the left against rows that the engine keeps apart."""
    checkpoint = open_checkpoint(tiny_dir)
    profile = random_profile(checkpoint)
    config = BuildConfig.resolve(checkpoint, flags={**SETTINGS, "max_seq_len": 96, "max_batch_size": 4})
    engine = load(build_engine(checkpoint, profile, config, tmp_path / "engine").path, threads=1, provider="cpu")
    wanted = [completion.tokens for completion in engine.generate(PROMPTS, max_new_tokens=NEW)]
    dense = [completion.tokens for completion in engine.generate(PROMPTS, max_new_tokens=NEW, dense=True)]
    assert wanted != dense, "sparsity changed nothing: the test proves nothing"

    rows = [engine.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    model: Any = load_fasa(tiny_dir, profile, **SETTINGS, device="cpu")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for got, tokens in zip(out[:, width:].tolist(), wanted, strict=True):
        assert got[: len(tokens)] == tokens


@pytest.mark.gpu
class TestOnGpu:
    """Teacher-forced steps in bfloat16: two rows of text, one of them padded, 160 tokens of prompt."""

    start, steps, padding = 160, 24, 23

    def ids(self, tokenizer: Any) -> torch.Tensor:
        found = tokenizer(TEXT)["input_ids"]
        length = self.start + self.steps
        return torch.tensor([found[:length], found[length : 2 * length]])

    def logits(self, model: Any, ids: torch.Tensor) -> np.ndarray:
        """float32 [rows, steps, vocab]."""
        ids = ids.to(model.device)
        mask = torch.ones_like(ids)
        mask[1, : self.padding] = 0
        found = []
        with torch.no_grad():
            past = model(ids[:, : self.start], attention_mask=mask[:, : self.start]).past_key_values
            for t in range(self.start, ids.shape[1]):
                out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=past)
                past = out.past_key_values
                found.append(out.logits.float().cpu())
        return torch.cat(found, dim=1).numpy()

    @pytest.mark.parametrize("labels", ["prefix", "int4", "int8", "fp8"])
    @pytest.mark.parametrize("budget", [64, 256])
    def test_equals_the_reference(self, labels: str, budget: int, tiny_dir: Path, tiny_tokenizer: Any) -> None:
        """Within the budget attention is dense, so only rounding tells the two apart; beyond it also near ties."""
        profile, ids = random_profile(open_checkpoint(tiny_dir)), self.ids(tiny_tokenizer)
        settings: dict[str, Any] = {"budget": budget, "n_tip": 32, "dtype": "bfloat16", "labels": labels}
        wanted = self.logits(load_fasa(tiny_dir, profile, device="cpu", **settings), ids)
        got = self.logits(load_fasa(tiny_dir, profile, device="cuda", **settings), ids)
        assert relative(got, wanted) < (0.05 if budget == 256 else 0.25)
        top = np.sort(wanted, axis=-1)
        clear = top[..., -1] - top[..., -2] > 0.1 * np.abs(wanted).max()
        assert clear.mean() > 0.2
        assert (got.argmax(-1) == wanted.argmax(-1))[clear].all()

    def test_dense_equals_transformers(self, tiny_dir: Path, tiny_tokenizer: Any) -> None:
        profile, ids = random_profile(open_checkpoint(tiny_dir)), self.ids(tiny_tokenizer)
        plain: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.bfloat16)
        plain = plain.to("cuda").eval()
        wanted = self.logits(plain, ids)
        assert relative(self.logits(load_fasa(plain, profile, budget=4096), ids), wanted) < 0.05

    def test_generate_grows_the_cache(self, tiny_dir: Path, tiny_tokenizer: Any) -> None:
        """100 new tokens outgrow the pool twice; a row alone gives the same."""
        profile = random_profile(open_checkpoint(tiny_dir))
        model: Any = load_fasa(tiny_dir, profile, device="cuda", dtype="bfloat16", budget=4096)
        ids = self.ids(tiny_tokenizer)[:, :40].cuda()
        options: dict[str, Any] = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        both = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        model(ids)  # another cache in between
        again = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert both.shape == (2, 140)
        assert torch.equal(both, again)
