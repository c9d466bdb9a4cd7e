"""Options that several verbs have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fasa_trt.core.spec import SparseSpec

SPARSITY, LIMITS, CALIBRATION = "Sparsity", "Engine", "Calibration"

Model = Annotated[str, typer.Option("--model", "-m", help="Checkpoint directory or Hugging Face model ID.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model ID's own Python code run. Off unless you say so.")
]
Target = Annotated[
    str | None,
    typer.Option(
        help="onnxruntime | tensorrt-rtx | tensorrt | tensorrt-llm. Default: the best one that runs here.",
        rich_help_panel=LIMITS,
    ),
]
Lowering = Annotated[
    str | None,
    typer.Option(
        help="auto | plugin (this project's kernels, paged cache) | standard (ONNX operators). "
        "auto: plugin for tensorrt and tensorrt-llm, for tensorrt-rtx where its library is or can be made.",
        rich_help_panel=LIMITS,
        show_default="auto",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        help="Compute capability of the GPU that it is for, without the dot: 89, 90.",
        rich_help_panel=LIMITS,
        show_default="of the GPU here",
    ),
]
MaxNumTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of all sequences in a step; plugin lowering.", rich_help_panel=LIMITS, show_default="8192"
    ),
]
TokensPerBlock = Annotated[
    int | None,
    typer.Option(help="Tokens of a block of the paged cache.", rich_help_panel=LIMITS, show_default="32"),
]
TpSize = Annotated[
    int | None, typer.Option(help="GPUs for tensor parallelism: 1.", rich_help_panel=LIMITS, show_default="1")
]
PpSize = Annotated[
    int | None, typer.Option(help="GPUs for pipeline parallelism: 1.", rich_help_panel=LIMITS, show_default="1")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="auto | float32 | float16 | bfloat16. auto: float32 for onnxruntime, the checkpoint's own for TensorRT.",
        rich_help_panel=LIMITS,
    ),
]
MaxSeqLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens a sequence may reach, prompt and answer.", rich_help_panel=LIMITS, show_default="model's"
    ),
]
MaxBatchSize = Annotated[
    int | None,
    typer.Option(help="Sequences that may run at once.", rich_help_panel=LIMITS, show_default="8; standard TensorRT 1"),
]
Budget = Annotated[
    int | None,
    typer.Option(help="Tokens each KV head attends to in a decode step.", rich_help_panel=SPARSITY, show_default="256"),
]
NTip = Annotated[
    int | None,
    typer.Option(
        "--n-tip",
        help="Dominant frequency chunks that predict importance.",
        rich_help_panel=SPARSITY,
        show_default="3/8 of them: 24 for head_dim 128; quantised labels 1/2",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="What the plugin scores tokens by: auto | prefix (of the keys) | int4 | int8 | fp8 (a quantised copy).",
        rich_help_panel=SPARSITY,
        show_default="auto: int4 where possible",
    ),
]
Reduction = Annotated[
    str | None,
    typer.Option(
        help="How a group's query heads share a token set: sum | mean_softmax | max_softmax | sampled_softmax "
        "(mean_softmax with estimated normalisers) | per_head (the paper's).",
        rich_help_panel=SPARSITY,
        show_default=SparseSpec.reduction,
    ),
]
Rule = Annotated[
    str | None,
    typer.Option(
        help="How chunks are ranked: spread | agreement (the paper's) | greedy (needs calibrate --greedy).",
        rich_help_panel=SPARSITY,
        show_default="spread",
    ),
]
Sink = Annotated[
    int | None, typer.Option(help="First tokens always attended.", rich_help_panel=SPARSITY, show_default="4")
]
Recent = Annotated[
    int | None, typer.Option(help="Last tokens always attended.", rich_help_panel=SPARSITY, show_default="32")
]
DenseLayers = Annotated[
    str | None,
    typer.Option(
        help="Layers that attend to everything, like 0,1, or none.", rich_help_panel=SPARSITY, show_default="0"
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help='JSON file with any of these settings, like {"budget": 512}.')
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, stronger than flags and --config; repeatable.")
]

Threads = Annotated[int | None, typer.Option(help="onnxruntime: CPU threads.", show_default="all cores")]
Provider = Annotated[str | None, typer.Option(help="onnxruntime: cpu | cuda", show_default="cuda where present")]
KvFraction = Annotated[
    float | None, typer.Option(help="TensorRT: share of the free GPU memory for the KV cache.", show_default="0.9")
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the manifest's checksums.")]
