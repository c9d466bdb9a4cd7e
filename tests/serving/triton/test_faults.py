"""A tritonserver whose model dies, is unloaded, or is started again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fasa_trt.runtime.generate import Engine
from tests.serving.triton.live import EXPLICIT, Triton, needs_server, serving, wait_until
from tests.serving.triton.test_serving import PROMPT

pytestmark = [needs_server, pytest.mark.slow]


def test_unload_and_load(triton: Triton, engine: Engine) -> None:
    import tritonclient.http as client

    (alone,) = engine.generate(PROMPT, max_new_tokens=6)
    with client.InferenceServerClient(triton.http) as http:
        http.unload_model("fasa")
        wait_until(lambda: not http.is_model_ready("fasa"), 20, triton)
        status, said = triton.refused(text_input=PROMPT)
        assert 400 <= status < 500 and "fasa" in said
        wait_until(lambda: not triton.stubs(), 20, triton)
        http.load_model("fasa")
        assert http.is_model_ready("fasa")
    assert triton.generate(text_input=PROMPT, max_tokens=6)["text_output"] == alone.text


def test_killed_model_is_reported_and_comes_back_when_loaded_again(triton: Triton, engine: Engine) -> None:
    """Killed while idle: a process that dies in a stream can take the server with it (docs/serving.md)."""
    import tritonclient.http as client

    (alone,) = engine.generate(PROMPT, max_new_tokens=6)
    (stub,) = triton.stubs()
    os.kill(stub, signal.SIGKILL)
    status, said = triton.refused(text_input=PROMPT)
    assert status >= 400 and "is not healthy" in said
    with client.InferenceServerClient(triton.http) as http:
        assert http.is_server_live()
        http.unload_model("fasa")
        http.load_model("fasa")
    assert triton.generate(text_input=PROMPT, max_tokens=6)["text_output"] == alone.text


def test_restart_after_kill_9_of_everything(
    server_python: Path, repository: Path, engine: Engine, tmp_path: Path
) -> None:
    (alone,) = engine.generate(PROMPT, max_new_tokens=6)
    with serving(server_python, repository, tmp_path / "first") as triton:
        (stub,) = triton.stubs()
        triton.process.kill()
        triton.process.wait()
        wait_until(lambda: not Path(f"/proc/{stub}").exists(), 30, triton)  # it notices by itself
    with serving(server_python, repository, tmp_path / "second", *EXPLICIT) as triton:
        assert triton.generate(text_input=PROMPT, max_tokens=6)["text_output"] == alone.text
        assert triton.stop() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(triton.process.pid, 0)
