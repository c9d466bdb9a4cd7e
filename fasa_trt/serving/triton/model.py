"""The `fasa` model for Triton's python backend: one engine, all requests in its in-flight batch.

Triton calls `execute` with requests as they come; it hands them to the runtime's `Service` and returns at once. One
thread of the model's own sends what comes of them through their response senders, and asks for cancelled ones. It needs
Triton's python process to import it: `triton_python_backend_utils` is nowhere else.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.generate import load
from fasa_trt.runtime.service import Item, Service
from fasa_trt.serving.triton.answer import Answer
from fasa_trt.serving.triton.metrics import Metrics
from fasa_trt.serving.triton.requests import INPUTS, generation_request

CANCELLATION_PERIOD = 0.1  # seconds between questions to the server, as in TensorRT-LLM's backend


class TritonPythonModel:
    """Called by Triton, from one thread."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the engine. What it raises, Triton reports as the reason why the model is not available."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        if args["model_instance_kind"] == "GPU":  # before anything in this process asks CUDA
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        version = Path(args["model_repository"]) / args["model_version"]
        threads, kv_fraction = parameters.get("threads"), parameters.get("kv_fraction")
        engine = load(
            version / parameters["engine_dir"],
            threads=None if threads is None else int(threads),
            kv_fraction=None if kv_fraction is None else float(kv_fraction),
        )
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._max_requests = int(parameters["max_requests"])
        self._max_seq_len = engine.directory.max_seq_len
        self._metrics = Metrics(pb_utils, {"model": args["model_name"], "instance": args["model_instance_name"]})
        self._answers: set[Answer] = set()  # not over; the sending thread's, but for additions
        self._items: queue.SimpleQueue[tuple[Answer, Item] | None] = queue.SimpleQueue()
        self._service = Service(engine)
        self._sending = threading.Thread(target=self._send, name="fasa responses")
        self._sending.start()

    def execute(self, requests: list[Any]) -> None:
        """Returns before the answers are there, so that later requests join them."""
        for request in requests:
            answer = Answer(pb_utils, request)
            try:
                self._start(answer, request)
            except FasaError as error:
                self._refuse(answer, str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception as error:  # a mistake in the code: this request's alone
                self._refuse(answer, f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

    def finalize(self) -> None:
        """Triton asks for it when no request is left."""
        self._service.close()
        self._items.put(None)
        self._sending.join()

    def _start(self, answer: Answer, request: Any) -> None:
        broken = self._service.error
        if broken is not None or len(self._answers) >= self._max_requests:
            reason = broken or f"{self._max_requests} requests are waiting or running already (try again later)"
            self._refuse(answer, str(reason), pb_utils.TritonError.UNAVAILABLE)
            return
        tensors = {each.name: pb_utils.get_input_tensor_by_name(request, each.name) for each in INPUTS}
        wanted = generation_request(
            {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}, self._max_seq_len
        )
        if wanted.stream and not self._decoupled:
            raise FasaError("this model does not stream", hint="make its repository without --no-streaming")
        answer.streams = wanted.stream
        answer.stream = wanted.submit(self._service, lambda item: self._items.put((answer, item)))
        self._answers.add(answer)
        self._metrics.running(self._answers)
        answer.started.set()

    def _refuse(self, answer: Answer, reason: str, code: int) -> None:
        self._metrics.ended("refused")
        answer.fail(reason, code)

    def _send(self) -> None:
        due = time.monotonic() + CANCELLATION_PERIOD
        while True:
            try:
                entry = self._items.get(timeout=max(0.0, due - time.monotonic()))
                if entry is None:
                    return
                self._pass_on(*entry)
            except queue.Empty:
                pass
            if time.monotonic() >= due:
                for answer in list(self._answers):
                    answer.cancel_if_asked()
                due = time.monotonic() + CANCELLATION_PERIOD

    def _pass_on(self, answer: Answer, item: Item) -> None:
        answer.started.wait()  # the first item may be faster than `submit` returns
        outcome = answer.outcome(item)
        if outcome is not None:  # counted first: whoever has the answer finds it in the metrics
            self._answers.discard(answer)
            self._metrics.ended(outcome, answer.prompt_tokens, answer.generated_tokens)
            self._metrics.running(self._answers)
        try:
            answer.send(item)
        except Exception as error:  # the server does not take this one's responses
            pb_utils.Logger.log_error(f"fasa: cannot send a response: {error}")
            assert answer.stream is not None
            answer.stream.cancel()
