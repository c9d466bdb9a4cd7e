"""Fixtures that many tests share: the sample model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

# pytest runs in several processes; torch's own threads would wait for each other in all of them.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """The sample model's checkpoint folder."""
    return ROOT / "examples" / "models" / "fasa-tiny"


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_dir)
