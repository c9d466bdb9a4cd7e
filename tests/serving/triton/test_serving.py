"""The `fasa` model in a real tritonserver: answers are the engine's own, over HTTP and gRPC, in any company."""

from __future__ import annotations

import json
import queue
import random
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fasa_trt.runtime.generate import Engine
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.serving.triton.options import RepositoryOptions
from fasa_trt.serving.triton.repository import write_repository
from tests.serving.triton.conftest import MAX_SEQ_LEN
from tests.serving.triton.live import Triton, needs_server, serving, wait_until

pytestmark = needs_server
PROMPT = "def add(a, b):\n    return"
LONG = "x = 1\n" * 60  # beyond the budget


def test_answer_is_the_engines(triton: Triton, engine: Engine) -> None:
    for prompt in (PROMPT, LONG):
        (alone,) = engine.generate(prompt, max_new_tokens=12)
        answer = triton.generate(text_input=prompt, max_tokens=12)
        assert (answer["text_output"], answer["output_ids"]) == (alone.text, alone.tokens)
        assert (answer["finish_reason"], answer["num_output_tokens"]) == (alone.finish_reason, len(alone.tokens))
        assert answer["num_input_tokens"] == alone.prompt_tokens


def test_options(triton: Triton, engine: Engine) -> None:
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=7)
    (drawn,) = engine.generate(PROMPT, max_new_tokens=20, sampling=sampling)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "random_seed": 7}
    assert triton.generate(text_input=PROMPT, max_tokens=20, **options)["text_output"] == drawn.text
    (stopped,) = engine.generate(PROMPT, max_new_tokens=20, stop=["\n", "zzz"])
    answer = triton.generate(text_input=PROMPT, max_tokens=20, stop_words=["\n", "zzz"])
    assert (answer["text_output"], answer["finish_reason"]) == (stopped.text, "stop")
    tokens = engine.encode(PROMPT)
    assert triton.generate(input_ids=tokens, max_tokens=5) == triton.generate(text_input=PROMPT, max_tokens=5)


def test_http_stream(triton: Triton, engine: Engine) -> None:
    prompt = "# é ü 漢字 🙂\ns = 'é ü 漢字"
    (alone,) = engine.generate(prompt, max_new_tokens=24)
    body = json.dumps({"text_input": prompt, "max_tokens": 24, "stream": True}).encode()
    with urllib.request.urlopen(f"http://{triton.http}/v2/models/fasa/generate_stream", body, timeout=60) as response:
        lines = response.read().decode("utf-8").splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert len(events) > 2
    assert "".join(event["text_output"] for event in events) == alone.text
    assert [event["finish_reason"] for event in events] == [*[""] * (len(events) - 1), alone.finish_reason]
    tokens = np.concatenate([np.ravel(event["output_ids"]) for event in events])  # one alone is no list
    assert tokens.tolist() == alone.tokens


def inputs(**fields: Any) -> list[Any]:
    """tritonclient's inputs of a gRPC request."""
    import tritonclient.grpc as client

    types = {"text_input": ("BYTES", object), "max_tokens": ("INT32", np.int32), "stream": ("BOOL", bool)}
    found = []
    for name, value in fields.items():
        kind, dtype = types[name]
        found.append(client.InferInput(name, [1], kind))
        found[-1].set_data_from_numpy(np.array([value.encode() if kind == "BYTES" else value], dtype))
    return found


@pytest.mark.slow
def test_64_concurrent_grpc_streams(triton: Triton, engine: Engine) -> None:
    import tritonclient.grpc as client

    rng = random.Random(3)
    wanted: dict[str, tuple[str, int]] = {}
    for row in range(64):
        prompt = f"# {row}\n" + "y = 2\n" * rng.randrange(1, 30)
        wanted[str(row)] = (prompt, rng.randrange(1, 20))
    before = triton.count("fasa_generated_tokens_total")
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with client.InferenceServerClient(triton.grpc) as grpc:
        grpc.start_stream(lambda result, error: arrived.put((result, error)))
        for number, (prompt, length) in wanted.items():
            fields = inputs(text_input=prompt, max_tokens=length, stream=True)
            grpc.async_stream_infer("fasa", fields, request_id=number)
        texts = dict.fromkeys(wanted, "")
        reasons: dict[str, str] = {}
        while len(reasons) < len(wanted):
            result, error = arrived.get(timeout=60)
            assert error is None, error
            number = result.get_response().id
            texts[number] += result.as_numpy("text_output")[0].decode()
            if reason := result.as_numpy("finish_reason")[0].decode():
                assert number not in reasons
                reasons[number] = reason
    assert set(reasons.values()) <= {"length", "eos"}
    generated = 0
    for number, (prompt, length) in wanted.items():
        (alone,) = engine.generate(prompt, max_new_tokens=length)
        assert texts[number] == alone.text, number
        generated += len(alone.tokens)
    assert triton.count("fasa_generated_tokens_total") - before == generated
    assert triton.count("fasa_answers_in_flight") == 0


def test_cancelled_stream_leaves_the_batch(triton: Triton) -> None:
    import tritonclient.grpc as client

    before = triton.count("fasa_answers_total", finish_reason="cancelled")
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with client.InferenceServerClient(triton.grpc) as grpc:
        grpc.start_stream(lambda result, error: arrived.put((result, error)))
        grpc.async_stream_infer("fasa", inputs(text_input=PROMPT, max_tokens=480, stream=True))
        assert arrived.get(timeout=30)[1] is None
        assert triton.count("fasa_answers_in_flight") == 1
        grpc.stop_stream(cancel_requests=True)
    wait_until(lambda: triton.count("fasa_answers_total", finish_reason="cancelled") == before + 1, 10, triton)
    assert triton.count("fasa_answers_in_flight") == 0


def test_bad_requests_are_refused_with_a_reason(triton: Triton) -> None:
    for fields, reason in (
        ({}, "no prompt"),
        ({"text_input": "a", "input_ids": [1]}, "both text_input and input_ids"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"text_input": "a", "temperature": -1}, "temperature must be between"),
        ({"text_input": "a", "top_p": 0}, "top_p must be above 0"),
        ({"text_input": "a", "stop_words": ["s"] * 17}, "17 stop strings are too many"),
        ({"input_ids": [99999]}, "token ids go from 0 to 2047"),
        ({"text_input": LONG * 10}, f"this engine holds {MAX_SEQ_LEN}"),
        ({"text_input": "x" * 1_000_000}, f"far beyond this engine's {MAX_SEQ_LEN} tokens"),
        ({"text_input": ["a", "b"]}, "proper shape"),
    ):
        status, said = triton.refused(**fields)
        assert status == 400 and reason in said, (fields, said)
    status, said = triton.refused(text_input="a", max_tokens="many")  # Triton's own refusal
    assert status == 500 and "JSON" in said
    assert triton.generate(text_input=PROMPT, max_tokens=1)["num_output_tokens"] == 1


def test_random_bytes_and_damaged_json_do_no_harm(triton: Triton) -> None:
    (stub,) = triton.stubs()
    rng = random.Random(0)
    bodies = [rng.randbytes(rng.randrange(0, 400)) for _ in range(60)]
    valid = json.dumps({"text_input": PROMPT, "max_tokens": 2, "stop_words": ["q"], "top_k": 3}).encode()
    for _ in range(120):  # JSON with a few bytes changed, cut or doubled
        damaged = bytearray(valid)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        bodies.append(bytes(damaged))
    values: tuple[Any, ...] = (None, True, -1, 1e308, "", "é\ud800", [], [[1]], {"a": 1}, 2**70)
    bodies += [json.dumps({"text_input": "a", "max_tokens": 1, name: v}).encode() for name in FIELDS for v in values]
    with ThreadPoolExecutor(4) as pool:
        whole = pool.map(lambda body: status_of(triton, "generate", body), bodies)
        streamed = pool.map(lambda body: status_of(triton, "generate_stream", body), bodies[::4])
        assert {*whole, *streamed} == {200, 400, 500}  # 500: what Triton says of JSON of other types than it wants
    assert status_of(triton, "infer", valid) == 501  # Triton's answer where answers may come in pieces
    # From about 3 MB on, HTTP bodies bring this old server itself down (CVE-2025-23310), whatever the model.
    assert status_of(triton, "generate", b'{"text_input": "' + b"a" * (2 << 20) + b'"}') == 400
    assert triton.stubs() == [stub], "the model's process died"
    assert triton.generate(text_input=PROMPT, max_tokens=1)["num_output_tokens"] == 1


FIELDS = ("text_input", "input_ids", "max_tokens", "temperature", "top_k", "random_seed", "stream", "stop_words")


def status_of(triton: Triton, endpoint: str, body: bytes) -> int:
    request = urllib.request.Request(f"http://{triton.http}/v2/models/fasa/{endpoint}", body)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_whole_answers_and_a_full_model(server_python: Path, engine_path: Path, engine: Engine, tmp_path: Path) -> None:
    """--no-streaming makes Triton's plain infer requests work; --max-requests bounds what waits."""
    import tritonclient.grpc as grpc_client
    import tritonclient.http as client
    from tritonclient.utils import InferenceServerException

    options = RepositoryOptions(threads=1, streaming=False, max_requests=2)
    repository = write_repository(engine_path, tmp_path / "models", options, copy=True).path
    with serving(server_python, repository, tmp_path / "log") as triton:
        text = client.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([PROMPT.encode()], object))
        length = client.InferInput("max_tokens", [1], "INT32")
        length.set_data_from_numpy(np.array([9], np.int32))
        with client.InferenceServerClient(triton.http) as http:
            tokens: NDArray[np.int32] = http.infer("fasa", [text, length]).as_numpy("output_ids")
        assert tokens.tolist() == engine.generate(PROMPT, max_new_tokens=9)[0].tokens
        assert "does not stream" in triton.refused(text_input=PROMPT, stream=True)[1]
        whole = engine.generate(PROMPT, max_new_tokens=200)[0].text
        with grpc_client.InferenceServerClient(triton.grpc) as grpc, ThreadPoolExecutor(6) as pool:
            fields = inputs(text_input=PROMPT, max_tokens=200)
            waiting = [pool.submit(grpc.infer, "fasa", fields) for _ in range(6)]
            errors = [error for answer in waiting if (error := answer.exception())]
        assert 1 <= len(errors) <= 4
        for error in errors:
            assert isinstance(error, InferenceServerException) and error.status() == "StatusCode.UNAVAILABLE"
            assert "2 requests are waiting or running already" in str(error)
        texts = [answer.result().as_numpy("text_output")[0].decode() for answer in waiting if not answer.exception()]
        assert set(texts) == {whole}
        assert triton.stop() == 0


@pytest.mark.slow
def test_engine_that_is_gone_keeps_the_server_from_starting(
    server_python: Path, engine_path: Path, tmp_path: Path
) -> None:
    repository = write_repository(engine_path, tmp_path / "models", RepositoryOptions(), copy=True).path
    (repository / "fasa" / "1" / "engine" / "model.onnx").unlink()
    log = tmp_path / "log"
    with pytest.raises(AssertionError), serving(server_python, repository, log):
        raise RuntimeError("it started")
    assert "engine is incomplete: model.onnx is missing (build the engine again)" in log.read_text()
