"""What is needed to go on with a run: parameters, AdamW's moments, and how far it is; one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """seconds: of training alone, without preparation and evaluation."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_state(file: Path, size: str, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Replaces the file as a whole. Raises FasaError when it cannot be written."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{name}/{moment}"] = torch.as_tensor(optimizer.state[parameter][moment])
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(file, save(content, metadata={"size": size, "progress": json.dumps(asdict(progress))}))


def load_state(file: Path, size: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Raises FasaError when there is none, it is broken, or it is of another model."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FasaError(f"nothing to resume: no {file}", hint="leave out --resume")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no dict
        if metadata["size"] != size:
            raise FasaError(f"{file} is of size {metadata['size']}, not {size}", hint="another --work")
        progress = Progress(**json.loads(metadata["progress"]))
        numbers: dict[nn.Parameter, int] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                numbers[parameter] = len(numbers)
        state: dict[int, dict[str, Any]] = {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])
                state[numbers[parameter]] = {moment: tensors[f"{name}/{moment}"] for moment in MOMENTS}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FasaError(f"{file} cannot be resumed: {error}", hint="leave out --resume") from None
    return progress
