"""Plugin engines in TensorRT or TensorRT for RTX: packed in-flight batching over a paged KV cache, on one GPU.

Each step writes its inputs at fixed addresses, runs the engine, as a CUDA graph when all rows decode, and waits once,
for the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fasa_trt.core.contract import EngineLimits, padded_vocab
from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.bindings import StepBindings
from fasa_trt.runtime.blocks import BlockAllocator
from fasa_trt.runtime.cuda_graphs import DecodeGraphs
from fasa_trt.runtime.device_memory import Device
from fasa_trt.runtime.device_sampling import Sampler, new_sampler
from fasa_trt.runtime.kv_pool import KvPool, PoolLayout, allocate_pool
from fasa_trt.runtime.paged import PagedBatcher
from fasa_trt.runtime.sampling import Draw
from fasa_trt.runtime.scheduler import Limits, Scheduler
from fasa_trt.runtime.step import Step
from fasa_trt.runtime.tensorrt_engine import Plan, load_plan


class TensorRTRunner:
    """Computes steps; a `paged.Runner`."""

    def __init__(
        self, plan: Plan, device: Device, bindings: StepBindings, graphs: DecodeGraphs, sampler: Sampler
    ) -> None:
        self.plan, self.device, self.bindings, self.graphs, self.sampler = plan, device, bindings, graphs, sampler
        self._context = plan.new_context(bindings.addresses())

    def run(self, step: Step, draws: Sequence[Draw]) -> list[int]:
        rows = len(step.requests)
        decode = step.num_context_rows == 0 and not self.graphs.off
        size = self.graphs.padded(rows) if decode else rows
        self.bindings.write(step, size)
        if decode:
            self.graphs.run(size, lambda: self.plan.new_context(self.bindings.addresses()), self._enqueue)
        else:
            self._enqueue(self._context)
        return self.sampler(step.logit_rows, draws)

    def _enqueue(self, context: Any) -> None:
        self.plan.enqueue(context, self.bindings.shapes, self.device.stream)


class TensorRTBackend:
    """A `Backend`. Its one batcher lives as long as it, so that prompts find the prefixes of earlier ones."""

    def __init__(self, directory: EngineDirectory, runner: TensorRTRunner, pool: KvPool, scheduler: Scheduler) -> None:
        self.max_seq_len, self.max_batch_size = directory.max_seq_len, directory.max_batch_size
        self.runner, self.pool = runner, pool
        self._target = directory.target
        self._batcher = PagedBatcher(scheduler, runner)

    def batcher(self, rows: int | None = None) -> PagedBatcher:
        """Steps take as many rows as there are, so `rows` says nothing new."""
        return self._batcher

    def describe(self) -> dict[str, Any]:
        plan, graphs = self.runner.plan, self.runner.graphs
        return {
            "backend": self._target,
            "version": plan.trt.__version__,
            "plugin": plan.plugin,
            "cache_bytes": self.pool.num_bytes,
            "cache_tokens": self.pool.num_blocks * self._batcher.scheduler.allocator.tokens_per_block,
            "cuda_graphs": f"off: {graphs.off}" if graphs.off else f"{len(graphs)} batch sizes captured",
            "sampling": self.runner.sampler.name,
        }

    def close(self) -> None:
        """Gives the GPU memory back; the backend is of no use afterwards."""
        self.runner.device.close()


def load_tensorrt(directory: EngineDirectory, *, kv_fraction: float = 0.9) -> TensorRTBackend:
    """kv_fraction: share of the GPU memory left beside the engine that the KV cache may take, as far as all rows of a
    full batch can use it. Raises FasaError when this machine cannot run the engine, or has too little memory for one
    sequence of max_seq_len tokens."""
    if not 0 < kv_fraction <= 1:
        raise FasaError(f"kv-fraction {kv_fraction} is out of range", hint="above 0, at most 1")
    layout, limits = PoolLayout.of(directory.config), _limits(directory)
    vocab = int(directory.config["pretrained_config"]["vocab_size"])
    device = Device()
    try:
        plan = load_plan(directory, device)
        num_blocks = _num_blocks(layout, limits, int(device.free_bytes * kv_fraction))
        pool = allocate_pool(device, layout, num_blocks)
        bindings = StepBindings(device, limits, layout, pool, padded_vocab(vocab))
        sampler = new_sampler(device, bindings.logits, (limits.max_batch_size, padded_vocab(vocab)))
        graphs = DecodeGraphs(device, limits.max_batch_size)
        runner = TensorRTRunner(plan, device, bindings, graphs, sampler)
    except BaseException:
        device.close()
        raise
    allocator = BlockAllocator(num_blocks, limits.tokens_per_block, layers_in_pool=layout.layers_in_pool)
    sizes = Limits(limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len, vocab)
    return TensorRTBackend(directory, runner, pool, Scheduler(sizes, allocator))


def _limits(directory: EngineDirectory) -> EngineLimits:
    build = directory.config["build_config"]
    try:
        return EngineLimits(
            directory.max_batch_size,
            int(build["max_num_tokens"]),
            directory.max_seq_len,
            int(build["plugin_config"]["tokens_per_block"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FasaError(f"config.json lacks an engine's limits: {error}", hint="build the engine again") from None


def _num_blocks(layout: PoolLayout, limits: EngineLimits, size: int) -> int:
    """As many blocks as `size` bytes hold, and as a full batch needs at most."""
    found = min(layout.blocks_within(size), limits.max_batch_size * limits.max_blocks)
    if found < limits.max_blocks:
        needed = (limits.max_blocks + 1) * layout.bytes_per_block
        raise FasaError(
            f"a KV cache for one sequence of {limits.max_seq_len} tokens takes {needed / 2**20:.0f} MiB, "
            f"{size / 2**20:.0f} MiB of the GPU are left for it",
            hint="end other programs on this GPU, raise --kv-fraction, or build with a smaller --max-seq-len",
        )
    return found
