"""TensorRT-LLM 1.2's Python modules as far as the runtime calls them.

Calls are checked against the signatures below, which are written down from its sources: `from_dir` of
`tensorrt_llm/runtime/model_runner_cpp.py`; `Request`, `SamplingConfig` and `OutputConfig` of
`cpp/tensorrt_llm/nanobind/executor/request.cpp`; the executor's methods of `.../nanobind/executor/executor.cpp`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fasa_trt.plugins.plugin_library import CREATOR

# Positional names, a bar, and names that must be given by keyword.
SIGNATURES = {
    "from_dir": "engine_dir | lora_dir rank max_batch_size max_input_len max_output_len max_beam_width "
    "max_attention_window_size sink_token_length kv_cache_free_gpu_memory_fraction cross_kv_cache_fraction "
    "medusa_choices eagle_choices eagle_posterior_threshold eagle_use_dynamic_tree eagle_dynamic_tree_max_top_k "
    "lookahead_config debug_mode lora_ckpt_source use_gpu_direct_storage gpu_weights_percent "
    "max_tokens_in_paged_kv_cache kv_cache_enable_block_reuse enable_chunked_context is_enc_dec multi_block_mode "
    "enable_context_fmha_fp32_acc cuda_graph_mode logits_processor_map device_ids is_orchestrator_mode "
    "use_runtime_defaults gather_generation_logits use_variable_beam_width_search mm_embedding_offloading",
    "Request": "input_token_ids max_tokens | streaming sampling_config output_config end_id pad_id position_ids "
    "bad_words stop_words embedding_bias external_draft_tokens_config prompt_tuning_config multimodal_input "
    "multimodal_embedding mrope_config lora_config lookahead_config kv_cache_retention_config "
    "logits_post_processor_name logits_post_processor",
    "SamplingConfig": "beam_width | top_k top_p top_p_min top_p_reset_ids top_p_decay seed temperature min_tokens "
    "beam_search_diversity_rate repetition_penalty presence_penalty frequency_penalty length_penalty early_stopping "
    "no_repeat_ngram_size num_return_sequences min_p beam_width_array",
    "OutputConfig": "return_log_probs return_context_logits return_generation_logits exclude_input_from_output "
    "return_encoder_output return_perf_metrics additional_model_outputs |",
    "enqueue_request": "request |",
    "await_responses": "timeout |",
    "cancel_request": "id |",
}


def bound(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name. Raises TypeError for what the real function would not take."""
    positional, _, others = (part.split() for part in SIGNATURES[name].partition("|"))
    if len(arguments) > len(positional):
        raise TypeError(f"{name} takes {len(positional)} positional arguments")
    given = dict(zip(positional, arguments, strict=False))
    for key, value in keywords.items():
        if key in given or key not in (*positional, *others):
            raise TypeError(f"{name} got an unexpected argument {key}")
        given[key] = value
    return given


class Executor:
    """Answers each request with what `answer` says, a token a response and request. fail: methods that raise."""

    def __init__(self, answer: Callable[[dict[str, Any]], list[int]]) -> None:
        self.answer = answer
        self.requests: dict[int, dict[str, Any]] = {}
        self.cancelled: list[int] = []
        self.fail: set[str] = set()
        self.extra: deque[Any] = deque()
        self._left: dict[int, list[int]] = {}

    def enqueue_request(self, *arguments: Any, **keywords: Any) -> int:
        request = bound("enqueue_request", arguments, keywords)["request"]
        if "enqueue_request" in self.fail:
            raise RuntimeError("Prompt length exceeds maximum input length.\nmore")
        number = 100 + len(self.requests)
        self.requests[number], self._left[number] = request, self.answer(request)
        return number

    def cancel_request(self, *arguments: Any, **keywords: Any) -> None:
        number = bound("cancel_request", arguments, keywords)["id"]
        self.cancelled.append(number)
        self._left.pop(number)

    def await_responses(self, *arguments: Any, **keywords: Any) -> list[Any]:
        assert bound("await_responses", arguments, keywords)["timeout"].total_seconds() > 0
        if "await_responses" in self.fail:
            raise RuntimeError("Executor is shut down")
        responses = [self.extra.popleft()] if self.extra else []
        for number, tokens in list(self._left.items()):
            responses.append(response(number, tokens[:1], final=len(tokens) == 1))
            self._left[number] = tokens[1:]
            if len(tokens) == 1:
                del self._left[number]
        return responses


def response(number: int, tokens: list[int], *, final: bool = False, error: str = "", reason: str = "LENGTH") -> Any:
    result = SimpleNamespace(output_token_ids=[tokens], is_final=final, finish_reasons=[f"FinishReason.{reason}"])
    return SimpleNamespace(request_id=number, has_error=lambda: bool(error), error_msg=error, result=result)


class FakeTensorRTLLM:
    """calls: what happened, in order. load: what `from_dir` raises."""

    def __init__(self, answer: Callable[[dict[str, Any]], list[int]], *, ranks: int = 1) -> None:
        self.executor, self.ranks = Executor(answer), ranks
        self.calls: list[tuple[str, Any]] = []
        self.load: Exception | None = None
        self.creators: set[tuple[str, ...]] = set()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trtllm, runtime, trt = (ModuleType(name) for name in ("tensorrt_llm", "tensorrt_llm.runtime", "tensorrt"))
        contents: dict[ModuleType, dict[str, Any]] = {
            trtllm: {
                "__version__": "1.2.1",
                "mpi_rank": lambda: 0,
                "mpi_world_size": lambda: self.ranks,
                "bindings": SimpleNamespace(
                    executor=SimpleNamespace(
                        **{
                            name: lambda *a, _name=name, **k: bound(_name, a, k)
                            for name in ("Request", "SamplingConfig", "OutputConfig")
                        }
                    )
                ),
            },
            runtime: {"ModelRunnerCpp": SimpleNamespace(from_dir=self.from_dir)},
            trt: {"get_plugin_registry": lambda: self},
        }
        for module, content in contents.items():
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def from_dir(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls.append(("from_dir", bound("from_dir", arguments, keywords)))
        if self.load is not None:
            raise self.load
        return SimpleNamespace(executor=self.executor)

    def get_creator(self, *names: str) -> Any:
        return names if names in self.creators else None

    def load_library(self, path: str) -> Any:
        self.calls.append(("load_library", path))
        self.creators.add(CREATOR)
        return path
