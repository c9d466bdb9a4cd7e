"""Chat by the openai package, in a chat template; and models that have none."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from fasa_trt.runtime.generate import Engine
from fasa_trt.runtime.sampling import Sampling
from tests.serving.openai.conftest import MAX_SEQ_LEN, MODEL, Running

MESSAGES: list[Any] = [
    {"role": "system", "content": "Write Python."},
    {"role": "user", "content": [{"type": "text", "text": "The largest "}, {"type": "text", "text": "of a list."}]},
]
TEXT = "# system: Write Python.\n# user: The largest of a list.\ndef "


def test_answer(chat_server: Running, alone: Engine) -> None:
    answer = chat_server.client().chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=20, temperature=0
    )
    (expected,) = alone.generate(TEXT, max_new_tokens=20)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length" and answer.object == "chat.completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, 20)


def test_streaming(chat_server: Running, alone: Engine) -> None:
    stream = chat_server.client().chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, temperature=1, n=2, seed=4, stream=True
    )
    texts, roles, reasons = ["", ""], list[Any](), list[Any]()
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.append(choice.delta.role)
            reasons.append(choice.finish_reason)
    expected = alone.generate([TEXT, TEXT], max_new_tokens=20, sampling=Sampling(1.0, seed=4))
    assert texts == [row.text for row in expected]
    assert roles[:2] == ["assistant"] * 2 and not any(roles[2:]), "once for each answer, before any text"
    assert [reason for reason in reasons if reason] == ["length"] * 2


def test_a_conversation_goes_on(chat_server: Running, alone: Engine) -> None:
    client = chat_server.client()
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0)
    told = first.choices[0].message
    more: list[Any] = [*MESSAGES, told, {"role": "user", "content": "And?", "name": "me"}]
    second = client.chat.completions.create(model=MODEL, messages=more, max_tokens=8, temperature=0)
    text = TEXT.removesuffix("def ") + f"# assistant: {told.content}\n# user me: And?\ndef "
    assert second.choices[0].message.content == alone.generate(text, max_new_tokens=8)[0].text


def test_without_a_limit_the_answer_may_fill_the_engine(chat_server: Running) -> None:
    answer = chat_server.client().chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.total_tokens == MAX_SEQ_LEN


def test_model_without_chat_template(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template .use /v1/completions"):
        server.client().chat.completions.create(model=MODEL, messages=MESSAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages: Input should be 'system'"),
        (
            {"messages": [{"role": "developer", "content": "a"}]},
            "the model's chat template refuses these messages: no d",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages: Input should be",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens and max_completion_tokens differ"),
        ({"max_completion_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_bad_requests(chat_server: Running, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat_server.client().chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **options})
