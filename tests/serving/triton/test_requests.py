"""Tensors of a request: what becomes of them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fasa_trt.core.errors import FasaError
from fasa_trt.serving.request import GenerationRequest
from fasa_trt.serving.triton.requests import MAX_CHARACTERS_PER_TOKEN, generation_request


def text(*values: bytes) -> NDArray[Any]:
    return np.array(values, object)


def test_defaults() -> None:
    assert generation_request({"text_input": text(b"hello")}, 64) == GenerationRequest("hello", stop=[])
    tokens = generation_request({"input_ids": np.array([3, 4], np.int32)}, 64)
    assert tokens == GenerationRequest([3, 4], stop=[])


def test_every_field() -> None:
    found = generation_request(
        {
            "text_input": text("é".encode()),
            "max_tokens": np.array([7], np.int32),
            "temperature": np.array([0.5], np.float32),
            "top_k": np.array([4], np.int32),
            "top_p": np.array([0.25], np.float32),
            "min_p": np.array([0.125], np.float32),
            "random_seed": np.array([9], np.uint64),
            "ignore_eos": np.array([True]),
            "stream": np.array([True]),
            "stop_words": text(b"a", b"", b"b"),
        },
        64,
    )
    assert found == GenerationRequest("é", 7, 0.5, 4, 0.25, 0.125, ["a", "b"], 9, ignore_eos=True, stream=True)
    assert isinstance(found.max_tokens, int) and isinstance(found.seed, int)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "no prompt"),
        ({"text_input": text(b"a"), "input_ids": np.array([1])}, "both text_input and input_ids"),
        ({"text_input": text(b"\xff")}, "text_input is not UTF-8"),
        ({"text_input": text(b"a"), "stop_words": text(b"\xff")}, "stop_words is not UTF-8"),
        ({"text_input": text(b"a" * (64 * MAX_CHARACTERS_PER_TOKEN + 1))}, "far beyond this engine's 64 tokens"),
        ({"input_ids": np.zeros(0, np.int32)}, "the prompt is empty"),
        ({"text_input": text(b"a"), "random_seed": np.array([2**64 - 1], np.uint64)}, "seed must be between"),
        ({"text_input": text(b"a"), "temperature": np.array([np.nan], np.float32)}, "temperature must be between"),
    ],
)
def test_refused(tensors: dict[str, NDArray[Any]], reason: str) -> None:
    with pytest.raises(FasaError, match=reason):
        generation_request(tensors, 64)
