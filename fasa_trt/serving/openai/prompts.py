"""From HTTP requests to requests for the runtime. Runs in the tokenizer's thread."""

from __future__ import annotations

from typing import Any

from fasa_trt.core.errors import FasaError
from fasa_trt.serving.openai.schemas import ChatRequest, CompletionRequest, Message, Options
from fasa_trt.serving.request import GenerationRequest


def of_completion(body: CompletionRequest) -> list[GenerationRequest]:
    """All answers to the first prompt, then all to the second. Raises FasaError for values out of range."""
    return _answers(body, body.prompts, body.max_tokens)


def of_chat(body: ChatRequest, tokenizer: Any, max_seq_len: int) -> list[GenerationRequest]:
    """Raises FasaError for a model without chat template, and messages that the template refuses."""
    given = [limit for limit in (body.max_completion_tokens, body.max_tokens) if limit is not None]
    return _answers(body, [chat_tokens(tokenizer, body.messages)], given[0] if given else max_seq_len)


def chat_tokens(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to where the assistant's turn begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise FasaError("this model has no chat template", hint="use /v1/completions")
    turns = [
        {"role": message.role, "content": message.text, **({} if message.name is None else {"name": message.name})}
        for message in messages
    ]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # the template's own refusals, and its mistakes with what it did not expect
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FasaError(f"the model's chat template refuses these messages: {reason}") from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _answers(body: Options, prompts: list[Any], max_tokens: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt,
            max_tokens,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            stop=body.stop_strings,
            seed=body.seed,
            ignore_eos=body.ignore_eos,
            stream=body.stream,
            choice=number * body.n + choice,
        )
        for number, prompt in enumerate(prompts)
        for choice in range(body.n)
    ]
