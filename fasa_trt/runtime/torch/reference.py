"""A layer on the CPU: the definition itself for sparse steps, torch for dense ones. Slow and exact."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fasa_trt.core.reference import decode
from fasa_trt.runtime.torch.cache import FasaLayer
from fasa_trt.runtime.torch.step import Step


class ReferenceLayer(FasaLayer):
    """Keys and values [batch, kv_heads, columns, head_dim] as the model made them, padding included. Labels are not
    quantised: scores come from the dominant dims themselves."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, softcap: float) -> Tensor:
        k = k if self.keys is None else torch.cat([self.keys, k], dim=2)
        v = v if self.values is None else torch.cat([self.values, v], dim=2)
        self.keys, self.values = k, v
        self.length = step.past + step.columns
        if step.columns == 1 and self.settings.plan.sparse:
            return self._sparse(q, k, v, step, scale, softcap)
        return self._dense(q, k, v, step, scale, softcap)

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, softcap: float) -> Tensor:
        plan, spec = self.settings.plan, self.settings.spec
        dims = plan.dims()
        assert dims is not None
        batch, kv_heads, _, head_dim = k.shape
        queries = q.float().numpy().reshape(batch, kv_heads, -1, head_dim)
        keys, values = k.float().numpy(), v.float().numpy()
        out = np.empty_like(queries)
        for b, g in np.ndindex(batch, kv_heads):
            real = slice(int(step.padding[b]), None)
            label = dims[g, : plan.label_dims]
            out[b, g] = decode(queries[b, g], keys[b, g, real], values[b, g, real], label, spec, scale, softcap or None)
        return torch.from_numpy(out.reshape(batch, 1, -1, head_dim)).to(q.dtype)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, softcap: float) -> Tensor:
        column = torch.arange(step.past, self.length)[:, None]
        key = torch.arange(self.length)
        seen = key <= column
        if self.settings.plan.window is not None:
            seen &= key > column - self.settings.plan.window
        padding = torch.from_numpy(step.padding)[:, None, None]
        seen = (seen & (key >= padding)) | (key == column)  # padding sees itself, so that no row is empty
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if not softcap:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale)
            return out.transpose(1, 2)
        logits = softcap * torch.tanh(q.float() @ k.float().transpose(2, 3) * scale / softcap)
        weights = torch.softmax(logits.masked_fill(~seen[:, None], -torch.inf), dim=-1)
        return (weights @ v.float()).to(q.dtype).transpose(1, 2)
