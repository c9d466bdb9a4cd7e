"""What a request may ask for, and that it reaches the runtime as it was asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.serving.request import GenerationRequest


class Recorder:
    """In the place of a service: keeps what it was asked for."""

    def __init__(self, max_seq_len: int = 64) -> None:
        self.engine = SimpleNamespace(directory=SimpleNamespace(max_seq_len=max_seq_len))
        self.asked: dict[str, Any] = {}

    def submit(self, prompt: Any, **options: Any) -> str:
        self.asked = {"prompt": prompt, **options}
        return "stream"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": "a\ud800"}, "the prompt is not valid Unicode"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"temperature": 2.5}, "temperature must be between 0 and 2, not 2.5"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": float("nan")}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be between"),
        ({"top_k": 2**63}, "top_k must be between"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1"),
        ({"seed": -1}, "seed must be between"),
        ({"stop": [""]}, "a stop string must have 1 to 256 characters, not 0"),
        ({"stop": ["x" * 257]}, "a stop string must have 1 to 256 characters, not 257"),
        ({"stop": ["a"] * 17}, "17 stop strings are too many"),
        ({"stop": ["\udfff"]}, "a stop string is not valid Unicode"),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FasaError, match=message):
        GenerationRequest(**{"prompt": "a", **options})


def test_edges_are_in_range() -> None:
    GenerationRequest("a", max_tokens=1, temperature=2.0, top_k=2**63 - 1, top_p=1.0, min_p=1.0, seed=2**63 - 1)
    GenerationRequest([0], temperature=0, top_p=1e-9, stop=["x" * 256] * 16, seed=0)


def test_one_stop_string_is_not_its_characters() -> None:
    with pytest.raises(TypeError, match="a sequence of strings"):
        GenerationRequest("a", stop="end")


def test_submit_passes_everything_on() -> None:
    service, heard = Recorder(), list[Any]()
    request = GenerationRequest([1, 2], 9, 0.5, 3, 0.9, 0.1, ("x",), 7, ignore_eos=True)
    assert request.submit(service, heard.append) == "stream"  # type: ignore[arg-type, comparison-overlap]
    generator = service.asked.pop("generator")
    assert service.asked == {
        "prompt": [1, 2],
        "max_new_tokens": 9,
        "sampling": Sampling(0.5, 3, 0.9, 0.1, 7),
        "stop": ("x",),
        "ignore_eos": True,
        "listener": heard.append,
    }
    assert generator.random() == Sampling(seed=7).generators(1)[0].random()


def test_max_tokens_beyond_the_engine_are_what_the_engine_holds() -> None:
    service = Recorder(max_seq_len=64)
    GenerationRequest("a", 2**62).submit(service)  # type: ignore[arg-type]
    assert service.asked["max_new_tokens"] == 64


def test_choices_draw_like_the_rows_of_a_batch() -> None:
    service, draws = Recorder(), []
    for choice in range(3):
        GenerationRequest("a", seed=5, choice=choice).submit(service)  # type: ignore[arg-type]
        draws.append(service.asked["generator"].random())
    assert draws == [generator.random() for generator in Sampling(seed=5).generators(3)]
    assert len(set(draws)) == 3
