"""A Hugging Face checkpoint on disk: configuration, streamed weights, fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fasa_trt.core.errors import FasaError
from fasa_trt.core.rope import head_dim_of
from fasa_trt.core.safetensors_file import StoredTensor, stored_tensors

# Everything but weights in other formats; pickled ones are never fetched.
DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Where a multimodal checkpoint keeps its decoder, by transformers version.
TEXT_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that has been opened and looked over.

    path: the directory. config: its transformers configuration. tensors: where each weight lies on disk.
    """

    path: Path
    config: Any
    tensors: dict[str, StoredTensor] = field(repr=False)

    @property
    def head_dim(self) -> int:
        return head_dim_of(self.config)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def dtype(self) -> str:
        """The dtype that most weights are stored in: float32, float16 or bfloat16."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        names = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return names.get(max(sizes, key=lambda dtype: sizes[dtype]), "float32")

    def tensor(self, name: str) -> StoredTensor:
        """Raises FasaError when the checkpoint lacks it."""
        if name not in self.tensors:
            raise FasaError(
                f"{self.path} has no tensor {name}", hint="the checkpoint is incomplete or not of its config"
            )
        return self.tensors[name]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model for a profile: shapes, RoPE parameters and the query and key projection weights."""
        config = self.config
        described = {
            "model_type": config.model_type,
            "layers": self.num_layers,
            "heads": [self.num_heads, self.num_kv_heads, self.head_dim],
            "rope": getattr(config, "rope_parameters", None),
        }
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
        for name in sorted(self.tensors):
            if any(part in name for part in ("q_proj.", "k_proj.", "qkv_proj.")):
                tensor = self.tensors[name]
                digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
                digest.update(tensor.read().tobytes())
        return digest.hexdigest()


def open_checkpoint(model: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Opens a local directory, or downloads a model ID from the Hugging Face hub first.

    Of a multimodal model this is the text part, its tensors named as in a text-only checkpoint.
    Raises FasaError when there is no such model, or its files are unreadable, truncated or missing.
    """
    path = _local_directory(model)
    config = _read_config(path, trust_remote_code)
    text, tensors = config.get_text_config(), _index(path)
    if text is not config:
        tensors = {_text_name(name): tensor for name, tensor in tensors.items()}
    return Checkpoint(path, text, tensors)


def _text_name(name: str) -> str:
    for prefix, plain in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _local_directory(model: str | Path) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    text = str(model)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FasaError(f"no such model: {text} is not a directory", hint="pass a checkpoint directory or a hub ID")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=DOWNLOAD_PATTERNS))
    except Exception as error:  # offline, unknown, gated, full disk: the hub's own words say which
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FasaError(
            f"no such model: {text} is not a directory here and could not be downloaded: {reason}",
            hint="check the name, or pass a local checkpoint directory",
        ) from None


def _read_config(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    file = path / "config.json"
    if not file.is_file():
        raise FasaError(
            f"{path} is not a model: it has no config.json", hint="pass a Hugging Face checkpoint directory"
        )
    try:
        json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise FasaError(f"{file} is not valid JSON: {error}", hint="download it again") from None
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FasaError(f"{file} does not describe a model that transformers knows: {reason}") from None
    return config


def _index(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor lies, after the shard index if there is one."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        try:
            names = {str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FasaError(f"{index} is not a shard index", hint="download it again") from None
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise FasaError(f"{index} points outside its directory: {outside[0]}")
        files = [path / name for name in sorted(names)]
    else:  # adapters or a second copy of the weights may lie beside the usual file
        files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FasaError(f"{path} lacks {missing[0]}, which its index names", hint="finish the download")
    tensors = {tensor.name: tensor for file in files for tensor in stored_tensors(file)}
    if not tensors:
        raise FasaError(
            f"{path} has no safetensors weights", hint="pickled weights are not read; convert the model to safetensors"
        )
    return tensors
