"""Where each setting comes from, what fills the gaps, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, GPT2Config

from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.safetensors_file import StoredTensor
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.config import BuildConfig
from tests.models import BASE, make_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """3 layers, heads of 32 dims, 1024 positions."""
    return open_checkpoint(make_model("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=1024))


def write(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "build.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return file


def refused(checkpoint: Checkpoint, *words: str, **sources: Any) -> None:
    with pytest.raises(FasaError) as caught:
        BuildConfig.resolve(checkpoint, **sources)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- defaults ---


def test_defaults(checkpoint: Checkpoint) -> None:
    assert BuildConfig.resolve(checkpoint) == BuildConfig(
        target="onnxruntime",
        lowering="standard",
        dtype="float32",
        max_seq_len=1024,
        max_batch_size=8,
        labels="prefix",
        budget=256,
        n_tip=6,
        reduction=SparseSpec.reduction,
        rule="spread",
        sink=4,
        recent=32,
        dense_layers=(0,),
    )


def test_sparse_defaults_are_those_of_the_specification(checkpoint: Checkpoint) -> None:
    spec = SparseSpec().resolve(head_dim=32, num_layers=3, max_seq_len=1024)
    assert BuildConfig.resolve(checkpoint).spec == spec
    assert BuildConfig().spec == SparseSpec()


def test_defaults_of_a_fixed_capacity(checkpoint: Checkpoint) -> None:
    config = BuildConfig.resolve(checkpoint, default_target="tensorrt-rtx", flags={"lowering": "standard"})
    assert (config.target, config.max_seq_len, config.max_batch_size) == ("tensorrt-rtx", 1024, 1)
    assert config.fixed_capacity and not BuildConfig.resolve(checkpoint).fixed_capacity


def long_model(dtype: str = "BF16") -> Checkpoint:
    config = CONFIG_MAPPING["llama"](**{**BASE, "max_position_embeddings": 131072})
    return Checkpoint(Path("model"), config, {"w": StoredTensor(Path("w"), "w", dtype, (2,), 0, 4)})


def test_default_capacity_is_limited_where_it_is_allocated_whole() -> None:
    assert BuildConfig.resolve(long_model()).max_seq_len == 131072
    flags: dict[str, Any] = {"target": "tensorrt-rtx", "lowering": "standard"}
    assert BuildConfig.resolve(long_model(), flags=flags).max_seq_len == 16384
    flags["max_seq_len"] = 40000
    assert BuildConfig.resolve(long_model(), flags=flags).max_seq_len == 40000


@pytest.mark.parametrize(
    ("target", "stored", "wanted"),
    [
        ("onnxruntime", "BF16", "float32"),
        ("onnxruntime", "F16", "float32"),
        ("tensorrt-rtx", "BF16", "bfloat16"),
        ("tensorrt-rtx", "F16", "float16"),
        ("tensorrt-rtx", "F32", "float32"),
    ],
)
def test_auto_dtype(target: str, stored: str, wanted: str) -> None:
    flags = {"target": target, "lowering": "standard"}
    assert BuildConfig.resolve(long_model(stored), flags=flags).dtype == wanted
    for dtype in ("float32", "float16", "bfloat16"):
        assert BuildConfig.resolve(long_model(stored), flags={**flags, "dtype": dtype}).dtype == dtype


# --- precedence ---

VALUES: dict[str, list[Any]] = {
    "dtype": ["float16", "bfloat16", "float32"],
    "max_seq_len": [600, 700, 800],
    "max_batch_size": [2, 3, 4],
    "budget": [100, 200, 300],
    "n_tip": [2, 3, 5],
    "reduction": ["per_head", "mean_softmax", "sampled_softmax"],
    "rule": ["greedy", "agreement", "spread"],
    "sink": [1, 2, 3],
    "recent": [10, 20, 30],
    "dense_layers": [[0], [1], [2]],
}


PLUGIN_VALUES: dict[str, list[Any]] = {
    "lowering": ["plugin", "auto", "plugin"],
    "arch": ["80", "90", "100"],
    "max_num_tokens": [100, 200, 300],
    "tokens_per_block": [16, 64, 128],
    "labels": ["prefix", "auto", "prefix"],
}


def test_every_setting_is_covered() -> None:
    fields = {field.name for field in dataclasses.fields(BuildConfig)}
    assert VALUES.keys() | PLUGIN_VALUES.keys() | {"target", "tp_size", "pp_size", "notes"} == fields
    assert "notes" not in BuildConfig().to_json()


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize("spelling", ["as it is", "with dashes"])
def test_precedence(key: str, spelling: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """--set over flags over file over defaults, one level after the other."""
    name = key if spelling == "as it is" else key.replace("_", "-")
    low, middle, high = VALUES[key]
    file = write(tmp_path, {name: low})
    setting = f"{name}={json.dumps(high) if not isinstance(high, str) else high}"

    def value(**sources: Any) -> Any:
        found = getattr(BuildConfig.resolve(checkpoint, **sources), key)
        return list(found) if isinstance(found, tuple) else found

    assert value(file=file) == low
    assert value(file=file, flags={key: middle}) == middle
    assert value(file=file, flags={key: None}) == low, "a flag that was not given"
    assert value(file=file, settings=[setting]) == high
    assert value(file=file, flags={key: middle}, settings=[setting]) == high
    assert value(flags={key: middle}, settings=[setting, f"{name}={json.dumps(low)}"]) == low, "the last one wins"


def test_target_from_everywhere(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = write(tmp_path, {"target": "onnxruntime"})
    rtx: dict[str, Any] = {"default_target": "tensorrt-rtx"}
    assert BuildConfig.resolve(checkpoint, **rtx).target == "tensorrt-rtx"
    assert BuildConfig.resolve(checkpoint, file=file, **rtx).target == "onnxruntime"
    assert BuildConfig.resolve(checkpoint, file=file, flags={"target": "tensorrt-rtx"}).target == "tensorrt-rtx"
    assert BuildConfig.resolve(checkpoint, settings=["target=onnxruntime"], **rtx).target == "onnxruntime"


def test_null_leaves_the_choice_to_the_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = write(tmp_path, {"n_tip": None, "max_seq_len": None, "max_batch_size": None})
    assert BuildConfig.resolve(checkpoint, file=file) == BuildConfig.resolve(checkpoint)
    assert BuildConfig.resolve(checkpoint, flags={"n_tip": 3}, settings=["n_tip=null"]).n_tip == 6


@pytest.mark.parametrize(
    ("setting", "layers"), [("dense_layers=[2,0,2]", (0, 2)), ("dense-layers = 1", (1,)), ("dense_layers=[]", ())]
)
def test_dense_layers(setting: str, layers: tuple[int, ...], checkpoint: Checkpoint) -> None:
    assert BuildConfig.resolve(checkpoint, settings=[setting]).dense_layers == layers


def test_json_round_trip(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = BuildConfig.resolve(checkpoint, flags={"budget": 99, "dense_layers": [0, 2], "n_tip": 3, "rule": "greedy"})
    assert BuildConfig.resolve(checkpoint, file=write(tmp_path, config.to_json())) == config


# --- refused ---


@pytest.mark.parametrize("key", ["bugdet", "", "max seq len", "__class__", "spec"])
def test_unknown_key(key: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    words = f"unknown build setting {key!r}", "known: arch, budget, dense_layers, dtype"
    refused(checkpoint, *words, file=write(tmp_path, {key: 1}))
    refused(checkpoint, *words, settings=[f"{key}=1"])
    refused(checkpoint, *words, flags={key: 1})


@pytest.mark.parametrize("key", ["budget", "n_tip", "max_seq_len", "max_batch_size", "sink", "recent"])
@pytest.mark.parametrize("value", ["many", 1.5, True, [3], {}])
def test_not_a_number(key: str, value: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    refused(checkpoint, f"{key} must be a whole number, not {value!r}", file=write(tmp_path, {key: value}))


@pytest.mark.parametrize("key", ["budget", "sink", "recent"])
def test_null_where_there_is_no_default_of_the_model(key: str, checkpoint: Checkpoint) -> None:
    refused(checkpoint, f"{key} must be a whole number, not None", settings=[f"{key}=null"])


@pytest.mark.parametrize("key", ["target", "lowering", "dtype", "labels", "reduction", "rule"])
def test_not_text(key: str, checkpoint: Checkpoint) -> None:
    refused(checkpoint, f"{key} must be text, not 3", settings=[f"{key}=3"])


@pytest.mark.parametrize("value", ["0,1", '"0"', "[0.5]", "[true]", "true", "null", '["0"]', '{"0": 1}'])
def test_not_layers(value: str, checkpoint: Checkpoint) -> None:
    refused(checkpoint, "dense_layers must be layer numbers, not", "[0, 1]", settings=[f"dense_layers={value}"])


@pytest.mark.parametrize("setting", ["budget", "", "budget:3"])
def test_setting_without_a_value(setting: str, checkpoint: Checkpoint) -> None:
    refused(checkpoint, f"--set {setting!r} is not key=value", "--set budget=512", settings=[setting])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("3", "is not a JSON object"),
        ("null", "is not a JSON object"),
    ],
)
def test_file_is_garbage(content: str, words: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    refused(checkpoint, str(tmp_path / "build.json"), words, file=write(tmp_path, content))


def test_file_that_is_not_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "build.json").write_bytes(b"\xff\xfe")
    refused(checkpoint, "build.json is not valid JSON", file=tmp_path / "build.json")


def test_no_such_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    refused(checkpoint, f"cannot read {tmp_path / 'nowhere'}", file=tmp_path / "nowhere")
    refused(checkpoint, f"cannot read {tmp_path}", file=tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"budget": 0}, ["budget must be at least 1 token, not 0"]),
        ({"budget": -1}, ["budget must be at least 1 token, not -1"]),
        ({"budget": 35}, ["do not fit into a budget of 35"]),
        ({"budget": 1025}, ["budget 1025 is larger than the engine's capacity of 1024 tokens"]),
        ({"max_seq_len": 255}, ["budget 256 is larger than the engine's capacity of 255 tokens", "--max-seq-len"]),
        ({"n_tip": 17}, ["n-tip 17 is out of range", "16 frequency chunks"]),
        ({"n_tip": 0}, ["n-tip 0 is out of range"]),
        ({"dense_layers": [3]}, ["dense layer 3 does not exist: the model has 3 (0 to 2)"]),
        ({"dense_layers": [-1]}, ["dense layer -1 does not exist"]),
        ({"reduction": "median"}, ["unknown reduction 'median'"]),
        ({"rule": "best"}, ["unknown rule 'best'"]),
        ({"sink": -1}, ["sink -1"]),
        ({"recent": 0}, ["recent 0"]),
        ({"max_seq_len": 0}, ["max-seq-len must be at least 1, not 0"]),
        ({"max_seq_len": -4}, ["max-seq-len must be at least 1, not -4"]),
        ({"max_seq_len": 1025}, ["max-seq-len 1025 is beyond the 1024 positions of this model", "max_position_embed"]),
        ({"max_batch_size": 0}, ["max-batch-size must be at least 1, not 0"]),
        ({"lowering": "best"}, ["unknown lowering 'best' (auto, plugin or standard)"]),
        ({"lowering": "plugin"}, ["target onnxruntime does not run the plugin lowering", "it runs standard"]),
        ({"target": "tensorrt", "lowering": "standard"}, ["tensorrt does not run the standard lowering"]),
        ({"target": "tensorrt-llm", "lowering": "standard"}, ["does not run the standard lowering", "it runs plugin"]),
        ({"labels": "int2"}, ["unknown labels 'int2' (auto, prefix, int4, int8, fp8)"]),
        ({"labels": "int4"}, ["int4 labels belong to the plugin lowering"]),
        ({"max_num_tokens": 64}, ["max_num_tokens belongs to the plugin lowering"]),
        ({"tokens_per_block": 64}, ["tokens_per_block belongs to the plugin lowering"]),
        ({"tp_size": 2}, ["tp-size 2 is not possible: an engine runs on one GPU"]),
        ({"target": "tensorrt-llm", "pp_size": 2}, ["pp-size 2 is not possible", "--pp-size 1"]),
        ({"arch": "90"}, ["onnxruntime engines are not made for GPU architecture '90'", "leave --arch out"]),
        ({"target": "tensorrt-rtx", "arch": "90"}, ["tensorrt-rtx engines are not made for", "80, 86, 89, 120"]),
        ({"target": "tensorrt", "arch": "75"}, ["tensorrt engines are not made for GPU architecture '75'"]),
        ({"dtype": "int8"}, ["unknown dtype 'int8' (auto, float32, float16 or bfloat16)"]),
        ({"target": "coreml"}, ["unknown target 'coreml' (one of onnxruntime, tensorrt-rtx, tensorrt, tensorrt-llm)"]),
    ],
)
def test_impossible_values(flags: dict[str, Any], words: list[str], checkpoint: Checkpoint) -> None:
    refused(checkpoint, *words, flags=flags)


def test_budget_that_tensorrt_cannot_sort() -> None:
    flags: dict[str, Any] = {"budget": 3841, "max_seq_len": 8192}
    assert BuildConfig.resolve(long_model(), flags=flags).budget == 3841
    flags |= {"target": "tensorrt-rtx", "lowering": "standard"}
    refused(long_model(), "TensorRT's TopK", "3840", flags=flags)
    assert BuildConfig.resolve(long_model(), flags={**flags, "budget": 3840}).budget == 3840


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(), ["gpt2 has no rotary position embedding"]),
        (CONFIG_MAPPING["mamba"](), ["mamba has no rotary position embedding"]),
        (CONFIG_MAPPING["t5"](), ["t5 has no rotary position embedding"]),
        (CONFIG_MAPPING["stablelm"](), ["architecture 'stablelm' is not supported", "llama", "qwen3"]),
        (CONFIG_MAPPING["mixtral"](), ["architecture 'mixtral' is not supported"]),
    ],
)
def test_models_that_cannot_be_exported(config: Any, words: list[str]) -> None:
    """Said before anything is calibrated."""
    refused(Checkpoint(Path("model"), config, {}), *words)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
MODEL = long_model()


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*VALUES, *PLUGIN_VALUES, "target", "tp_size"]), json_values, max_size=3))
def test_any_json_is_resolved_or_refused(content: dict[str, Any]) -> None:
    try:
        config = BuildConfig.resolve(MODEL, settings=[f"{key}={json.dumps(value)}" for key, value in content.items()])
    except FasaError as error:
        assert str(error)
    else:
        assert config.spec.n_tip is not None and config.max_seq_len is not None
