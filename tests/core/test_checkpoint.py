"""Opening checkpoints, the unsound ones above all; what the fingerprint depends on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fasa_trt.core.checkpoint import DOWNLOAD_PATTERNS, TOKENIZER_FILES, Checkpoint, open_checkpoint
from fasa_trt.core.errors import FasaError
from tests.models import make_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def sharded(original: Path, tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(original).save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    return tmp_path / "sharded"


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def edit_weights(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS)


def refused(model: str | Path, *words: str) -> None:
    """The message is one line with all `words`."""
    with pytest.raises(FasaError) as caught:
        open_checkpoint(model)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_shape_and_tensors(original: Path) -> None:
    checkpoint = open_checkpoint(original)
    assert (checkpoint.num_layers, checkpoint.num_heads, checkpoint.num_kv_heads, checkpoint.head_dim) == (3, 4, 2, 32)
    assert checkpoint.path == original
    assert checkpoint.dtype == "float32"
    expected = load_file(original / WEIGHTS)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.tensor(name).read(), array)


def test_path_may_be_text(original: Path) -> None:
    assert open_checkpoint(str(original)).tensors.keys() == open_checkpoint(original).tensors.keys()


def test_without_kv_heads_every_head_has_its_own(original: Path) -> None:
    checkpoint = open_checkpoint(original)
    checkpoint.config.num_key_value_heads = None
    assert checkpoint.num_kv_heads == 4


def test_missing_tensor(original: Path) -> None:
    with pytest.raises(FasaError, match=r"has no tensor model\.extra\.weight .*incomplete"):
        open_checkpoint(original).tensor("model.extra.weight")


def test_shards_equal_a_single_file(original: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = open_checkpoint(original), open_checkpoint(sharded)
    assert many.tensors.keys() == one.tensors.keys()
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(many.tensor(name).read(), tensor.read())
    assert many.fingerprint == one.fingerprint


def test_weights_that_the_index_does_not_name_are_ignored(sharded: Path) -> None:
    save_file({"stray": np.zeros(2, np.float32)}, sharded / "consolidated.safetensors")
    assert "stray" not in open_checkpoint(sharded).tensors


def test_weights_beside_the_single_file_are_ignored(model: Path) -> None:
    """Mistral's repositories hold the same weights twice, adapters lie in the same folder."""
    save_file({"stray": np.zeros(2, np.float32)}, model / "consolidated.safetensors")
    assert "stray" not in open_checkpoint(model).tensors


def test_single_file_of_another_name(model: Path) -> None:
    (model / WEIGHTS).rename(model / "weights.safetensors")
    assert "model.norm.weight" in open_checkpoint(model).tensors


@pytest.mark.parametrize(
    ("stored", "name"), [("float64", "float32"), ("float32", "float32"), ("float16", "float16"), ("bf16", "bfloat16")]
)
def test_dtype_is_that_of_most_bytes(stored: str, name: str, model: Path) -> None:
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if stored == "bf16" else stored)

    def change(tensors: dict[str, Any]) -> None:
        for key in tensors:
            if "norm" not in key:  # these stay in float32
                tensors[key] = tensors[key].astype(kind)

    edit_weights(model, change)
    assert open_checkpoint(model).dtype == name


def test_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    """Both layouts that transformers has written, named as in a text-only checkpoint."""
    config: Any = CONFIG_MAPPING["gemma3"]
    config(text_config={"num_hidden_layers": 3}).save_pretrained(tmp_path)
    stored = {
        "model.language_model.norm.weight": "model.norm.weight",
        "language_model.model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "model.vision_tower.norm.weight": "model.vision_tower.norm.weight",
        "lm_head.weight.of.nothing": "lm_head.weight.of.nothing",
    }
    save_file({name: np.full(2, i, np.float32) for i, name in enumerate(stored)}, tmp_path / WEIGHTS)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config.model_type, checkpoint.num_layers) == ("gemma3_text", 3)
    assert {name: int(tensor.read()[0]) for name, tensor in checkpoint.tensors.items()} == {
        plain: i for i, plain in enumerate(stored.values())
    }


# --- where is the model? ---


def test_no_such_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such model", str(tmp_path / "nowhere"), "hub ID")


@pytest.mark.parametrize("name", ["llama", "a/b/c", "./a", "../b", "~/a", ""])
def test_what_cannot_be_a_hub_id_is_never_asked_for(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    if name:
        refused(name, "no such model", name)
    else:  # pathlib's current directory
        refused(name, "no config.json")


def test_a_file_is_not_a_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(model / WEIGHTS, "no such model", "is not a directory")
    monkeypatch.chdir(model.parent)
    refused(f"model/{WEIGHTS}", "no such model", "is not a directory")


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("nobody/nothing", "no such model: nobody/nothing", "could not be downloaded", "local checkpoint directory")


def test_hub_id_is_downloaded_without_pickles(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(original)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_checkpoint("somebody/something").path == original
    assert asked == [("somebody/something", DOWNLOAD_PATTERNS)]
    from fnmatch import fnmatch

    def fetched(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in DOWNLOAD_PATTERNS)

    assert all(fetched(name) for name in ("config.json", INDEX, WEIGHTS, *TOKENIZER_FILES))
    assert not any(fetched(name) for name in ("pytorch_model.bin", "model.pt", "weights.pth", "run.py", "model.gguf"))


def test_silent_download_failure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused("nobody/nothing", "could not be downloaded: TimeoutError")


# --- its config ---


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, str(model), "no config.json", "Hugging Face checkpoint directory")


@pytest.mark.parametrize("content", [b"", b'{"model_type": "llama"', b"\xff\xfe{}"])
def test_config_is_not_json(content: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(content)
    refused(model, "config.json is not valid JSON", "download it again")


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"model_type": "unheard_of"}', '{"model_type": 5}'])
def test_config_of_an_unknown_model(content: str, model: Path) -> None:
    (model / "config.json").write_text(content, "utf-8")
    refused(model, "config.json does not describe a model that transformers knows: ")


def test_code_of_the_checkpoint_is_not_run(model: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.update(model_type="own", auto_map={"AutoConfig": "code.Config"})

    edit_json(model / "config.json", change)
    (model / "code.py").write_text("raise SystemExit('ran')", "utf-8")
    refused(model, "config.json does not describe a model that transformers knows")


# --- its weights ---


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    refused(model, str(model), "no safetensors weights", "pickled weights are not read")


def test_no_weights_at_all(model: Path) -> None:
    (model / WEIGHTS).unlink()
    refused(model, "no safetensors weights")


def test_weights_without_tensors(model: Path) -> None:
    save_file({}, model / WEIGHTS)
    refused(model, "no safetensors weights")


def test_truncated_weights(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[: len(data) // 2])
    refused(model, WEIGHTS, "truncated")


def test_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    refused(sharded, f"{sharded} lacks {gone.name}", "finish the download")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors"])
def test_index_that_points_outside(name: str, sharded: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["model.norm.weight"] = name

    edit_json(sharded / INDEX, change)
    refused(sharded, INDEX, "points outside its directory", name)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"weight_map": []}'])
def test_index_is_garbage(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content, "utf-8")
    refused(sharded, f"{sharded / INDEX} is not a shard index", "download it again")


@pytest.mark.parametrize("name", ["..", ".", "", 3, None, ["model.safetensors"]])
def test_index_that_names_no_file(name: Any, sharded: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["model.norm.weight"] = name

    edit_json(sharded / INDEX, change)
    refused(sharded, str(sharded))


# --- the fingerprint ---


def fingerprint(model: Path) -> str:
    return open_checkpoint(model).fingerprint


def bump(name: str) -> Callable[[dict[str, Any]], None]:
    """Changes the last bit of one weight."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name].reshape(-1).view(np.uint32)[-1] ^= 1

    return change


ATTENTION = "model.layers.2.self_attn."


@pytest.mark.parametrize("name", [f"{ATTENTION}q_proj.weight", f"{ATTENTION}k_proj.weight"])
def test_fingerprint_sees_query_and_key_weights(name: str, model: Path, original: Path) -> None:
    edit_weights(model, bump(name))
    assert fingerprint(model) != fingerprint(original)


def test_fingerprint_sees_shapes(model: Path, original: Path) -> None:
    """The same bytes, laid out otherwise."""

    def change(tensors: dict[str, Any]) -> None:
        name = f"{ATTENTION}q_proj.weight"
        tensors[name] = tensors[name].reshape(tensors[name].shape[::-1])

    edit_weights(model, change)
    assert fingerprint(model) != fingerprint(original)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        f"{ATTENTION}v_proj.weight",
        f"{ATTENTION}o_proj.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_fingerprint_does_not_see_other_weights(name: str, model: Path, original: Path) -> None:
    edit_weights(model, bump(name))
    assert fingerprint(model) == fingerprint(original)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10001.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"num_hidden_layers": 2},
        {"num_key_value_heads": 1},
        {"head_dim": 16},
        {"model_type": "mistral"},
    ],
)
def test_fingerprint_sees_rope_and_shape(change: dict[str, Any], model: Path, original: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(change))
    assert fingerprint(model) != fingerprint(original)


def test_fingerprint_ignores_what_does_not_matter(model: Path, original: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(bos_token_id=3, transformers_version="0"))
    (model / "README.md").write_text("text", "utf-8")
    assert fingerprint(model) == fingerprint(original)


def test_fingerprint_of_a_fused_projection(tmp_path: Path) -> None:
    model = make_model("phi3", tmp_path / "phi3")
    before = fingerprint(model)
    edit_weights(model, bump(f"{ATTENTION}qkv_proj.weight"))
    assert fingerprint(model) != before


def test_checkpoint_repr_stays_short(original: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(original)
    assert "offset" not in repr(checkpoint)
