"""What one may choose about a model repository."""

from __future__ import annotations

from dataclasses import dataclass

from fasa_trt.core.errors import FasaError


@dataclass(frozen=True)
class RepositoryOptions:
    """instances: of the model on each GPU, or on the CPU; of TensorRT-LLM's, those of the tokenizer's models. gpus: by
    CUDA's numbers; empty for the first one, or the CPU. max_requests: that an instance takes on, waiting ones included.
    streaming: whether answers may come in pieces. threads, kv_fraction: as of `runtime.generate.load`.

    Raises FasaError when a value is out of range.
    """

    instances: int = 1
    gpus: tuple[int, ...] = ()
    max_requests: int = 256
    streaming: bool = True
    threads: int | None = None
    kv_fraction: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("instances", self.instances), ("max-requests", self.max_requests)):
            if value < 1:
                raise FasaError(f"{name} must be at least 1, not {value}")
        if self.threads is not None and self.threads < 1:
            raise FasaError(f"threads must be at least 1, not {self.threads}")
        if self.kv_fraction is not None and not 0 < self.kv_fraction <= 1:
            raise FasaError(f"kv-fraction {self.kv_fraction} is out of range", hint="above 0, at most 1")
        if any(gpu < 0 for gpu in self.gpus) or len(set(self.gpus)) != len(self.gpus):
            raise FasaError(f"gpus must be different numbers from 0 on, not {','.join(map(str, self.gpus))}")
