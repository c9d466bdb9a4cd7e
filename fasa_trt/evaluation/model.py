"""The model that is evaluated: its weights, tokenizer and profile, loaded once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasa_trt.calibrate.load import load_model, load_tokenizer, resolve_device, resolve_dtype
from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.core.rope import Rotary, rotary_of, window_of
from fasa_trt.core.spec import SparseSpec
from fasa_trt.evaluation.attention import NAME
from fasa_trt.export.plan import LayerPlan, can_be_sparse, plan_layers

SPLIT = "\x1ffasa\x1f"  # marks a place in a chat that is rendered whole


@dataclass(frozen=True)
class EvalModel:
    """model: attends through `attention.py`. profile: None where no method needs one. chat: wrap prompts in the
    tokenizer's chat template."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    profile: Profile | None = None
    chat: bool = False
    _plans: dict[SparseSpec, list[LayerPlan]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head_dim(self) -> int:
        return self.checkpoint.head_dim

    @property
    def num_layers(self) -> int:
        return self.checkpoint.num_layers

    @property
    def num_heads(self) -> int:
        return self.checkpoint.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.checkpoint.num_kv_heads

    @property
    def max_seq_len(self) -> int:
        return int(self.checkpoint.config.max_position_embeddings)

    @cached_property
    def windows(self) -> list[int | None]:
        """Sliding window of each layer."""
        return [window_of(self.checkpoint.config, layer) for layer in range(self.num_layers)]

    @cached_property
    def sparse(self) -> list[bool]:
        """Layers that methods choose for: with RoPE, and without a window that is shorter than the model's length."""
        spec, limit = SparseSpec(dense_layers=()), self.max_seq_len
        return [can_be_sparse(self.checkpoint, spec, i, max_seq_len=limit) for i in range(self.num_layers)]

    @cached_property
    def eos(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        known = ids if isinstance(ids, list) else [ids]
        return frozenset(i for i in (*known, self.tokenizer.eos_token_id) if isinstance(i, int))

    @cached_property
    def _rotaries(self) -> list[Rotary | None]:
        config, limit = self.checkpoint.config, self.max_seq_len
        return [rotary_of(config, layer, max_seq_len=limit) for layer in range(self.num_layers)]

    def rotary(self, layer: int) -> Rotary:
        rotary = self._rotaries[layer]
        assert rotary is not None  # only asked for sparse layers
        return rotary

    def plans(self, spec: SparseSpec) -> list[LayerPlan]:
        if self.profile is None:
            raise FasaError("fasa needs a calibration profile", hint="--profile, of fasa-trt calibrate")
        if spec not in self._plans:
            limit = self.max_seq_len
            self._plans[spec] = plan_layers(self.checkpoint, self.profile, spec, max_seq_len=limit)
        return self._plans[spec]

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before a text (BOS)."""
        return list(self.tokenizer("").input_ids)

    def prompt(self, context: str, question: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt's two parts, the context with the special tokens or the chat template before it."""
        if not self.chat:
            return [*self.prefix, *self.encode(context)], self.encode(question)
        turn = [{"role": "user", "content": f"{context}{SPLIT}{question}"}]
        rendered = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, _, after = str(rendered).partition(SPLIT)
        return self.encode(before), self.encode(after)


def load_eval_model(
    checkpoint: Checkpoint,
    *,
    profile: Profile | None = None,
    device: str = "auto",
    dtype: str = "auto",
    chat: bool = False,
    trust_remote_code: bool = False,
) -> EvalModel:
    """Raises FasaError for a model that does not load or fit, has attention code of its own, or no layer that could be
    sparse; for a profile of another model; and for `chat` without a chat template."""
    if profile is not None:
        profile.check(checkpoint.fingerprint)
    place = resolve_device(device)
    tokenizer: Any = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    if chat and not tokenizer.chat_template:
        raise FasaError(f"{checkpoint.path} has no chat template", hint="leave out --chat")
    precision = resolve_dtype(dtype, place, checkpoint)
    model = load_model(checkpoint, device=place, dtype=precision, trust_remote_code=trust_remote_code)
    if not model.is_backend_compatible():
        raise FasaError(f"{type(model).__name__} does not call transformers' attention interface")
    model.set_attn_implementation(NAME)
    found = EvalModel(checkpoint, model, tokenizer, profile, chat)
    if not any(found.sparse):
        raise FasaError("no layer of this model can be sparse: they have no RoPE or short sliding windows")
    return found
