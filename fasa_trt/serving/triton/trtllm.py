"""Configurations of the five models of TensorRT-LLM's `inflight_batcher_llm` layout, for TensorRT-LLM 1.2.x.

Models, tensors and parameters have the names of TensorRT-LLM's own templates
(https://github.com/NVIDIA/TensorRT-LLM/tree/v1.2.0/triton_backend/all_models/inflight_batcher_llm), so that its clients
work unchanged. Left out is what an engine of this project refuses: beam search, LoRA, draft tokens, encoders and
prompt tables; with them go the templates' variables for the latter two's data types.
"""

from __future__ import annotations

from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.serving.triton import model_config as mc
from fasa_trt.serving.triton.model_config import DataType, Input, ModelConfig, Output, Parameter
from fasa_trt.serving.triton.options import RepositoryOptions

PREPROCESSING, TENSORRT_LLM, POSTPROCESSING = "preprocessing", "tensorrt_llm", "postprocessing"
ENSEMBLE, BLS = "ensemble", "tensorrt_llm_bls"
QUEUE_DELAY = 0  # microseconds: TensorRT-LLM batches in flight, waiting for company gains nothing
WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"  # where NVIDIA's containers have it
FLAT = mc.Shape()
LOGITS = {"float32": DataType.FP32, "float16": DataType.FP16}

# The client's name of an option, the engine model's, and its type. All have one value a request.
SAMPLING = (
    ("temperature", "temperature", DataType.FP32),
    ("top_k", "runtime_top_k", DataType.INT32),
    ("top_p", "runtime_top_p", DataType.FP32),
    ("repetition_penalty", "repetition_penalty", DataType.FP32),
    ("presence_penalty", "presence_penalty", DataType.FP32),
    ("frequency_penalty", "frequency_penalty", DataType.FP32),
    ("min_tokens", "min_tokens", DataType.INT32),
    ("seed", "seed", DataType.UINT64),
    ("return_log_probs", "return_log_probs", DataType.BOOL),
    ("return_context_logits", "return_context_logits", DataType.BOOL),
    ("return_generation_logits", "return_generation_logits", DataType.BOOL),
    ("exclude_input_in_output", "exclude_input_in_output", DataType.BOOL),
    ("stream", "streaming", DataType.BOOL),
)


def trtllm_configs(engine: EngineDirectory, engine_dir: str, options: RepositoryOptions) -> list[ModelConfig]:
    """engine_dir: absolute path that the server will find the engine under. Raises FasaError for options that
    TensorRT-LLM's backend has no counterpart of."""
    if options.threads is not None:
        raise FasaError("threads is for onnxruntime engines", hint="leave it out")
    if len(options.gpus) > 1:
        raise FasaError("a tensorrt_llm model runs on one GPU", hint="start a server for each GPU, with --gpus 0, 1, …")
    batch = engine.max_batch_size
    queue = mc.DynamicBatching((batch,), QUEUE_DELAY, mc.QueuePolicy(options.max_requests))
    tokenizers = (mc.InstanceGroup(options.instances, mc.Kind.CPU),)
    eos = [int(token) for token in engine.fasa.get("eos_token_ids", ())]
    streaming = mc.TransactionPolicy(decoupled=options.streaming)
    logits = LOGITS[str(engine.config["pretrained_config"].get("logits_dtype", "float32"))]
    return [
        ModelConfig(
            PREPROCESSING,
            backend="python",
            max_batch_size=batch,
            input=(
                Input("QUERY", DataType.STRING),
                Input("REQUEST_OUTPUT_LEN", DataType.INT32),
                Input("STOP_WORDS_DICT", DataType.STRING, (-1,), optional=True),
                Input("BAD_WORDS_DICT", DataType.STRING, (-1,), optional=True),
                Input("END_ID", DataType.INT32, optional=True),
                Input("PAD_ID", DataType.INT32, optional=True),
            ),
            output=(
                Output("INPUT_ID", DataType.INT32, (-1,)),
                Output("REQUEST_INPUT_LEN", DataType.INT32),
                Output("REQUEST_OUTPUT_LEN", DataType.INT32),
                Output("STOP_WORDS_IDS", DataType.INT32, (2, -1)),
                Output("BAD_WORDS_IDS", DataType.INT32, (2, -1)),
                Output("OUT_END_ID", DataType.INT32),
                Output("OUT_PAD_ID", DataType.INT32),
            ),
            instance_group=tokenizers,
            dynamic_batching=queue,
            parameters=mc.parameters(tokenizer_dir=engine_dir, eos_token_ids=",".join(map(str, eos))),
        ),
        _tensorrt_llm(engine_dir, options, batch, logits, queue, streaming),
        ModelConfig(
            POSTPROCESSING,
            backend="python",
            max_batch_size=batch,
            input=(
                Input("TOKENS_BATCH", DataType.INT32, (-1, -1)),
                Input("SEQUENCE_LENGTH", DataType.INT32, (-1,)),
            ),
            output=(Output("OUTPUT", DataType.STRING, (-1,)),),
            instance_group=tokenizers,
            dynamic_batching=mc.DynamicBatching(),
            parameters=mc.parameters(tokenizer_dir=engine_dir, skip_special_tokens=True),
        ),
        _ensemble(batch, logits),
        ModelConfig(
            BLS,
            backend="python",
            max_batch_size=batch,
            input=_client_inputs(),
            output=(Output("text_output", DataType.STRING, (-1,)),),
            # An instance sees one request through at a time: this many run at once.
            instance_group=(mc.InstanceGroup(min(batch, options.max_requests), mc.Kind.CPU),),
            model_transaction_policy=streaming,
            parameters=mc.parameters(tensorrt_llm_model_name=TENSORRT_LLM),
        ),
    ]


def _tensorrt_llm(
    engine_dir: str,
    options: RepositoryOptions,
    batch: int,
    logits: DataType,
    queue: mc.DynamicBatching,
    streaming: mc.TransactionPolicy,
) -> ModelConfig:
    required = ("input_lengths", "request_output_len")
    optional = (("end_id", DataType.INT32), ("pad_id", DataType.INT32), ("stop", DataType.BOOL))
    return ModelConfig(
        TENSORRT_LLM,
        backend="tensorrtllm",
        max_batch_size=batch,
        input=(
            Input("input_ids", DataType.INT32, (-1,), allow_ragged_batch=True),
            *(Input(name, DataType.INT32, reshape=FLAT) for name in required),
            *(
                Input(name, DataType.INT32, (2, -1), optional=True, allow_ragged_batch=True)
                for name in ("stop_words_list", "bad_words_list")
            ),
            *(
                Input(name, data_type, optional=True, reshape=FLAT)
                for name, data_type in (*optional, *((name, data_type) for _, name, data_type in SAMPLING))
            ),
        ),
        output=(
            Output("output_ids", DataType.INT32, (-1, -1)),
            Output("sequence_length", DataType.INT32, (-1,)),
            *_results(logits),
        ),
        instance_group=(mc.InstanceGroup(1, mc.Kind.CPU),),  # as in the templates: the executor finds its GPU itself
        model_transaction_policy=streaming,
        dynamic_batching=queue,
        parameters={
            **mc.parameters(
                max_beam_width=1,
                gpt_model_type="inflight_fused_batching",
                gpt_model_path=engine_dir,
                batch_scheduler_policy="max_utilization",
                kv_cache_free_gpu_mem_fraction=0.9 if options.kv_fraction is None else options.kv_fraction,
                # Blocks that were decoded sparsely would be reused too, and answers depend on earlier requests.
                enable_kv_cache_reuse=False,
                enable_chunked_context=True,
                exclude_input_in_output=True,
                cuda_graph_mode=False,
                cancellation_check_period_ms=100,
                stats_check_period_ms=100,
                executor_worker_path=WORKER,
                gpu_device_ids=options.gpus[0] if options.gpus else None,
            ),
            "FORCE_CPU_ONLY_INPUT_TENSORS": Parameter("no"),
            # Not used, but the backend asks for them without a default.
            **mc.parameters(tokenizer_dir="", guided_decoding_backend="", xgrammar_tokenizer_info_path=""),
        },
    )


def _client_inputs() -> tuple[Input, ...]:
    return (
        Input("text_input", DataType.STRING),
        Input("max_tokens", DataType.INT32),
        Input("stop_words", DataType.STRING, (-1,), optional=True),
        Input("bad_words", DataType.STRING, (-1,), optional=True),
        Input("end_id", DataType.INT32, optional=True),
        Input("pad_id", DataType.INT32, optional=True),
        *(Input(name, data_type, optional=True) for name, _, data_type in SAMPLING),
    )


def _results(logits: DataType) -> tuple[Output, ...]:
    """What a client may have beside text; present when asked for."""
    return (
        Output("cum_log_probs", DataType.FP32, (-1,)),
        Output("output_log_probs", DataType.FP32, (-1, -1)),
        Output("context_logits", logits, (-1, -1)),
        Output("generation_logits", logits, (-1, -1, -1)),
    )


def _ensemble(batch: int, logits: DataType) -> ModelConfig:
    results = _results(logits)
    steps = (
        mc.Step(
            PREPROCESSING,
            {
                "QUERY": "text_input",
                "REQUEST_OUTPUT_LEN": "max_tokens",
                "STOP_WORDS_DICT": "stop_words",
                "BAD_WORDS_DICT": "bad_words",
                "END_ID": "end_id",
                "PAD_ID": "pad_id",
            },
            {
                "INPUT_ID": "_input_ids",
                "REQUEST_INPUT_LEN": "_input_lengths",
                "REQUEST_OUTPUT_LEN": "_request_output_len",
                "STOP_WORDS_IDS": "_stop_words",
                "BAD_WORDS_IDS": "_bad_words",
                "OUT_END_ID": "_end_id",
                "OUT_PAD_ID": "_pad_id",
            },
        ),
        mc.Step(
            TENSORRT_LLM,
            {
                "input_ids": "_input_ids",
                "input_lengths": "_input_lengths",
                "request_output_len": "_request_output_len",
                "stop_words_list": "_stop_words",
                "bad_words_list": "_bad_words",
                "end_id": "_end_id",
                "pad_id": "_pad_id",
                **{theirs: ours for ours, theirs, _ in SAMPLING},
            },
            {
                "output_ids": "_tokens",
                "sequence_length": "_sequence_length",
                **{result.name: result.name for result in results},
            },
        ),
        mc.Step(
            POSTPROCESSING,
            {"TOKENS_BATCH": "_tokens", "SEQUENCE_LENGTH": "_sequence_length"},
            {"OUTPUT": "text_output"},
        ),
    )
    return ModelConfig(
        ENSEMBLE,
        platform="ensemble",
        max_batch_size=batch,
        input=_client_inputs(),
        output=(Output("text_output", DataType.STRING, (-1,)), *results),
        ensemble_scheduling=mc.EnsembleScheduling(steps),
    )
