"""Loads a checkpoint's tokenizer and transformers model for calibration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Raises FasaError when the checkpoint has none, or one that does not load."""
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # every tokenizer class fails in its own way
        raise FasaError(
            f"{checkpoint.path} has no tokenizer that transformers can load: {_first_line(error)}",
            hint="add its tokenizer.json and tokenizer_config.json",
        ) from None


def load_model(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The causal language model in evaluation mode. Raises FasaError when it is incomplete, does not load or fit."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, keys = loaded
        missing = sorted(keys["missing_keys"])
        if missing:  # transformers would make them up
            raise FasaError(
                f"{checkpoint.path} lacks {missing[0]}, which its config calls for", hint="download it again"
            )
        return model.to(device).eval()
    except torch.OutOfMemoryError:
        raise FasaError(
            f"{checkpoint.path} does not fit into the memory of {device}", hint="use --device cpu"
        ) from None
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise FasaError(f"transformers cannot load {checkpoint.path}: {_first_line(error)}") from None


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU where there is none. Raises FasaError for what is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise FasaError(f"no device {name!r} here: {_first_line(error)}", hint="auto, cpu, cuda or cuda:N") from None
    return device


def resolve_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """`auto` is the checkpoint's own dtype on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else checkpoint.dtype
    if name not in DTYPES:
        raise FasaError(f"unknown dtype {name!r}", hint=f"auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
