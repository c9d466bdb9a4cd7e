"""The operators under torch.compile: their schemas and fake versions, which needs no GPU, and compiled calls on one."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fasa_trt.plugins.torch import dense, ops  # noqa: F401  (dense registers operators)
from tests.plugins.paged import make_case

SEQS, HEADS, KV_HEADS, HEAD_DIM, TOKENS, BLOCKS = 3, 8, 2, 64, 16, 9
# Inductor compiles C, which calls Python, around its Triton kernels.
can_generate = (
    importlib.util.find_spec("triton") is not None
    and (shutil.which("cc") or shutil.which("gcc")) is not None
    and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
)
backends = pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(not can_generate, reason="needs Triton and a C compiler")),
    ],
)


def arguments(device: str) -> dict[str, dict[str, Any]]:
    """Of one call of each operator, by its name."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    whole: dict[str, Any] = {"dtype": torch.int32, "device": device}
    pool = torch.zeros(BLOCKS, 2, 2, KV_HEADS, TOKENS, HEAD_DIM, **half)
    where = {"pool": pool, "layer": 1, "offsets": torch.zeros(SEQS, 2, 3, **whole)}
    labels = {
        "labels": torch.zeros(BLOCKS, TOKENS, KV_HEADS, 16, dtype=torch.uint8, device=device),
        "scales": torch.zeros(BLOCKS, TOKENS, KV_HEADS, dtype=torch.float16, device=device),
        "label_kind": "int4",
        "n_tip": 16,
    }
    q = torch.zeros(SEQS, HEADS, HEAD_DIM, **half)
    fused = torch.zeros(6, HEADS + 2 * KV_HEADS, HEAD_DIM, **half)
    lengths = torch.arange(1, SEQS + 1, **whole)  # 6 tokens
    numbers = {"scale": 0.125, "softcap": 0.0}
    bounds = {"max_length": 40, "dense_below": 0, "budget": 32, "sink": 4, "recent": 8}
    rope = torch.zeros(KV_HEADS, HEAD_DIM // 2, device=device)
    return {
        "decode": {"q": q, **where, "lengths": lengths, **labels, **bounds, **numbers, "reduction": "sum"},
        "dense_decode": {"q": q, **where, "lengths": lengths, "max_length": 40, **numbers, "window": 0},
        "prefill": {
            "q": fused[:, :HEADS], "query_lengths": lengths, **where, "lengths": lengths, **numbers, "window": 0,
        },
        "append": {
            "q": fused[:, :HEADS], "k": fused[:, HEADS:-KV_HEADS], "v": fused[:, -KV_HEADS:],
            "sequence": torch.zeros(6, **whole), "position": torch.arange(6, **whole), "inv_freq": rope,
            "rope_scale": rope, **where, **labels, "q_norm": torch.ones(HEADS, HEAD_DIM, **half), "k_norm": None,
        },
    }  # fmt: skip


OPERATORS = list(arguments("meta"))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_and_types_without_a_gpu(name: str, device: str) -> None:
    with FakeTensorMode():
        given = arguments(device)[name]
        out = getattr(torch.ops.fasa, name)(**given)
    assert out.shape == given["q"].shape and out.dtype == torch.bfloat16 and out.device.type == device
    assert out.is_contiguous()


class Idle:
    """A library whose functions succeed and do nothing, but for keeping the names that were called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*_: object) -> int:
            self.called.append(name)
            return 0

        return call


@pytest.mark.parametrize("name", OPERATORS)
def test_schemas_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = Idle()
    monkeypatch.setattr(ops, "library", lambda *_: idle)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    torch.library.opcheck(
        getattr(torch.ops.fasa, name).default, (), arguments("cpu")[name], test_utils=("test_schema", "test_faketensor")
    )
    assert idle.called[-1] == f"fasa_{name}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fasa, name).default, (), arguments("cuda")[name])


@pytest.mark.gpu
@backends
@pytest.mark.parametrize("kind", ["int4", "fp8", "prefix"])
def test_compiled_decode(kind: str, backend: str) -> None:
    case = make_case([500, 1000, 100], kind=kind, seed=14)

    def step(q: Tensor) -> Tensor:
        return torch.ops.fasa.decode(
            q * 2, case.pool, case.layer, case.offsets, case.lengths, case.labels, case.scales, case.kind, case.n_tip,
            case.max_length, 0, 256, 4, 32, case.scale, 0.0, "sum",
        ) + 1  # fmt: skip

    assert torch.equal(torch.compile(step, fullgraph=True, backend=backend)(case.q), step(case.q))


@pytest.mark.gpu
@backends
def test_compiled_step(backend: str) -> None:
    """One that writes the cache and reads it again."""
    eager, compiled = (make_case([500, 1000, 100], seed=14) for _ in range(2))
    heads, kv_heads, head_dim = eager.q.shape[1], eager.pool.shape[3], eager.q.shape[2]
    fused = torch.randn(3, heads + 2 * kv_heads, head_dim, device="cuda").to(eager.q.dtype)
    rows = torch.arange(3, dtype=torch.int32, device="cuda")
    freq = torch.rand(kv_heads, head_dim // 2, device="cuda")

    def step(fused: Tensor, pool: Tensor, labels: Tensor, scales: Tensor, offsets: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
        q = torch.ops.fasa.append(
            q, k, v, rows, lengths - 1, freq, torch.ones_like(freq), pool, 0, offsets, labels, scales, "int4", 32
        )
        return torch.ops.fasa.decode(
            q, pool, 0, offsets, lengths, labels, scales, "int4", 32, 1000, 0, 256, 4, 32, 0.0884, 0.0, "sum"
        ) + torch.ops.fasa.dense_decode(q, pool, 0, offsets, lengths, 1000, 0.0884, 0.0, 0)

    got, wanted = (
        call(fused, case.pool, case.labels, case.scales, case.offsets, case.lengths)
        for call, case in ((torch.compile(step, fullgraph=True, backend=backend), compiled), (step, eager))
    )
    assert torch.equal(got, wanted)
    for a, b in ((compiled.pool, eager.pool), (compiled.labels, eager.labels), (compiled.scales, eager.scales)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
