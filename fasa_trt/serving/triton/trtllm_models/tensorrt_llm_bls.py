"""`tensorrt_llm_bls`: the ensemble as a program, for streams of text.

The ensemble decodes every response's tokens by themselves, which breaks characters that span tokens. This model decodes
all tokens so far and sends what is new and certain; it cuts the text at stop strings, wherever tokens end, and cancels
the engine's work then, or when the client has gone.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from numpy.typing import NDArray

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder prints for the first bytes of a longer character
RENAMED = {"top_k": "runtime_top_k", "top_p": "runtime_top_p", "stream": "streaming"}
PREPARED = {
    "INPUT_ID": "input_ids",
    "REQUEST_INPUT_LEN": "input_lengths",
    "REQUEST_OUTPUT_LEN": "request_output_len",
    "OUT_END_ID": "end_id",
    "OUT_PAD_ID": "pad_id",
    "STOP_WORDS_IDS": "stop_words_list",
    "BAD_WORDS_IDS": "bad_words_list",
}
PROMPT = {
    "text_input": "QUERY",
    "max_tokens": "REQUEST_OUTPUT_LEN",
    "bad_words": "BAD_WORDS_DICT",
    "end_id": "END_ID",
    "pad_id": "PAD_ID",
}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Parameter: tensorrt_llm_model_name."""
        config = json.loads(args["model_config"])
        self._engine = config["parameters"]["tensorrt_llm_model_name"]["string_value"]
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            last = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            try:
                streams = bool(one(tensors_of(request), "stream", False))
                if streams and not self._decoupled:
                    raise ValueError("this model does not stream (make its repository without --no-streaming)")
                whole = ""
                for text in self._pieces(request, sender):
                    if streams:
                        sender.send(text_response(text))
                    whole += text
                if streams:
                    sender.send(flags=last)
                else:
                    sender.send(text_response(whole), flags=last)
            except Exception as error:  # of this request alone
                failure = pb_utils.TritonError(f"tensorrt_llm_bls: {error}", pb_utils.TritonError.INTERNAL)
                sender.send(pb_utils.InferenceResponse(output_tensors=[], error=failure), flags=last)

    def _pieces(self, request: Any, sender: Any) -> Iterator[str]:
        """Text as it becomes certain."""
        given = tensors_of(request)
        if len(given["text_input"]) != 1:
            raise ValueError("a request is one prompt: send several requests, they are batched")
        stops = [word.decode("utf-8") for word in given.get("stop_words", np.zeros((1, 0)))[0] if word]
        prepared = self._call("preprocessing", {PROMPT[n]: value for n, value in given.items() if n in PROMPT})
        options = {
            RENAMED.get(name, name): value for name, value in given.items() if name not in (*PROMPT, "stop_words")
        }
        inputs = {**{PREPARED[name]: value for name, value in prepared.items() if name in PREPARED}, **options}
        inputs["exclude_input_in_output"] = np.ones((1, 1), bool)
        number, tokens, sent = str(uuid.uuid4()), np.zeros(0, np.int32), ""
        for outputs in self._generate(inputs, number):
            tokens = np.concatenate([tokens, outputs["output_ids"][0, 0, : outputs["sequence_length"][0, 0]]])
            text = self._text(tokens)
            cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
            stopped = cut is not None
            certain = text[:cut] if stopped else text[: len(text) - uncertain(text, stops)]
            if len(certain) > len(sent):
                yield certain[len(sent) :]
                sent = certain
            if stopped or sender.is_cancelled():
                self._stop(inputs, number)
                return
        yield self._text(tokens)[len(sent) :]

    def _generate(self, inputs: dict[str, NDArray[Any]], number: str) -> Iterator[dict[str, NDArray[Any]]]:
        names = ["output_ids", "sequence_length"]
        request = self._request(self._engine, inputs, number, names)
        responses = request.exec(decoupled=True) if self._decoupled else [request.exec()]
        for response in responses:
            check(response)
            if response.output_tensors():
                yield {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def _stop(self, inputs: dict[str, NDArray[Any]], number: str) -> None:
        """Ends the engine's request of that number; without streaming it has ended already."""
        if self._decoupled:
            stop = self._request(self._engine, {**inputs, "stop": np.ones((1, 1), bool)}, number, ["output_ids"])
            for response in stop.exec(decoupled=True):
                check(response)

    def _text(self, tokens: NDArray[np.int32]) -> str:
        lengths = np.array([[len(tokens)]], np.int32)
        found = self._call("postprocessing", {"TOKENS_BATCH": tokens[None, None], "SEQUENCE_LENGTH": lengths})
        text: bytes = found["OUTPUT"].reshape(-1)[0]
        return text.decode("utf-8")

    def _call(self, model: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        response = self._request(model, inputs, "", list(PREPARED) if model == "preprocessing" else ["OUTPUT"]).exec()
        check(response)
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def _request(self, model: str, inputs: dict[str, NDArray[Any]], number: str, outputs: list[str]) -> Any:
        tensors = [pb_utils.Tensor(name, value) for name, value in inputs.items()]
        return pb_utils.InferenceRequest(
            model_name=model, inputs=tensors, requested_output_names=outputs, request_id=number
        )


def tensors_of(request: Any) -> dict[str, NDArray[Any]]:
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def one(tensors: dict[str, NDArray[Any]], name: str, default: Any) -> Any:
    return tensors[name].reshape(-1)[0] if name in tensors else default


def check(response: Any) -> None:
    if response.has_error():
        raise ValueError(response.error().message())


def uncertain(text: str, stops: list[str]) -> int:
    """How many last characters may change yet, or begin a stop string."""
    open_bytes = len(text) - len(text.rstrip(INCOMPLETE))
    ends = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return max(open_bytes, *ends, 0)


def text_response(text: str) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([[text.encode("utf-8")]], object))])
