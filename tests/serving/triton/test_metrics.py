"""The model's metrics are changed by one thread at a time: Triton's own take no lock."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from fasa_trt.serving.triton.metrics import OUTCOMES, Metrics

LABELS = {"model": "fasa", "instance": "fasa_0_0"}


class Metric:
    """One that, like Triton's, lets other threads run while it changes, and loses what they add."""

    busy = threading.Lock()
    overlapped = False

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels, self.value = labels, 0.0

    def increment(self, value: float) -> None:
        self.set(self.value + value)

    def set(self, value: float) -> None:
        alone = Metric.busy.acquire(blocking=False)
        Metric.overlapped |= not alone
        time.sleep(1e-4)
        self.value = value
        if alone:
            Metric.busy.release()


class MetricFamily:
    COUNTER, GAUGE = 0, 1

    def __init__(self, name: str, description: str, kind: int) -> None:
        self.name, self.made = name, list[Metric]()

    def Metric(self, labels: dict[str, str]) -> Metric:
        self.made.append(Metric(labels))
        return self.made[-1]


def test_threads_take_turns() -> None:
    metrics = Metrics(SimpleNamespace(MetricFamily=MetricFamily, TritonModelException=RuntimeError), LABELS)
    with ThreadPoolExecutor(8) as pool:
        busy: list[int] = []
        for row in range(200):
            pool.submit(metrics.ended, OUTCOMES[row % len(OUTCOMES)], 3, 2)
            busy.append(row)
            pool.submit(metrics.running, busy)
    found: dict[str, Any] = {family.name: sum(metric.value for metric in family.made) for family in metrics._families}
    assert not Metric.overlapped
    assert found["fasa_answers_in_flight"] == 200
    assert found["fasa_answers_total"] == 200
    assert (found["fasa_prompt_tokens_total"], found["fasa_generated_tokens_total"]) == (600, 400)


def test_without_metrics_nothing_is_counted() -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("metrics are off")

    said: list[str] = []
    family = type("Family", (), {"COUNTER": 0, "GAUGE": 1, "__new__": lambda cls, **given: refuse(**given)})
    logger = SimpleNamespace(log_warn=said.append)
    metrics = Metrics(SimpleNamespace(MetricFamily=family, TritonModelException=RuntimeError, Logger=logger), LABELS)
    metrics.ended("eos", 1, 1)
    metrics.running([1])
    assert said == ["fasa: no metrics of the model's own: metrics are off"]
