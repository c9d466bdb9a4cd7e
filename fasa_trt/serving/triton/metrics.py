"""What the `fasa` model adds to Triton's own metrics, on Triton's metrics port; named as in `serving/openai`."""

from __future__ import annotations

import threading
from collections.abc import Sized
from typing import Any

OUTCOMES = ("eos", "stop", "length", "cancelled", "error", "refused")


class Metrics:
    """Counters of one instance of the model; without effect where the server has metrics switched off.

    pb_utils: Triton's `triton_python_backend_utils`. labels: of every metric, which tell instances apart.

    Triton's metrics are not for several threads: they release the GIL and change their shared memory without a lock
    (`Metric::SendIncrementRequest` in python_backend's src/metric.cc), which brought the whole server down.
    """

    def __init__(self, pb_utils: Any, labels: dict[str, str]) -> None:
        self._families: list[Any] = []  # must outlive their metrics
        self._utils = pb_utils
        self._lock = threading.Lock()
        try:
            answers = self._family("fasa_answers_total", "Answers by how they ended.", counter=True)
            prompt = self._family("fasa_prompt_tokens_total", "Tokens of prompts.", counter=True)
            generated = self._family("fasa_generated_tokens_total", "Tokens of answers.", counter=True)
            running = self._family("fasa_answers_in_flight", "Answers being made or waiting.")
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_warn(f"fasa: no metrics of the model's own: {error}")
            self._running = None
            return
        self._ended = {name: answers.Metric(labels={**labels, "finish_reason": name}) for name in OUTCOMES}
        self._prompt, self._generated, self._running = (f.Metric(labels=labels) for f in (prompt, generated, running))

    def ended(self, outcome: str, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        if self._running is not None:
            with self._lock:
                self._ended[outcome].increment(1)
                self._prompt.increment(prompt_tokens)
                self._generated.increment(generated_tokens)

    def running(self, requests: Sized) -> None:
        """requests: counted with the lock held, so that the last thread to report has the last word."""
        if self._running is not None:
            with self._lock:
                self._running.set(len(requests))

    def _family(self, name: str, description: str, *, counter: bool = False) -> Any:
        kinds = self._utils.MetricFamily
        kind = kinds.COUNTER if counter else kinds.GAUGE
        family = self._utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)
        return family
