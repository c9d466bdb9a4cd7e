"""Writing the cache: norms, rotation, paging and labels, against float64. Needs a GPU and nvcc."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from fasa_trt.core.rope import Rotary, chunk_pairs
from tests.plugins.checks import DTYPES
from tests.plugins.paged import make_case

pytestmark = pytest.mark.gpu
KINDS = ["int4", "int8", "fp8"]


@dataclass
class Step:
    """50 new tokens at random positions of a sequence of 64, beside another sequence, in one layer of a pool."""

    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    tokens_per_block: int = 16
    layers: int = 2
    layer: int = 1
    rotates: bool = True
    device: str = "cuda"
    kind: str = "prefix"
    n_tip: int = 8
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        tokens, heads = 50, self.kv_heads * (self.group + 2)
        # As a fused projection leaves them, between other columns.
        fused = torch.randn(tokens, heads + 3, self.head_dim, device=self.device).to(self.dtype)
        self.q, self.k, self.v = fused[:, 1:-2].split([self.kv_heads * self.group, self.kv_heads, self.kv_heads], dim=1)
        self.inv_freq = torch.rand(self.kv_heads, self.head_dim // 2, device=self.device) * self.rotates
        self.rope_scale = 1 + torch.rand_like(self.inv_freq) * self.rotates
        self.position = torch.randperm(64, device=self.device, dtype=torch.int32)[:tokens]
        blocks = max(64 // self.tokens_per_block, 1)
        order = torch.randperm(2 * blocks).view(2, 1, blocks)
        self.offsets = (torch.cat([2 * order * self.layers, 2 * order * self.layers + 1], 1)).int().to(self.device)
        shape = (2 * blocks, self.layers, 2, self.kv_heads, self.tokens_per_block, self.head_dim)
        self.pool = torch.full(shape, 7.0, device=self.device, dtype=self.dtype)
        width = {"prefix": 0, "int4": self.n_tip}.get(self.kind, 2 * self.n_tip)
        rows = (2 * blocks, self.tokens_per_block, self.kv_heads)
        self.labels = torch.full((*rows, width), 0xA5, dtype=torch.uint8, device=self.device)
        self.scales = torch.zeros(rows, dtype=torch.float16, device=self.device)

    def run(self) -> Tensor:
        from fasa_trt.plugins.torch.ops import append

        rows = torch.ones(len(self.q), device=self.device, dtype=torch.int32)  # the second sequence
        return append(
            self.q, self.k, self.v, rows, self.position, self.inv_freq, self.rope_scale, self.pool, self.layer,
            self.offsets, self.labels, self.scales, self.kind, self.n_tip, self.q_norm, self.k_norm,
        )  # fmt: skip

    def place(self) -> tuple[Tensor, Tensor]:
        """Block and slot of each token."""
        position = self.position.long()
        block = self.offsets[1, 0].long()[position // self.tokens_per_block] // (2 * self.layers)
        return block, position % self.tokens_per_block

    def written(self, kind: int) -> Tensor:
        """[N, Hkv, head_dim]: the keys (0) or values (1) that are now in the pool."""
        block, slot = self.place()
        return self.pool[block, self.layer, kind, :, slot]

    def rotated(self, x: Tensor) -> Tensor:
        """float64 of [N, heads, head_dim]."""
        share = x.shape[1] // self.kv_heads
        heads = []
        for head in range(x.shape[1]):
            freq, scale = (part[head // share].cpu().numpy() for part in (self.inv_freq, self.rope_scale))
            rotary = Rotary(chunk_pairs(self.head_dim, self.head_dim, interleaved=True), freq, scale)
            angles = rotary.angles(self.position.cpu().numpy())
            cos, sin = (torch.from_numpy(part).double().to(self.device) for part in angles)
            a, b = x.double()[:, head, 0::2], x.double()[:, head, 1::2]
            heads.append(torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(1))
        return torch.stack(heads, dim=1)


def close(got: Tensor, wanted: Tensor) -> None:
    """Up to the rounding of the result, of numbers up to 8."""
    assert (got.double() - wanted).abs().max() < 2.0 ** (-7 if got.dtype == torch.bfloat16 else -10) * 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens_per_block", [8, 16, 32, 64, 128])
def test_rotation(dtype: torch.dtype, tokens_per_block: int) -> None:
    step = Step(dtype=dtype, tokens_per_block=tokens_per_block)
    close(step.run(), step.rotated(step.q))
    close(step.written(0), step.rotated(step.k))
    assert torch.equal(step.written(1), step.v)


@pytest.mark.parametrize("kind", ["prefix", *KINDS])
def test_nothing_else_is_written(kind: str) -> None:
    step = Step(kind=kind)
    step.run()
    block, slot = step.place()
    step.pool[block, step.layer, :, :, slot] = 7.0
    assert (step.pool == 7.0).all()
    step.labels[block, slot] = 0xA5
    assert (step.labels == 0xA5).all()


@pytest.mark.parametrize("kind", ["prefix", *KINDS])
def test_the_layout_of_the_projection_does_not_matter(kind: str) -> None:
    fused, apart = Step(kind=kind), Step(kind=kind)
    assert not fused.q.is_contiguous()
    apart.q, apart.k, apart.v = (x.contiguous() for x in (apart.q, apart.k, apart.v))
    assert torch.equal(fused.run(), apart.run())
    for name in ("pool", "labels", "scales"):
        assert torch.equal(getattr(fused, name), getattr(apart, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_norms(dtype: torch.dtype, head_dim: int, which: str) -> None:
    """Rounded where transformers rounds, with other weights for each head."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    step = Step(dtype=dtype, head_dim=head_dim, rotates=False)
    weights = {}
    for name, heads in (("q", step.q.shape[1]), ("k", step.k.shape[1])):
        if which in (name, "both"):
            weights[name] = (0.5 + torch.rand(heads, head_dim, device=step.device)).to(dtype)
    step.q_norm, step.k_norm = weights.get("q"), weights.get("k")
    q_out = step.run()
    for name, x, got in (("q", step.q, q_out), ("k", step.k, step.written(0))):
        if name not in weights:
            assert torch.equal(got, x)
            continue
        norm = Qwen3RMSNorm(head_dim, eps=1e-6)
        norm.weight = nn.Parameter(weights[name])
        wanted = norm(x)
        assert (got == wanted).double().mean() > 0.99  # rsqrt may differ by its last bit, and so a rounding
        error = (got.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1e-3)
        assert error.max() < 2.0 ** (-6 if dtype == torch.bfloat16 else -9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_come_before_rotation_and_labels(dtype: torch.dtype) -> None:
    step, still = (Step(dtype=dtype, rotates=rotates, kind="int8") for rotates in (True, False))
    for each in (step, still):
        each.q, each.k = still.q, still.k
        each.q_norm = torch.linspace(0.5, 2.0, still.q[0].numel(), device=step.device).view(still.q.shape[1:]).to(dtype)
        each.k_norm = torch.linspace(2.0, 0.5, still.k[0].numel(), device=step.device).view(still.k.shape[1:]).to(dtype)
    normed_q = still.run()
    close(step.run(), step.rotated(normed_q))
    keys = step.written(0)
    close(keys, step.rotated(still.written(0)))
    scales = (keys[..., : 2 * step.n_tip].float().abs().amax(dim=-1) / 127).half()
    assert torch.equal(step.scales[step.place()], scales)


def test_a_norm_of_zeros_is_zero() -> None:
    step = Step(rotates=False, q_norm=torch.ones(6, 64, device="cuda", dtype=torch.bfloat16))
    step.q = torch.zeros_like(step.q)
    assert (step.run() == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tip", [8, 24, 64])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_labels_are_the_quantised_prefix(kind: str, n_tip: int, dtype: torch.dtype) -> None:
    case = make_case([100, 33], kind=kind, n_tip=n_tip, dtype=dtype, seed=1)
    top = 7 if kind == "int4" else 127
    for seq in range(2):
        for kv_head in range(2):
            key = case.cached(seq, 0, kv_head)[:, : 2 * n_tip].float()
            codes, scales = case.cached_codes(seq, kv_head)
            scale = (key.abs().amax(dim=1) / top).half()
            assert torch.equal(scales, scale)
            assert torch.equal(codes, (key / scale[:, None].float()).round().clamp(-top, top).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tip", [8, 24, 64])
def test_fp8_labels_are_the_rounded_prefix(n_tip: int, dtype: torch.dtype) -> None:
    """Saturating where the key is larger than 448."""
    case = make_case([100, 33], kind="fp8", n_tip=n_tip, dtype=dtype, loudness=lambda x: 1.0 + 20 * x, seed=1)
    largest = 0.0
    for seq in range(2):
        for kv_head in range(2):
            key = case.cached(seq, 0, kv_head)[:, : 2 * n_tip].float()
            largest = max(largest, float(key.abs().max()))
            codes, _ = case.cached_codes(seq, kv_head)
            assert torch.equal(codes, key.clamp(-448, 448).to(torch.float8_e4m3fn).double())
    assert largest > 448
