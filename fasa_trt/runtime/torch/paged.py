"""A layer on the GPU: a paged pool with a label array, read and written by the CUDA kernels.

transformers has rotated queries and keys already, in the checkpoint's order of dims. Permuting both alike, dominant
chunks first, is what baking does to the weights; the append kernel then turns nothing, caches and makes labels.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fasa_trt.core.labels import label_bytes
from fasa_trt.plugins.torch.dense import dense_decode, prefill
from fasa_trt.plugins.torch.ops import append, decode
from fasa_trt.runtime.torch.cache import FasaLayer
from fasa_trt.runtime.torch.step import DeviceStep, Step

TOKENS = 64  # of a block
GROWTH = 1.5


class PagedLayer(FasaLayer):
    """Each sequence has the same number of blocks, one after another; pool, labels and scales grow together.

    Labels are quantised as `settings.labels` says. Sequences beyond the budget are always attended sparsely, also where
    dense attention would be faster: what this runtime is for is to tell how FASA behaves.
    """

    pool: Tensor  # [batch * blocks, 1, 2, kv_heads, TOKENS, head_dim]; this and the others as in plugins/torch/ops.py
    labels: Tensor
    scales: Tensor
    offsets: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, softcap: float) -> Tensor:
        plan, device = self.settings.plan, step.on(q.device)
        self._reserve(k, step)
        q, k, v = (self._packed(x, step, device) for x in (*self._permuted(q, k), v))
        turns = torch.zeros(k.shape[1], k.shape[2] // 2, device=k.device)
        q = append(
            q, k, v, device.sequence, device.position, turns, torch.ones_like(turns), self.pool, 0, self.offsets,
            self.labels, self.scales, self._kind, plan.n_tip,
        )  # fmt: skip
        self.length = step.past + step.columns
        longest, window = int(step.lengths.max()), plan.window or 0
        if step.columns > 1:
            out = prefill(q, device.query_lengths, self.pool, 0, self.offsets, device.lengths, scale, softcap, window)
        elif plan.sparse:
            spec = self.settings.spec
            out = decode(
                q, self.pool, 0, self.offsets, device.lengths, self.labels, self.scales, self._kind, plan.n_tip,
                longest, 0, spec.budget, spec.sink, spec.recent, scale, softcap, spec.reduction,
            )  # fmt: skip
        else:
            out = dense_decode(q, self.pool, 0, self.offsets, device.lengths, longest, scale, softcap, window)
        if step.padded:
            out = out.new_zeros(step.batch * step.columns, *out.shape[1:]).index_copy_(0, device.index, out)
        return out.view(step.batch, step.columns, *out.shape[1:])

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            del self.pool, self.labels, self.scales, self.offsets
            self.is_initialized = False

    @property
    def _kind(self) -> str:
        return self.settings.labels if self.settings.plan.sparse else "prefix"

    @cached_property
    def _label_bytes(self) -> int:
        return label_bytes(self._kind, self.settings.plan.n_tip)

    def _permuted(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k with dominant dims first, pair members side by side; a dense layer's as they are."""
        if not self.settings.plan.sparse:
            return q, k
        if not hasattr(self, "_dims"):
            self._dims = torch.from_numpy(self.settings.plan.dims()).to(k.device)
        dims = self._dims[:, None, :]  # [kv_heads, 1, head_dim]
        group = q.shape[1] // k.shape[1]
        q_dims = dims.repeat_interleave(group, dim=0)
        return q.gather(3, q_dims.expand(q.shape)), k.gather(3, dims.expand(k.shape))

    def _packed(self, x: Tensor, step: Step, device: DeviceStep) -> Tensor:
        """[batch, heads, columns, head_dim] as [N, heads, head_dim], without the padding."""
        rows = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
        return rows.index_select(0, device.index) if step.padded else rows.contiguous()

    def _reserve(self, k: Tensor, step: Step) -> None:
        """Makes room for the step's tokens, keeping what is cached."""
        have = self.pool.shape[0] // step.batch if self.is_initialized else 0
        need = max(1, -(-int(step.lengths.max()) // TOKENS))
        if need <= have:
            return
        blocks = max(need, int(have * GROWTH))
        kv_heads, head_dim = k.shape[1], k.shape[3]
        rows = (step.batch * blocks, TOKENS, kv_heads)
        old = (self.pool, self.labels, self.scales) if self.is_initialized else None
        self.pool = k.new_empty(step.batch * blocks, 1, 2, kv_heads, TOKENS, head_dim)
        self.labels = torch.empty(*rows, self._label_bytes, dtype=torch.uint8, device=k.device)
        self.scales = torch.empty(rows, dtype=torch.float16, device=k.device)
        if old is not None:
            for grown, kept in zip((self.pool, self.labels, self.scales), old, strict=True):
                by_sequence = (step.batch, -1, *kept.shape[1:])
                if kept.numel():
                    grown.view(by_sequence)[:, :have] = kept.view(by_sequence)
        first = 2 * torch.arange(step.batch * blocks, dtype=torch.int32, device=k.device).view(step.batch, blocks)
        self.offsets = torch.stack([first, first + 1], dim=1).contiguous()
        self.is_initialized = True
