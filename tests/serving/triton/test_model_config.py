"""Configurations say in protobuf's text format what their dataclasses say."""

from __future__ import annotations

from typing import Any

import pytest

from fasa_trt.serving.triton import model_config as mc
from fasa_trt.serving.triton.fasa_model import fasa_config
from fasa_trt.serving.triton.options import RepositoryOptions
from tests.serving.triton.parsing import parse, type_code


def parsed_of(config: mc.ModelConfig) -> Any:
    return parse(config.to_text())


def test_every_field_is_triton_s() -> None:
    tensor = mc.Input("in", mc.DataType.INT32, (-1, 3), optional=True, reshape=mc.Shape((2,)), allow_ragged_batch=True)
    whole = mc.ModelConfig(
        "all",
        backend="python",
        max_batch_size=4,
        input=(tensor, mc.Input("plain", mc.DataType.STRING)),
        output=tuple(mc.Output(each.name, each) for each in mc.DataType),
        instance_group=(mc.InstanceGroup(2, mc.Kind.GPU, (0, 3)), mc.InstanceGroup(1, mc.Kind.CPU)),
        model_transaction_policy=mc.TransactionPolicy(decoupled=True),
        dynamic_batching=mc.DynamicBatching((4, 8), 100, mc.QueuePolicy(7)),
        parameters=mc.parameters(one=1, yes=True, no=False, none=None),
    )
    parsed = parsed_of(whole)
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("all", "python", 4)
    first, plain = parsed.input
    assert (first.name, list(first.dims), first.optional, first.allow_ragged_batch) == ("in", [-1, 3], True, True)
    assert list(first.reshape.shape) == [2] and not plain.HasField("reshape") and list(plain.dims) == [1]
    assert [output.data_type for output in parsed.output] == [type_code(each.value) for each in mc.DataType]
    assert [(list(group.gpus), group.count) for group in parsed.instance_group] == [([0, 3], 2), ([], 1)]
    assert parsed.model_transaction_policy.decoupled
    assert list(parsed.dynamic_batching.preferred_batch_size) == [4, 8]
    assert parsed.dynamic_batching.default_queue_policy.max_queue_size == 7
    values = {key: value.string_value for key, value in parsed.parameters.items()}
    assert values == {"one": "1", "yes": "true", "no": "false"}


def test_ensemble_and_empty_messages() -> None:
    steps = (mc.Step("a", {"X": "x"}, {"Y": "y"}), mc.Step("b", {"Y": "y", "Z": "x"}, {"W": "w"}))
    parsed = parsed_of(mc.ModelConfig("e", platform="ensemble", ensemble_scheduling=mc.EnsembleScheduling(steps)))
    assert [step.model_name for step in parsed.ensemble_scheduling.step] == ["a", "b"]
    assert dict(parsed.ensemble_scheduling.step[1].input_map) == {"Y": "y", "Z": "x"}
    assert parsed_of(mc.ModelConfig("d", dynamic_batching=mc.DynamicBatching())).HasField("dynamic_batching")
    flat = parsed_of(mc.ModelConfig("f", input=(mc.Input("i", mc.DataType.INT32, reshape=mc.Shape()),)))
    assert flat.input[0].HasField("reshape") and not flat.input[0].reshape.shape


@pytest.mark.parametrize("text", ['a "quoted" \\ path', "é 漢 🙂", "new\nline\ttab", "'", ""])
def test_strings_survive(text: str) -> None:
    parsed = parsed_of(mc.ModelConfig(text, parameters=mc.parameters(path=text)))
    assert (parsed.name, parsed.parameters["path"].string_value) == (text, text)


def test_fasa_model() -> None:
    options = RepositoryOptions(instances=2, gpus=(0, 1), max_requests=9, streaming=False, kv_fraction=0.5)
    parsed = parsed_of(fasa_config("/models/engine", options))
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("fasa", "python", 0)
    assert not parsed.model_transaction_policy.decoupled
    values = {key: value.string_value for key, value in parsed.parameters.items()}
    assert values == {"engine_dir": "/models/engine", "max_requests": "9", "kv_fraction": "0.5"}
    (group,) = parsed.instance_group
    assert (group.count, list(group.gpus), group.kind) == (2, [0, 1], group.KIND_GPU)
    assert all(each.optional for each in parsed.input)
