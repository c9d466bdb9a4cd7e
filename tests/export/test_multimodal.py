"""The text part of a multimodal checkpoint exports like a text-only one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from fasa_trt.core.spec import SparseSpec
from tests.engines import backend_of, prefill, relative
from tests.models import BASE, VARIANTS


def test_text_part_of_gemma3(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        # transformers does not apply this cap in the multimodal class, and no published checkpoint has it
        text_config={**BASE, **VARIANTS["gemma3"][1], "final_logit_softcapping": None},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    _, _, backend = backend_of(
        tmp_path / "checkpoint", tmp_path, SparseSpec(budget=16, n_tip=4, sink=2, recent=4, dense_layers=())
    )
    tokens = np.random.default_rng(0).integers(2, 97, (1, 40))
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    assert relative(prefill(backend, tokens), wanted) < 2e-4
