"""Configuration of the one model that serves an engine on Triton's python backend."""

from __future__ import annotations

from fasa_trt.serving.triton.model_config import InstanceGroup, Kind, ModelConfig, TransactionPolicy, parameters
from fasa_trt.serving.triton.options import RepositoryOptions
from fasa_trt.serving.triton.requests import INPUTS, OUTPUTS

NAME = "fasa"
MODEL_PY = '''"""Runs fasa-trt, which must be installed for the Python that Triton runs models with."""

from fasa_trt.serving.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def fasa_config(engine_dir: str, options: RepositoryOptions) -> ModelConfig:
    """engine_dir: absolute, or relative to the model's version folder. Requests have no batch dimension: each is one
    prompt, and those that run at the same time are batched step by step inside the model."""
    return ModelConfig(
        name=NAME,
        backend="python",
        input=INPUTS,
        output=OUTPUTS,
        instance_group=(InstanceGroup(options.instances, Kind.GPU if options.gpus else Kind.CPU, options.gpus),),
        model_transaction_policy=TransactionPolicy(decoupled=options.streaming),
        parameters=parameters(
            engine_dir=engine_dir,
            max_requests=options.max_requests,
            threads=options.threads,
            kv_fraction=options.kv_fraction,
        ),
    )
