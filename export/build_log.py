"""What TensorRT says while it builds: messages collected, nested phases turned into one percentage."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Progress = Callable[[int, int], None]  # done, in all
NOISE = "has Int64 binding"  # TensorRT warns so of every int64 input


def new_log(trt: Any) -> Any:
    """An ILogger that prints nothing and keeps `errors` and `warnings`, lists of str."""

    class Log(trt.ILogger):  # a base class that exists only once TensorRT is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and NOISE not in message:
                self.warnings.append(message)

    return Log()


@dataclass
class Phase:
    """A phase under way; it is one step of the phase named `parent`."""

    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """Adds up nested phases into a percentage, which never goes back.

    TensorRT may start and end phases in several threads. It is silent in some long ones, so the figure may rest.
    """

    def __init__(self, report: Progress | None) -> None:
        self._report = report
        self._phases: dict[str, Phase] = {}
        self._percent = -1
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = Phase(parent, max(1, steps))

    def step(self, name: str, step: int) -> None:
        """Step `step`, counted from 0, of phase `name` is done."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is None:
                return
            phase.done = step + 1
            share = 0.0
            while phase is not None:
                share = min(1.0, (phase.done + share) / phase.steps)
                phase = None if phase.parent is None else self._phases.get(phase.parent)
            self._tell(int(100 * share))

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None:
                self._tell(100)

    def _tell(self, percent: int) -> None:
        if percent > self._percent and self._report is not None:
            self._percent = percent
            self._report(percent, 100)


def new_monitor(trt: Any, progress: BuildProgress) -> Any:
    """An IProgressMonitor that feeds `progress`.

    An exception must not travel through TensorRT, which ends the process or forgets it. So one that is raised by
    `progress` asks TensorRT to stop, and `raise_interruption` raises it after that.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interruption: BaseException | None = None

        def guarded(self, call: Callable[..., None], *arguments: Any) -> None:
            try:
                call(*arguments)
            except BaseException as error:
                self.interruption = self.interruption or error

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.guarded(progress.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.guarded(progress.step, phase_name, step)
            return self.interruption is None

        def phase_finish(self, phase_name: str) -> None:
            self.guarded(progress.finish, phase_name)

        def raise_interruption(self) -> None:
            if self.interruption is not None:
                raise self.interruption

    return Monitor()


@contextlib.contextmanager
def interruptible(monitor: Any) -> Iterator[None]:
    """Lets Ctrl-C stop the build that runs inside, at TensorRT's next step; a second one ends the process at once.

    Python would raise KeyboardInterrupt in whatever callback TensorRT happens to call, and TensorRT would swallow it.
    """
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
        yield
        return

    def stop(*_: object) -> None:
        monitor.interruption = KeyboardInterrupt()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)
