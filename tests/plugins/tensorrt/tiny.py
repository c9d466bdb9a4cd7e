"""The sample model with all its attention in the plugin and the rest in torch, token for token beside other
executions: transformers where the budget covers the sequences, else the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fasa_trt.core.reference import Array
from fasa_trt.core.rope import rotary_of
from tests.plugins.tensorrt import expected
from tests.plugins.tensorrt.driver import Driver, Layer
from tests.plugins.tensorrt.layers import SPARSE
from tests.plugins.tensorrt.pools import Step
from tests.plugins.tensorrt.serving import Serving, Tables, require

MODEL = Path(__file__).resolve().parents[3] / "examples" / "models" / "fasa-tiny"
PROMPTS: Mapping[str, str] = {
    "a": "# note brick = 40817\nimport os\n\n\ndef size(path):\n    return os.stat(path).st_size\n\n\n"
    "def total(paths):\n    result = 0\n    for path in paths:\n        result += size(path)\n    return result\n\n\n"
    "# recall brick = ",
    "b": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        ",
    "c": "# note lamp = 92653\nx = 1\n# recall lamp = ",
}
ANSWER = 32  # tokens
# Steps: the end of each chunk of a prompt (None: its own), then the generating sequences.
STEPS: Sequence[tuple[Mapping[str, int | None], str]] = (
    ({"a": 48}, ""),
    ({"a": None, "b": None}, ""),
    ({"c": None}, "ba"),
    *[({}, "cab")] * ANSWER,
)
CLOSE = 0.3  # by which logits may fall short of the reference's largest, where another token is chosen
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@cache
def model() -> tuple[Any, Any]:
    """The tokenizer and, in float32, the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    return tokenizer, AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()


@dataclass
class Network:
    """The model around its attention, over packed tokens. dims: the source of each baked dim of queries and keys, by
    layer, [kv_heads, head_dim]."""

    model: Any
    dims: Sequence[Array]

    def logits(self, tokens: Sequence[int], attend: Attend) -> Tensor:
        """float32 [tokens, vocabulary], on the host. attend: takes layer, q, k and v [tokens, heads, head_dim]."""
        inner = self.model.model
        x = inner.embed_tokens(torch.tensor(tokens, device=inner.embed_tokens.weight.device))
        for index, layer in enumerate(inner.layers):
            normed, attention = layer.input_layernorm(x), layer.self_attn
            q, k, v = (
                project(normed).view(len(tokens), -1, attention.head_dim)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            dims = torch.from_numpy(self.dims[index]).to(x.device)
            q, k = (heads.gather(2, self._sources(dims, heads)) for heads in (q, k))
            x = x + attention.o_proj(attend(index, q, k, v).flatten(1).to(x.dtype))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits: Tensor = self.model.lm_head(inner.norm(x))
        return logits.float().cpu()

    @staticmethod
    def _sources(dims: Tensor, heads: Tensor) -> Tensor:
        return dims.repeat_interleave(heads.shape[1] // len(dims), dim=0).expand(heads.shape)


class Attention(Protocol):
    def step(self, contexts: Mapping[str, int], generating: str) -> Step: ...

    def attend(self, step: Step, index: int, qkv: Sequence[Tensor]) -> Tensor: ...


class Reference:
    """Attention in float64 over caches of its own, which hold what the dtype of the pool can hold."""

    def __init__(self, layers: Sequence[Layer], tables: Sequence[Tables], dtype: torch.dtype) -> None:
        self.layers, self.tables, self.dtype = layers, tables, dtype
        self.cached: dict[tuple[str, int], tuple[Array, Array]] = {}

    def step(self, contexts: Mapping[str, int], generating: str) -> Step:
        counts = [*contexts.values(), *[1] * len(generating)]
        return Step([*contexts, *generating], counts, len(contexts), [])

    def attend(self, step: Step, index: int, qkv: Sequence[Tensor]) -> Tensor:
        layer, outs, first = self.layers[index], [], 0
        for row, (name, count) in enumerate(zip(step.names, step.counts, strict=True)):
            q, k, v = (x[first : first + count].to(self.dtype) for x in qkv)
            first += count
            empty = np.empty((0, *k.shape[1:]))
            keys, values = self.cached.get((name, index), (empty, empty))
            turned, new = (
                expected.rounded(expected.rotated(x, None, len(keys), 0.0, self.tables[index]), self.dtype)
                for x in (q, k)
            )
            keys, values = np.concatenate([keys, new]), np.concatenate([values, v.double().numpy()])
            self.cached[name, index] = keys, values
            labels = keys[..., : 2 * int(layer["n_tip"])]
            if layer["label_kind"]:
                labels = expected.label_values(layer, *expected.quantised(layer, keys))
            out, _ = expected.attention(layer, turned, keys, values, labels, generates=row >= step.contexts)
            outs.append(torch.from_numpy(out))
        return torch.cat(outs)


@dataclass
class Answers:
    """Tokens and, for the choice of each, the logits, by sequence."""

    tokens: dict[str, list[int]]
    logits: dict[str, list[Tensor]]


def answer(network: Network, attention: Attention, given: Answers | None = None) -> Answers:
    """Runs STEPS. Feeds the tokens of other answers where they are given, else its own."""
    prompts = {name: model()[0].encode(text) for name, text in PROMPTS.items()}
    done, answers = dict.fromkeys(prompts, 0), Answers({name: [] for name in prompts}, {name: [] for name in prompts})
    fed = (given or answers).tokens
    for ends, generating in STEPS:
        chunks = {name: prompts[name][done[name] : end] for name, end in ends.items()}
        for name, chunk in chunks.items():
            done[name] += len(chunk)
        chunks |= {name: [fed[name][len(answers.tokens[name]) - 1]] for name in generating}
        step = attention.step({name: len(chunks[name]) for name in ends}, generating)
        tokens = [token for name in step.names for token in chunks[name]]

        def attend(index: int, *qkv: Tensor, step: Step = step) -> Tensor:
            return attention.attend(step, index, qkv)

        logits = network.logits(tokens, attend)
        last = np.cumsum(step.counts) - 1
        for name, row in zip(step.names, last.tolist(), strict=True):
            if done[name] == len(prompts[name]):
                answers.tokens[name].append(int(logits[row].argmax()))
                answers.logits[name].append(logits[row])
    return answers


@cache
@torch.no_grad()
def by_transformers() -> Answers:
    """Greedy, dense, without a cache: as many tokens of each sequence as STEPS make."""
    tokenizer, whole = model()
    answers = Answers({}, {})
    for name, text in PROMPTS.items():
        tokens, logits = tokenizer.encode(text), []
        first, count = len(tokens), sum(name in generating for _, generating in STEPS) + 1
        for _ in range(count):
            logits.append(whole(torch.tensor([tokens])).logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
        answers.tokens[name], answers.logits[name] = tokens[first:], logits
    return answers


def compare(got: Answers, wanted: Answers) -> dict[str, Any]:
    """Raises AssertionError where a token differs that the other execution does not hold for nearly as good."""
    different, shortfall = 0, 0.0
    for name, tokens in wanted.tokens.items():
        require(len(got.tokens[name]) == len(tokens), f"sequence {name} has another number of tokens")
        for at, (mine, theirs) in enumerate(zip(got.tokens[name], tokens, strict=True)):
            short = float(wanted.logits[name][at][theirs] - wanted.logits[name][at][mine])
            require(short < CLOSE, f"sequence {name}, token {at}: {mine}, not {theirs}, which leads by {short:.2f}")
            different, shortfall = different + (mine != theirs), max(shortfall, short)
    return {"tokens": sum(map(len, wanted.tokens.values())), "different": different, "shortfall": round(shortfall, 3)}


def layers_of(budget: int, kind: int, n_tip: int) -> list[Layer]:
    config = model()[1].config
    layer: Layer = {
        **SPARSE, "num_q_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "scale": config.head_dim**-0.5, "label_kind": kind, "n_tip": n_tip,
        "budget": budget,
    }  # fmt: skip
    return [layer] * config.num_hidden_layers


def orders() -> list[Array]:
    """Frequency chunks of each layer and KV head, [kv_heads, chunks], in an order that is drawn: the slow ones, which
    tell contents apart, tend to come first."""
    config, random = model()[1].config, np.random.default_rng(0)
    chunks = config.head_dim // 2
    shape = (config.num_hidden_layers, config.num_key_value_heads, chunks)
    return list(np.argsort(-np.arange(chunks) + random.normal(0, 12, shape), axis=-1))


@torch.no_grad()
def run(driver: Driver, dtype: torch.dtype, device: str, *, budget: int, kind: int, n_tip: int) -> dict[str, Any]:
    (tokenizer, whole), layers, chosen = model(), layers_of(budget, kind, n_tip), orders()
    rotary = rotary_of(whole.config, 0)
    assert rotary is not None
    tables = [(rotary.inv_freq[order], rotary.scale[order]) for order in chosen]
    dims = [rotary.pairs[order].reshape(len(order), -1) for order in chosen]
    longest = max(len(tokenizer.encode(text)) for text in PROMPTS.values()) + ANSWER
    dense = budget > longest
    wanted = by_transformers() if dense else answer(Network(whole, dims), Reference(layers, tables, dtype))
    mapping = [(0, index) for index in range(len(layers))]
    serving = Serving(driver, layers, mapping, tables, dtype=dtype, device=device, layers_of_pool=len(layers))
    network = Network(copy.deepcopy(whole).to(device, dtype), dims)
    found = compare(answer(network, serving, wanted), wanted)
    clear = float(np.mean(serving.choices)) if serving.choices else None
    return {**found, "choices": len(serving.choices), "clear": clear, "worst": round(serving.worst, 4)}


def case(**settings: int) -> Callable[[Driver, torch.dtype, str], dict[str, Any]]:
    return lambda driver, dtype, device: run(driver, dtype, device, **settings)


CASES = {
    "dense": case(budget=512, kind=0, n_tip=24),
    "prefix": case(budget=48, kind=0, n_tip=24),
    "int4": case(budget=48, kind=1, n_tip=32),
    "int8": case(budget=48, kind=2, n_tip=32),
    "fp8": case(budget=48, kind=3, n_tip=32),
}
