"""Text completions by the openai package: texts, streams, stops, seeds, several answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from fasa_trt.runtime.generate import Completion, Engine
from fasa_trt.runtime.sampling import Sampling
from tests.serving.openai.conftest import MAX_SEQ_LEN, MODEL, Running

PROMPT = "def largest(values):\n    "


def generated(engine: Engine, prompt: str, count: int, **options: Any) -> Completion:
    return engine.generate(prompt, max_new_tokens=count, **options)[0]


def test_greedy_text_and_counts(server: Running, alone: Engine) -> None:
    answer = server.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
    expected = generated(alone, PROMPT, 24)
    (choice,) = answer.choices
    assert (choice.text, choice.index, choice.finish_reason) == (expected.text, 0, "length")
    assert answer.usage is not None and answer.object == "text_completion" and answer.model == MODEL
    assert answer.usage.completion_tokens == len(expected.tokens) == 24
    assert answer.usage.prompt_tokens == expected.prompt_tokens == len(alone.encode(PROMPT))
    assert answer.usage.total_tokens == 24 + expected.prompt_tokens


def test_token_ids_are_a_prompt(server: Running, alone: Engine) -> None:
    ids = alone.encode(PROMPT)
    answer = server.client().completions.create(model=MODEL, prompt=ids, max_tokens=12, temperature=0)
    assert answer.choices[0].text == generated(alone, PROMPT, 12).text


@pytest.mark.parametrize("seed", [0, 7])
def test_seed_draws_what_generate_draws(server: Running, alone: Engine, seed: int) -> None:
    answer = server.client().completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0.9, top_p=0.9, seed=seed, extra_body={"top_k": 40}
    )
    assert answer.choices[0].text == generated(alone, PROMPT, 24, sampling=Sampling(0.9, 40, 0.9, seed=seed)).text


def test_default_is_openai_s(server: Running, alone: Engine) -> None:
    answer = server.client().completions.create(model=MODEL, prompt=PROMPT, seed=3)
    assert answer.choices[0].text == generated(alone, PROMPT, 16, sampling=Sampling(1.0, seed=3)).text


def test_several_prompts_and_answers(server: Running, alone: Engine) -> None:
    """Every answer draws as its row in a batch of `generate` does."""
    prompts = [PROMPT, "import os"]
    answer = server.client().completions.create(model=MODEL, prompt=prompts, n=3, max_tokens=10, temperature=1, seed=2)
    rows = [prompt for prompt in prompts for _ in range(3)]
    expected = alone.generate(rows, max_new_tokens=10, sampling=Sampling(1.0, seed=2))
    assert [choice.text for choice in answer.choices] == [row.text for row in expected]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(alone.encode(prompt)) for prompt in prompts), "each counts once"
    assert answer.usage.completion_tokens == 60


def test_streaming(server: Running, alone: Engine) -> None:
    expected = generated(alone, PROMPT, 24)
    stream = server.client().completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    *texts, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == expected.text
    assert len(texts) > 12, "it comes piece by piece"
    assert [chunk.choices[0].finish_reason for chunk in texts] == [None] * (len(texts) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert usage.choices == [] and usage.usage is not None
    assert usage.usage.completion_tokens == 24 and usage.usage.prompt_tokens == expected.prompt_tokens


def test_streamed_answers_do_not_mix(server: Running, alone: Engine) -> None:
    stream = server.client().completions.create(
        model=MODEL, prompt=PROMPT, n=4, max_tokens=16, temperature=1, seed=2, stream=True
    )
    texts = [""] * 4
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    expected = alone.generate([PROMPT] * 4, max_new_tokens=16, sampling=Sampling(1.0, seed=2))
    assert texts == [row.text for row in expected]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_token_borders(server: Running, alone: Engine, stream: bool) -> None:
    """From the middle of one token to the middle of a later one; none of it is ever sent."""
    prompt = "import os"
    whole = generated(alone, prompt, 24)
    ends = [len(alone.tokenizer.decode(whole.tokens[:count])) for count in range(25)]
    long = [k for k in range(4, 23) if ends[k + 1] - ends[k] > 1]  # tokens of several characters
    stop = whole.text[ends[long[0]] + 1 : ends[long[1]] + 1]
    asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0, "stop": [stop, "\0"]}
    if stream:
        chunks = list(server.client().completions.create(**asked, stream=True))
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        (choice,) = server.client().completions.create(**asked).choices
        text, reason = choice.text, choice.finish_reason
    assert text == whole.text[: whole.text.index(stop)]
    assert reason == "stop"


def test_streamed_text_is_whole_characters(server: Running, alone: Engine) -> None:
    """Hot draws from a byte-level vocabulary give bytes of many characters, and such as are none."""
    for seed in range(6):
        stream = server.client().completions.create(
            model=MODEL, prompt="# \N{GRINNING FACE}\N{EURO SIGN}", max_tokens=60, temperature=2, seed=seed, stream=True
        )
        text = "".join(chunk.choices[0].text for chunk in stream)
        prompt = "# \N{GRINNING FACE}\N{EURO SIGN}"
        assert text == generated(alone, prompt, 60, sampling=Sampling(2.0, seed=seed)).text


def test_ignore_eos(server: Running, alone: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generated(alone, PROMPT, 24)
    ends_with = whole.tokens[9]
    monkeypatch.setattr(server.service.engine, "eos", frozenset({ends_with}))
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    ended = server.client().completions.create(**asked)
    assert ended.choices[0].finish_reason == "stop" and ended.usage is not None
    assert ended.usage.completion_tokens == whole.tokens.index(ends_with) + 1
    went_on = server.client().completions.create(**asked, extra_body={"ignore_eos": True})
    assert (went_on.choices[0].text, went_on.choices[0].finish_reason) == (whole.text, "length")


def test_answer_ends_when_the_engine_is_full(server: Running, alone: Engine) -> None:
    answer = server.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=10**6, temperature=0)
    assert answer.usage is not None and answer.usage.total_tokens == MAX_SEQ_LEN
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.slow
def test_64_clients_get_their_own_texts(server: Running, alone: Engine) -> None:
    """Eight times as many as the batch has rows, half of them streaming, half of them drawing."""
    prompts = [f"def f{number}(x, y):\n    " * (1 + number % 3) for number in range(64)]
    options = [(16 + number % 32, 0.9 * (number // 2 % 2)) for number in range(64)]
    expected = [
        generated(alone, prompt, count, sampling=Sampling(temperature, seed=number))
        for number, (prompt, (count, temperature)) in enumerate(zip(prompts, options, strict=True))
    ]

    def ask(number: int) -> str:
        count, temperature = options[number]
        with server.client() as client:
            asked: dict[str, Any] = {"model": MODEL, "prompt": prompts[number], "max_tokens": count, "seed": number}
            if number % 2:
                return client.completions.create(**asked, temperature=temperature).choices[0].text
            stream = client.completions.create(**asked, temperature=temperature, stream=True)
            return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(64) as threads:
        texts = list(threads.map(ask, range(64)))
    assert texts == [completion.text for completion in expected]
    assert server.metric("fasa_answers_in_flight") == 0


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"prompt": ""}, "the prompt is empty", None),
        ({"prompt": []}, "prompt is an empty list", "prompt"),
        ({"prompt": "x" * 4000}, "this engine holds 192", None),
        ({"prompt": [5000]}, "token ids go from 0 to 2047", None),
        ({"max_tokens": 0}, "max_tokens must be at least 1", None),
        ({"max_tokens": "3"}, "max_tokens: Input should be a valid integer", "max_tokens"),
        ({"temperature": 9}, "temperature must be between 0 and 2", None),
        ({"n": 0}, "n must be at least 1", "n"),
        ({"n": 10**6}, "1000000 answers in one request: this server takes 264 at once", "n"),
        ({"extra_body": {"logprobs": 2}}, "logprobs is not supported", "logprobs"),
        ({"echo": True}, "echo is not supported", "echo"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
        ({"extra_body": {"beam_width": 4}}, "beam_width is not supported", "beam_width"),
    ],
)
def test_bad_requests(server: Running, options: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        server.client().completions.create(**{"model": MODEL, "prompt": "a", "max_tokens": 2, **options})
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert server.http.get("/health").status_code == 200


def test_options_that_ask_for_nothing_are_fine(server: Running) -> None:
    server.client().completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=2,
        presence_penalty=0,
        frequency_penalty=0.0,
        echo=False,
        logprobs=None,
        best_of=1,
        logit_bias={},
        user="somebody",
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[[", "the body is not valid JSON"),
        ("[" * 100_000, "parsing the body"),
        ("[]", "the body must be a JSON object"),
        ('"text"', "the body must be a JSON object"),
        ("", "the body must be a JSON object"),
        ("{}", "prompt: Field required"),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
        ('{"prompt": "a", "temperature": NaN}', "temperature must be between"),
        ('{"prompt": [1, "a"]}', "prompt: Input should be"),
    ],
)
def test_bad_bodies(server: Running, body: str, message: str) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"] and "\n" not in error["message"]


def test_body_of_another_type(server: Running) -> None:
    answer = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_models(server: Running) -> None:
    client = server.client()
    (model,) = client.models.list()
    assert model.id == MODEL and model.owned_by == "fasa-trt"
    assert client.models.retrieve(MODEL) == model
    for refused in (
        lambda: client.models.retrieve("other"),
        lambda: client.completions.create(model="other", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this server has 'tiny'"):
            refused()
