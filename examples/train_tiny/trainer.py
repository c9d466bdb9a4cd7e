"""The model, its optimizer, and one step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from examples.train_tiny.batches import Batch
from examples.train_tiny.mix import text_weight
from examples.train_tiny.model import Losses, Rope, TinyLlama, losses, run_block
from examples.train_tiny.settings import Settings
from fasa_trt.core.errors import FasaError


class Trainer:
    """AdamW with warm-up and cosine decay; float32 parameters, bfloat16 computation on the GPU.

    Raises FasaError without a GPU, unless settings.cpu, and when the GPU's memory does not suffice.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.cpu and not torch.cuda.is_available():
            raise FasaError("PyTorch finds no CUDA GPU", hint="--cpu tries the code without one")
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self.settings = settings
        self.device = torch.device("cpu" if settings.cpu else "cuda")
        # CPUs are slow at bfloat16, where they know it at all.
        self.model = TinyLlama(settings.shape, dtype=torch.float32 if settings.cpu else torch.bfloat16).to(self.device)
        self.losses: Callable[..., Losses] = losses
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=not settings.cpu,
        )
        self._ropes: dict[int, Rope] = {}

    def warm_up(self) -> None:
        """Compile for every length, before the clock starts; train uncompiled, and say so, where that fails."""
        if self.settings.compile:
            self.model.run_block = torch.compile(run_block, dynamic=False)
            self.losses = torch.compile(losses, dynamic=False)
        try:
            self._try_lengths()
        except torch.OutOfMemoryError:
            raise self._out_of_memory() from None
        except Exception as error:  # the compiler's errors have no common class
            if not self.settings.compile:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            print(f"torch.compile failed, training without it, slower: {lines[0]}", flush=True)
            self.model.run_block, self.losses = run_block, losses
            self._try_lengths()

    def step(self, batch: Batch, step: int, progress: float) -> Losses:
        """One update. progress: share of the training time that is over."""
        decay = 0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(1, (step + 1) / self.settings.warmup_steps) * decay
        tokens = self._to_device(torch.from_numpy(batch.tokens.astype("int32"))).long()
        weights = self._to_device(torch.from_numpy(batch.weights))[:, 1:].float().contiguous()
        answers = self._to_device(torch.from_numpy(batch.answers))[:, 1:] > 0
        try:
            measured = self._losses(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, answers)
            measured.loss.backward()
        except torch.OutOfMemoryError:
            raise self._out_of_memory() from None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Losses(*(value.detach() for value in measured))

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Without compilation: evaluation sees other shapes than training does."""
        compiled, self.model.run_block = self.model.run_block, run_block
        try:
            return self.model.logits(self.model(tokens, self._rope(tokens.shape[1])))
        finally:
            self.model.run_block = compiled

    def _try_lengths(self) -> None:
        for stage in self.settings.stages:
            size = (max(1, self.settings.batch_tokens // stage.length), stage.length)
            tokens = torch.randint(2, 100, size, device=self.device)
            mask = torch.ones(size, dtype=torch.bool, device=self.device)
            self._losses(tokens, tokens, mask.float(), mask).loss.backward()
            self.optimizer.zero_grad(set_to_none=True)

    def _losses(self, tokens: Tensor, targets: Tensor, weights: Tensor, answers: Tensor) -> Losses:
        model = self.model
        hidden = model(tokens, self._rope(tokens.shape[1]))
        text = weights == text_weight(self.settings.mix)
        return self.losses(hidden, model.norm.weight, model.embed_tokens.weight, targets, weights, text, answers)

    def _rope(self, length: int) -> Rope:
        if length not in self._ropes:
            self._ropes[length] = self.model.rope(length)
        return self._ropes[length]

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.settings.cpu else tensor.pin_memory().to(self.device, non_blocking=True)

    def _out_of_memory(self) -> FasaError:
        return FasaError(f"{self.settings.batch_tokens} tokens a step need more memory", hint="lower --batch-tokens")
