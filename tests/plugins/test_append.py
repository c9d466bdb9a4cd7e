"""Writing the cache: rotation, paging and labels against float64."""

from __future__ import annotations

import pytest
import torch

from fasa_trt.core.rope import Rotary, chunk_pairs
from tests.plugins.paged import make_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_labels_are_the_quantised_prefix(kind: str) -> None:
    case = make_case([100, 33], kind=kind, n_tip=24, seed=1)
    top = 7 if kind == "int4" else 127
    for seq in range(2):
        for kv_head in range(2):
            key = case.cached(seq, 0, kv_head)[:, :48]
            codes, scales = case.cached_labels(seq, kv_head)
            scale = (key.abs().amax(dim=1) / top).half()
            assert torch.equal(scales, scale)
            assert torch.equal(codes.double(), (key / scale[:, None].double()).round().clamp(-top, top))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation(dtype: torch.dtype) -> None:
    from fasa_trt.plugins.torch.ops import append

    torch.manual_seed(0)
    tokens, kv_heads, group, head_dim = 50, 2, 3, 64
    q = torch.randn(tokens, kv_heads * group, head_dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(tokens, kv_heads, head_dim, device="cuda", dtype=dtype) for _ in range(2))
    inv_freq = torch.rand(kv_heads, head_dim // 2, device="cuda")
    scale = 1 + torch.rand(kv_heads, head_dim // 2, device="cuda")
    position = torch.randperm(64, device="cuda", dtype=torch.int32)[:tokens]
    pool = torch.zeros(4, 1, 2, kv_heads, 16, head_dim, device="cuda", dtype=dtype)
    offsets = torch.tensor([[[6, 2, 0, 4], [7, 3, 1, 5]]], device="cuda", dtype=torch.int32)
    empty = torch.empty(0, device="cuda")
    rows = torch.zeros(tokens, device="cuda", dtype=torch.int32)
    q_out = append(q, k, v, rows, position, inv_freq, scale, pool, 0, offsets, empty, empty, "prefix", 8)
    for g in range(kv_heads):
        rotary = Rotary(
            chunk_pairs(head_dim, head_dim, interleaved=True), inv_freq[g].cpu().numpy(), scale[g].cpu().numpy()
        )
        cos, sin = (torch.from_numpy(x).double().cuda() for x in rotary.angles(position.cpu().numpy()))
        for x, got in ((k[:, g], None), *((q[:, h], q_out[:, h]) for h in range(g * group, (g + 1) * group))):
            a, b = x.double()[:, 0::2], x.double()[:, 1::2]
            wanted = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(1)
            if got is None:
                block, slot = offsets[0, 0, position.long() // 16].long() // 2, position.long() % 16
                got = pool[block, 0, 0, g, slot]
            assert (got.double() - wanted).abs().max() < 2.0 ** (-7 if dtype == torch.bfloat16 else -10) * 8
        block, slot = offsets[0, 1, position.long() // 16].long() // 2, position.long() % 16
        assert torch.equal(pool[block, 0, 1, g, slot], v[:, g])
