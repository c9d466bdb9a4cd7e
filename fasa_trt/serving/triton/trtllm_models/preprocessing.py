"""Text in, token ids out: what comes before TensorRT-LLM in the `ensemble` and `tensorrt_llm_bls` models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from numpy.typing import NDArray
from transformers import AutoTokenizer


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Parameters: tokenizer_dir; eos_token_ids, the ids that end an answer, by commas."""
        parameters = json.loads(args["model_config"])["parameters"]
        directory = parameters["tokenizer_dir"]["string_value"]
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._eos = [int(token) for token in parameters["eos_token_ids"]["string_value"].split(",") if token]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            return pb_utils.InferenceResponse(output_tensors=self._tensors(request))
        except Exception as error:  # an error of this request must not end those beside it
            reason = f"preprocessing: {error}"
            code = pb_utils.TritonError.INVALID_ARG
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(reason, code))

    def _tensors(self, request: Any) -> list[Any]:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        rows = [self._tokens(text) for (text,) in given["QUERY"]]
        if not all(rows):
            raise ValueError("the prompt is empty (pass some text)")
        lengths = given["REQUEST_OUTPUT_LEN"].astype(np.int32)
        if lengths.min() < 1:
            raise ValueError(f"max_tokens must be at least 1, not {lengths.min()}")
        end = given.get("END_ID")
        # TensorRT-LLM knows one end token. Further ones of the model are stop words, unless the client names its own.
        more = [] if end is not None else [[token] for token in self._eos[1:]]
        ends = np.full((len(rows), 1), self._eos[0] if self._eos else -1, np.int32) if end is None else end
        pads = given.get("PAD_ID", ends)
        tensors = {
            "INPUT_ID": padded(rows, int(pads[0, 0])),
            "REQUEST_INPUT_LEN": np.array([[len(row)] for row in rows], np.int32),
            "REQUEST_OUTPUT_LEN": lengths,
            "OUT_END_ID": ends,
            "OUT_PAD_ID": pads,
            "STOP_WORDS_IDS": self._words(given.get("STOP_WORDS_DICT"), len(rows), more),
            "BAD_WORDS_IDS": self._words(given.get("BAD_WORDS_DICT"), len(rows), []),
        }
        return [pb_utils.Tensor(name, value.astype(np.int32)) for name, value in tensors.items()]

    def _tokens(self, text: bytes) -> list[int]:
        return list(self._tokenizer(text.decode("utf-8")).input_ids) if text else []

    def _words(self, given: NDArray[Any] | None, rows: int, more: list[list[int]]) -> NDArray[np.int32]:
        """Word lists as TensorRT-LLM takes them, [rows, 2, n]."""
        texts = [[]] * rows if given is None else [[word.decode("utf-8") for word in row if word] for row in given]
        tokens = [[self._tokenizer(text, add_special_tokens=False).input_ids for text in row] for row in texts]
        return word_list([[*row, *more] for row in tokens])


def padded(rows: list[list[int]], pad: int) -> NDArray[np.int32]:
    width = max(len(row) for row in rows)
    return np.array([[*row, *[pad] * (width - len(row))] for row in rows], np.int32)


def word_list(rows: list[list[list[int]]]) -> NDArray[np.int32]:
    """[rows, 2, n]: the words' tokens one after the other, padded with 0; below, where each word ends, padded with -1.
    Without any word n is 1. From tensorrt_llm's `to_word_list_format` (tensorrt_llm/runtime/generation.py)."""
    flat = [[token for word in row for token in word] for row in rows]
    ends = [list(np.cumsum([len(word) for word in row], dtype=int)) for row in rows]
    width = max(1, *map(len, flat))
    fill = lambda values, pad: [*values, *[pad] * (width - len(values))]  # noqa: E731
    return np.array([[fill(row, 0), fill(end, -1)] for row, end in zip(flat, ends, strict=True)], np.int32)
