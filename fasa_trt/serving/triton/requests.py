"""A Triton request's tensors, read and checked: the fields of `TENSORS`, in, and `GenerationRequest`, out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.errors import FasaError
from fasa_trt.serving.request import GenerationRequest
from fasa_trt.serving.triton.model_config import DataType, Input, Output

# Names as in TensorRT-LLM's ensemble where it has the field (`random_seed` as in its older releases and in vLLM's).
PROMPT = (Input("text_input", DataType.STRING, optional=True), Input("input_ids", DataType.INT32, (-1,), optional=True))
SCALARS = (
    Input("max_tokens", DataType.INT32, optional=True),
    Input("temperature", DataType.FP32, optional=True),
    Input("top_k", DataType.INT32, optional=True),
    Input("top_p", DataType.FP32, optional=True),
    Input("min_p", DataType.FP32, optional=True),
    Input("random_seed", DataType.UINT64, optional=True),
    Input("ignore_eos", DataType.BOOL, optional=True),
    Input("stream", DataType.BOOL, optional=True),
)
STOP = Input("stop_words", DataType.STRING, (-1,), optional=True)
INPUTS = (*PROMPT, *SCALARS, STOP)
OUTPUTS = (
    Output("text_output", DataType.STRING),
    Output("output_ids", DataType.INT32, (-1,)),
    Output("finish_reason", DataType.STRING),
    Output("num_input_tokens", DataType.INT32),
    Output("num_output_tokens", DataType.INT32),
)

OPTION = {"random_seed": "seed"}  # where GenerationRequest has another name
MAX_CHARACTERS_PER_TOKEN = 256  # no vocabulary has longer tokens, but for runs of blanks in some


def generation_request(tensors: Mapping[str, NDArray[Any]], max_seq_len: int) -> GenerationRequest:
    """tensors: the inputs that the client gave, shaped as in `INPUTS`; strings are bytes.

    Raises FasaError when a value is out of range, there is no prompt or two, or the text can never fit `max_seq_len`
    tokens; the latter before the tokenizer works on it.
    """
    given = [each.name for each in PROMPT if each.name in tensors]
    if len(given) != 1:
        raise FasaError("a request has both text_input and input_ids" if given else "the request has no prompt",
                        hint="pass one of text_input and input_ids")  # fmt: skip
    prompt: str | list[int]
    if given == ["text_input"]:
        prompt = _text("text_input", tensors["text_input"].reshape(-1)[0])
        if len(prompt) > max_seq_len * MAX_CHARACTERS_PER_TOKEN:
            raise FasaError(f"text_input has {len(prompt)} characters, far beyond this engine's {max_seq_len} tokens")
    else:
        prompt = [int(token) for token in tensors["input_ids"].reshape(-1)]
    options: dict[str, Any] = {
        OPTION.get(each.name, each.name): tensors[each.name].reshape(-1)[0].item()
        for each in SCALARS
        if each.name in tensors
    }
    stop = tensors.get(STOP.name, np.zeros(0, object)).reshape(-1)
    return GenerationRequest(prompt, stop=[_text("stop_words", word) for word in stop if word], **options)


def _text(name: str, value: bytes | str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise FasaError(f"{name} is not UTF-8 text") from None
