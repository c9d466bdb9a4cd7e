"""In-flight batching through the plugin, with every step checked: what it writes into the pool, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasa_trt.core.reference import Array
from tests.plugins.checks import CLEAR, ROUNDING, TOLERANCE
from tests.plugins.tensorrt import expected
from tests.plugins.tensorrt.driver import BF16, HALF, RUNTIME, Driver, Layer, Plugin, Tensors
from tests.plugins.tensorrt.layers import tensors
from tests.plugins.tensorrt.pools import MAX_BLOCKS, Pools, Step

Tables = tuple[Array, Array]  # float32 [kv_heads, head_dim / 2]: radians per position, factor on cos and sin


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


@dataclass
class Call:
    """One layer of one step, ready to run. Its tensors stay where they are, so that it can be captured."""

    plugin: Plugin
    given: Tensors
    inputs: list[Tensor]
    out: Tensor
    workspace: Tensor

    def launch(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream if self.out.is_cuda else None
        pointers = [x.data_ptr() for x in self.inputs]
        failed = self.plugin.enqueue(self.given, pointers, self.out.data_ptr(), self.workspace.data_ptr(), stream)
        require(failed == 0, "enqueue failed; stderr says why")

    def rotated_q(self) -> Tensor:
        """[tokens, heads, head_dim]: what the plugin keeps in the front of its workspace."""
        return self.workspace[: self.out.nbytes].view(self.out.dtype).view(self.out.shape)


class Serving:
    """The plugin's layers over pools. `tables`: rotation of each layer."""

    def __init__(
        self,
        driver: Driver,
        layers: Sequence[Layer],
        mapping: Sequence[tuple[int, int]],
        tables: Sequence[Tables],
        *,
        dtype: torch.dtype,
        device: str,
        layers_of_pool: int = 2,
    ) -> None:
        self.layers, self.tables, self.dtype, self.device = layers, tables, dtype, device
        self.pools = Pools(layers, mapping, layers_of_pool=layers_of_pool, dtype=dtype, device=device)
        self.heads, self.kv_heads, self.head_dim = (
            int(layers[0][name]) for name in ("num_q_heads", "num_kv_heads", "head_dim")
        )
        self.kind = BF16 if dtype == torch.bfloat16 else HALF
        self.driver = driver
        self.plugins = [
            self._plugin({**layer, "layer_index": index, "num_layers": layers_of_pool})
            for index, layer in enumerate(layers)
        ]
        self.choices: list[bool] = []  # of budget tokens: whether clear
        self.worst = 0.0  # error of an output, in units of TOLERANCE
        self._known: dict[tuple[str, int], tuple[Array, Array]] = {}  # keys and values after the last step

    def _plugin(self, layer: Layer) -> Plugin:
        plugin = self.driver.create(layer, RUNTIME)
        if plugin is None:
            raise AssertionError("the creator refuses the layer; stderr says why")
        return plugin.attach()

    def leave(self, name: str) -> None:
        self.pools.leave(name)
        self._known = {key: value for key, value in self._known.items() if key[0] != name}

    def step(self, contexts: Mapping[str, int], generating: str) -> Step:
        """Tokens of each context sequence, then the names of the generating ones."""
        counts = [*contexts.values(), *[1] * len(generating)]
        return self.pools.step([*contexts, *generating], counts, len(contexts))

    def call(self, step: Step, index: int, qkv: Sequence[Tensor], norms: Sequence[Tensor]) -> Call:
        """qkv: [tokens, heads, head_dim] each. norms: none, or [heads, head_dim] of queries and of keys."""
        layer, plugin, total = self.layers[index], self.plugins[index], sum(step.counts)
        given = tensors(
            layer, tokens=total, seqs=len(step.names), pools=len(self.pools.data), max_blocks=MAX_BLOCKS,
            layers=len(self.layers), dtype=self.kind,
        )  # fmt: skip
        tables = [torch.from_numpy(table) for table in self.tables[index]]
        moved = [x.to(self.device, copy=True) for x in (*qkv, *tables)] + [*step.bindings]
        require(plugin.call("change_shapes", given) == 0, "onShapeChange failed; stderr says why")
        return Call(
            plugin,
            given,
            moved + [x.to(self.device) for x in norms],
            torch.full((total, self.heads, self.head_dim), float("nan"), dtype=self.dtype, device=self.device),
            torch.empty(plugin.call("workspace", given), dtype=torch.uint8, device=self.device),
        )

    def attend(self, step: Step, index: int, qkv: Sequence[Tensor], norms: Sequence[Tensor] = ()) -> Tensor:
        """Runs a layer, checks it and returns its output [tokens, heads, head_dim]."""
        call = self.call(step, index, qkv, norms)
        call.launch()
        self.check(step, index, call, qkv, norms)
        return call.out

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        """A CUDA graph of the calls, which are not run yet. On the host, the calls themselves."""
        if self.device == "cuda":
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                for call in calls:
                    call.launch()
            return graph.replay

        def replay() -> None:
            for call in calls:
                call.launch()

        return replay

    def check(self, step: Step, index: int, call: Call, qkv: Sequence[Tensor], norms: Sequence[Tensor]) -> None:
        """Raises AssertionError where the pool or the output is not what it should be."""
        got, turned = (x.double().cpu().numpy() for x in (call.out, call.rotated_q()))
        layer, first = self.layers[index], 0
        eps, (q_norm, k_norm) = float(layer["norm_eps"]), norms or (None, None)
        for row, (name, count) in enumerate(zip(step.names, step.counts, strict=True)):
            mine, where = slice(first, first + count), f"layer {index}, sequence {name}"
            q, k, v = (x[mine].cpu() for x in qkv)
            keys, values = self.pools.cached(index, name)
            past = len(keys) - count
            for what, new, norm, found in (("q", q, q_norm, turned[mine]), ("k", k, k_norm, keys[past:])):
                wanted = expected.rotated(new, norm, past, eps, self.tables[index])
                most = np.abs(wanted).max(axis=-1, keepdims=True)
                roundings = 2 if norm is None else 6  # half units; a norm rounds twice before, and may do so otherwise
                close = bool((np.abs(found - wanted) <= roundings * ROUNDING[self.dtype] * most).all())  # NaN is not
                require(close, f"{where}: {what} is not rotated as it should be")
            require(np.array_equal(values[past:], v.double().numpy()), f"{where}: values are not cached as they came")
            old = self._known.get((name, index), (keys[:0], values[:0]))
            kept = np.array_equal(old[0], keys[:past]) and np.array_equal(old[1], values[:past])
            require(kept, f"{where}: what was cached before has changed")
            self._known[name, index] = keys, values
            labels = self._labels(index, name, keys, where)
            wanted, margins = expected.attention(
                layer, turned[mine], keys, values, labels, generates=row >= step.contexts
            )
            self.choices += (margins[~np.isnan(margins)] > CLEAR).tolist()
            clear = np.repeat(~(margins <= CLEAR), self.heads // self.kv_heads, axis=1)
            self._compare(got[mine], wanted, clear, where)
            first += count

    def _labels(self, index: int, name: str, keys: Array, where: str) -> Array:
        """The values of the stored labels, once they are known to be right; of the keys without any."""
        layer = self.layers[index]
        if not layer["label_kind"]:
            return keys[..., : 2 * int(layer["n_tip"])]
        rows, scales = self.pools.labels(index, name)
        used = self.kv_heads * expected.label_width(layer)
        codes = rows[:, :used].reshape(len(rows), self.kv_heads, -1)
        wanted, wanted_scales = expected.quantised(layer, keys)
        require(np.array_equal(codes, wanted), f"{where}: labels are not those of the keys")
        if layer["label_kind"] != expected.FP8:
            require(np.array_equal(scales, wanted_scales), f"{where}: label scales are not those of the keys")
        return expected.label_values(layer, codes, scales)

    def _compare(self, got: Array, wanted: Array, clear: Array, where: str) -> None:
        """clear: bool [tokens, heads], the outputs that are told apart."""
        require(bool(np.isfinite(got).all()), f"{where}: output that is not finite")
        if not clear.any():
            return
        got, wanted = got[clear], wanted[clear]
        error = np.abs(got - wanted) - ROUNDING[self.dtype] * np.abs(wanted)
        worst = float((error.max(axis=-1) / np.abs(wanted).max(axis=-1)).max()) / TOLERANCE[self.dtype]
        self.worst = max(self.worst, worst)
        require(worst <= 1, f"{where}: output off by {worst:.2f} times the tolerance")
