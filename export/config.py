"""Everything that a build can be told, with defaults; from flags, a JSON file and --set key=value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.contract import MAX_NUM_TOKENS, TOKENS_PER_BLOCK, EngineLimits, least_num_tokens
from fasa_trt.core.errors import FasaError
from fasa_trt.core.labels import LabelKind
from fasa_trt.core.rope import rotary_of
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.architectures import architecture_of
from fasa_trt.export.plan import can_be_sparse
from fasa_trt.export.plugin_limits import DTYPES, check_kernels, default_labels, default_n_tip
from fasa_trt.export.settings import check_settings, parse_setting, read_settings
from fasa_trt.export.tensorrt import MAX_BUDGET, RTX_ARCHITECTURES
from fasa_trt.plugins.library import ARCHITECTURES
from fasa_trt.plugins.plugin_library import missing

# The lowerings that each target can run, the better one first.
LOWERINGS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("standard",),
    "tensorrt-rtx": ("plugin", "standard"),
    "tensorrt": ("plugin",),
    "tensorrt-llm": ("plugin",),
}
TARGETS = tuple(LOWERINGS)
FIXED_CAPACITY_LIMIT = 16384  # default tokens of a cache that is allocated whole
PLUGIN_ONLY = ("max_num_tokens", "tokens_per_block")


@dataclass(frozen=True)
class BuildConfig:
    """Flat, so that every field but the last is one flag, one key of --config and one --set.

    target: where the engine runs. lowering: "standard", attention in ONNX operators with a cache of fixed capacity in
    TensorRT; "plugin", in this project's kernels over a paged cache; "auto" for the plugin where the target can run
    it. dtype: of weights and cache, "auto" for what the target runs best. arch: compute capability, "90" for 9.0, of
    the GPU that the engine is for.
    max_seq_len: tokens of a row, prompt and answer; None for what the model was trained for (a fixed-capacity cache:
    at most 16384). max_batch_size: rows of a batch; None for 8, or 1 with a fixed-capacity cache.
    labels: where the plugin's sparse layers find the labels of tokens (`plugin_limits.py`); "auto" for int4 where that
    is possible, else prefix. max_num_tokens, tokens_per_block: as in `EngineLimits`; None for TensorRT-LLM's defaults,
    8192 and 32. tp_size, pp_size: GPUs; 1 so far.
    notes: what was decided for the user, and why, one sentence each.
    The rest as in `SparseSpec`.
    """

    target: str = "onnxruntime"
    lowering: str = "auto"
    dtype: str = "auto"
    arch: str | None = None
    max_seq_len: int | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    tokens_per_block: int | None = None
    tp_size: int = 1
    pp_size: int = 1
    labels: str = "auto"
    budget: int = 256
    n_tip: int | None = None
    reduction: str = SparseSpec.reduction
    rule: str = "spread"
    sink: int = 4
    recent: int = 32
    dense_layers: tuple[int, ...] = SparseSpec.dense_layers
    notes: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def resolve(
        cls,
        checkpoint: Checkpoint,
        *,
        file: Path | None = None,
        flags: Mapping[str, Any] | None = None,
        settings: Iterable[str] = (),
        default_target: str = "onnxruntime",
        default_arch: str | None = None,
    ) -> BuildConfig:
        """Defaults, overridden by `file`, then by `flags` that are not None, then by `settings` ("key=value"); every
        default that depends on the model filled in and checked. default_arch: of the GPU here; taken where an engine
        for it is possible. Raises FasaError that names the wrong key or value."""
        known = get_type_hints(cls)
        del known["notes"]
        chosen: dict[str, Any] = {"target": default_target}
        if file is not None:
            chosen.update(check_settings(read_settings(file), known))
        chosen.update(check_settings({key: value for key, value in (flags or {}).items() if value is not None}, known))
        for setting in settings:
            chosen.update(check_settings(parse_setting(setting), known))
        config = cls(**chosen)
        if config.arch is None and default_arch in architectures(config.target):
            config = replace(config, arch=default_arch)
        return config._complete(checkpoint)

    @property
    def fixed_capacity(self) -> bool:
        """Whether the cache is allocated whole, as TensorRT needs it in the standard lowering."""
        return self.target != "onnxruntime" and self.lowering == "standard"

    @property
    def spec(self) -> SparseSpec:
        names = {each.name for each in fields(SparseSpec)}
        return SparseSpec.from_json({key: value for key, value in asdict(self).items() if key in names})

    @property
    def limits(self) -> EngineLimits:
        """Of a resolved configuration with the plugin lowering."""
        sizes = (self.max_batch_size, self.max_num_tokens, self.max_seq_len, self.tokens_per_block)
        return EngineLimits(*(size for size in sizes if size is not None))

    @property
    def label_kind(self) -> LabelKind:
        """`labels` of a resolved configuration."""
        return next(kind for kind in get_args(LabelKind) if kind == self.labels)

    def to_json(self) -> dict[str, Any]:
        """The settings, without the notes."""
        content = {**asdict(self), "dense_layers": list(self.dense_layers)}
        del content["notes"]
        return content

    def _complete(self, checkpoint: Checkpoint) -> BuildConfig:
        self._check_choices()
        rotary_of(checkpoint.config, 0)  # both refuse what cannot be exported, before anybody calibrates it
        architecture_of(checkpoint)
        possible = LOWERINGS[self.target]
        if self.lowering != "auto" or len(possible) == 1:
            lowering = possible[0] if self.lowering == "auto" else self.lowering
            return self._with_plugin(checkpoint) if lowering == "plugin" else self._with_standard(checkpoint)
        reason = missing(checkpoint.head_dim, self.arch)
        if reason is None:
            try:
                config = self._with_plugin(checkpoint)
                return config._noting(f"lowering plugin: {self.target} runs it, and its library is here or can be made")
            except FasaError as error:
                reason = str(error)
        return self._with_standard(checkpoint)._noting(f"lowering standard, not plugin: {reason}")

    def _check_choices(self) -> None:
        """What does not depend on the model."""
        if self.target not in TARGETS:
            raise FasaError(f"unknown target {self.target!r}", hint=f"one of {', '.join(TARGETS)}")
        possible = LOWERINGS[self.target]
        if self.lowering not in ("auto", "plugin", "standard"):
            raise FasaError(f"unknown lowering {self.lowering!r}", hint="auto, plugin or standard")
        if self.lowering not in ("auto", *possible):
            raise FasaError(
                f"target {self.target} does not run the {self.lowering} lowering", hint=f"it runs {possible[0]}"
            )
        if self.labels not in ("auto", *get_args(LabelKind)):
            raise FasaError(f"unknown labels {self.labels!r}", hint=f"auto, {', '.join(get_args(LabelKind))}")
        for name, size in (("tp-size", self.tp_size), ("pp-size", self.pp_size)):
            if size != 1:
                raise FasaError(f"{name} {size} is not possible: an engine runs on one GPU", hint=f"--{name} 1")
        known = architectures(self.target)
        if self.arch is not None and self.arch not in known:
            raise FasaError(
                f"{self.target} engines are not made for GPU architecture {self.arch!r}",
                hint=f"one of {', '.join(known)}" if known else "they run on any machine: leave --arch out",
            )

    def _with_standard(self, checkpoint: Checkpoint) -> BuildConfig:
        for name in PLUGIN_ONLY:
            if getattr(self, name) is not None:
                raise FasaError(f"{name} belongs to the plugin lowering", hint="leave it out, or --lowering plugin")
        if self.labels not in ("auto", "prefix"):
            raise FasaError(f"{self.labels} labels belong to the plugin lowering", hint="--labels prefix")
        config = replace(self, lowering="standard", labels="prefix")
        if config.fixed_capacity and self.budget > MAX_BUDGET:
            raise FasaError(f"TensorRT's TopK takes at most {MAX_BUDGET} tokens, not a budget of {self.budget}")
        return config._sized(
            checkpoint,
            dtype="float32" if self.target == "onnxruntime" else checkpoint.dtype,
            most=FIXED_CAPACITY_LIMIT if config.fixed_capacity else None,
            batch=1 if config.fixed_capacity else 8,
        )

    def _with_plugin(self, checkpoint: Checkpoint) -> BuildConfig:
        """Raises FasaError for what the kernels cannot execute."""
        heads, head_dim = checkpoint.num_kv_heads, checkpoint.head_dim
        labels = default_labels(heads, head_dim, self.n_tip) if self.labels == "auto" else self.label_kind
        n_tip = default_n_tip(labels, heads, head_dim) if self.n_tip is None else self.n_tip
        config, dtype = replace(self, lowering="plugin", labels=labels, n_tip=n_tip), checkpoint.dtype
        if dtype not in DTYPES and self.dtype == "auto":
            config, dtype = config._noting(f"dtype bfloat16: the plugin does not compute in {dtype}"), "bfloat16"
        config = config._sized(checkpoint, dtype=dtype, most=None, batch=8)
        assert config.max_seq_len is not None and config.max_batch_size is not None
        block = TOKENS_PER_BLOCK if self.tokens_per_block is None else self.tokens_per_block
        tokens = self.max_num_tokens
        if tokens is None:  # as many as a step of whole prompts can have
            tokens = min(MAX_NUM_TOKENS, config.max_batch_size * config.max_seq_len)
            tokens = max(tokens, least_num_tokens(config.max_batch_size, block))
        length, layers = config.max_seq_len, range(checkpoint.num_layers)
        config = replace(config, max_num_tokens=tokens, tokens_per_block=block)
        sparse = any(can_be_sparse(checkpoint, config.spec, index, max_seq_len=length) for index in layers)
        check_kernels(checkpoint, config.spec, config.limits, dtype=config.dtype, labels=labels, sparse=sparse)
        return config

    def _sized(self, checkpoint: Checkpoint, *, dtype: str, most: int | None, batch: int) -> BuildConfig:
        """With the dtype, the sizes and the sparsity filled in that every lowering needs. dtype, batch: the defaults;
        most: of the default length."""
        trained = int(checkpoint.config.max_position_embeddings)
        length = min(trained, most or trained) if self.max_seq_len is None else self.max_seq_len
        if length < 1:
            raise FasaError(f"max-seq-len must be at least 1, not {length}")
        if length > trained:
            raise FasaError(
                f"max-seq-len {length} is beyond the {trained} positions of this model",
                hint="lower it, or raise max_position_embeddings in its config.json if its RoPE reaches further",
            )
        batch = batch if self.max_batch_size is None else self.max_batch_size
        if batch < 1:
            raise FasaError(f"max-batch-size must be at least 1, not {batch}")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise FasaError(f"unknown dtype {self.dtype!r}", hint="auto, float32, float16 or bfloat16")
        spec = self.spec.resolve(head_dim=checkpoint.head_dim, num_layers=checkpoint.num_layers, max_seq_len=length)
        return replace(
            self,
            dtype=dtype if self.dtype == "auto" else self.dtype,
            max_seq_len=length,
            max_batch_size=batch,
            n_tip=spec.n_tip,
            dense_layers=spec.dense_layers,
        )

    def _noting(self, note: str) -> BuildConfig:
        return replace(self, notes=(*self.notes, note))


def architectures(target: str) -> tuple[str, ...]:
    """GPU architectures that an engine of `target` can be made for; none where it does not matter."""
    return {"onnxruntime": (), "tensorrt-rtx": RTX_ARCHITECTURES}.get(target, ARCHITECTURES)
