"""Token ids in, text out: what comes after TensorRT-LLM in the `ensemble` and `tensorrt_llm_bls` models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from transformers import AutoTokenizer


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Parameters: tokenizer_dir; skip_special_tokens, true or false."""
        parameters = json.loads(args["model_config"])["parameters"]
        directory = parameters["tokenizer_dir"]["string_value"]
        self._skip = parameters["skip_special_tokens"]["string_value"] == "true"
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)

    def execute(self, requests: list[Any]) -> list[Any]:
        """TOKENS_BATCH [rows, beams, n], of which the first SEQUENCE_LENGTH [rows, beams] are text."""
        responses = []
        for request in requests:
            tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
            lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
            texts = [
                [self._text(beam[:length]).encode("utf-8") for beam, length in zip(row, ends, strict=True)]
                for row, ends in zip(tokens, lengths, strict=True)
            ]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", np.array(texts, object))]))
        return responses

    def _text(self, tokens: Any) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip))
