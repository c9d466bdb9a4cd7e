"""Plays TensorRT-LLM's backend in its repository: the same tensors and rules, with an onnxruntime engine inside.

As model_instance_state.cc of the backend has it: answers with output_ids [1, beams, n] and sequence_length [1, beams],
each with new tokens alone when streaming; a request with `stop` ends the one with the same id.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from fasa_trt.runtime.generate import load
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.runtime.service import Service


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        directory = json.loads(args["model_config"])["parameters"]["gpt_model_path"]["string_value"]
        engine = load((Path(directory) / "played.txt").read_text(), threads=1, provider="cpu")
        engine.eos = frozenset()
        self._service = Service(engine)
        self._streams: dict[str, Any] = {}

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            sender = request.get_response_sender()
            if given.get("stop", np.zeros(1, bool)).any():
                if stream := self._streams.get(request.request_id()):
                    stream.cancel()
                sender.send(pb_utils.InferenceResponse([]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            threading.Thread(target=self._answer, args=(request.request_id(), given, sender)).start()

    def _answer(self, number: str, given: dict[str, Any], sender: Any) -> None:
        last = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        prompt = given["input_ids"][0, : given["input_lengths"].reshape(-1)[0]]
        temperature = float(given.get("temperature", np.zeros(1)).reshape(-1)[0])
        try:
            stream = self._service.submit(
                prompt,
                max_new_tokens=int(given["request_output_len"].reshape(-1)[0]),
                sampling=Sampling(temperature, seed=int(given["seed"].reshape(-1)[0]) if "seed" in given else None),
            )
        except Exception as error:
            sender.send(pb_utils.InferenceResponse([], pb_utils.TritonError(str(error))), flags=last)
            return
        self._streams[number] = stream
        ends = {int(given["end_id"].reshape(-1)[0])} | one_token_words(given["stop_words_list"][0])
        sent, streaming = 0, bool(given.get("streaming", np.zeros(1)).any())
        for _ in stream:
            tokens = list(stream.answer.completion.tokens)
            if ends & set(tokens):
                stream.cancel()
                break
            if streaming:
                sender.send(response(tokens[sent:]))
                sent = len(tokens)
        tokens = stream.result().tokens
        end = min((tokens.index(token) for token in ends if token in tokens), default=len(tokens))
        sender.send(response(tokens[sent:end]), flags=last)

    def finalize(self) -> None:
        self._service.close()


def one_token_words(words: Any) -> set[int]:
    """Of a list [2, n]: tokens above, ends below."""
    ends = [int(end) for end in words[1] if end >= 0]
    assert all(end - start == 1 for start, end in zip([0, *ends], ends, strict=False)), "not one token"
    return {int(token) for token in words[0][: ends[-1] if ends else 0]}


def response(tokens: list[int]) -> Any:
    ids, length = np.array([[tokens]], np.int32), np.array([[len(tokens)]], np.int32)
    return pb_utils.InferenceResponse([pb_utils.Tensor("output_ids", ids), pb_utils.Tensor("sequence_length", length)])
