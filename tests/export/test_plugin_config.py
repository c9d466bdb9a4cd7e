"""The settings of the plugin lowering: what fills the gaps, where it is the default, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.safetensors_file import StoredTensor
from fasa_trt.export import config as config_module
from fasa_trt.export import plugin_limits
from fasa_trt.export.config import BuildConfig
from tests.export.test_config import PLUGIN_VALUES, refused, write
from tests.models import BASE, make_model


@pytest.fixture(scope="module")
def small_heads(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Heads of 32 dims, which the kernels do not know."""
    return open_checkpoint(make_model("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=1024))


def plugin_model(dtype: str = "BF16", **overrides: Any) -> Checkpoint:
    """8 KV heads of 128 dims, 131072 positions, 4 layers."""
    sizes = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 4,
    }
    config = CONFIG_MAPPING["llama"](**{**BASE, "max_position_embeddings": 131072, **sizes, **overrides})
    return Checkpoint(Path("model"), config, {"w": StoredTensor(Path("w"), "w", dtype, (2,), 0, 4)})


@pytest.fixture(autouse=True)
def prefix_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the plugin reads by now."""
    monkeypatch.setattr(plugin_limits, "READABLE", ("prefix",))


def plugin(checkpoint: Checkpoint | None = None, **flags: Any) -> BuildConfig:
    return BuildConfig.resolve(checkpoint or plugin_model(), flags={"target": "tensorrt-llm", **flags})


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-llm"])
def test_defaults_of_the_plugin(target: str) -> None:
    config = plugin(target=target)
    assert config == BuildConfig(
        target=target,
        lowering="plugin",
        dtype="bfloat16",
        max_seq_len=131072,
        max_batch_size=8,
        max_num_tokens=8192,
        tokens_per_block=32,
        labels="prefix",
        n_tip=24,
    )
    assert not config.fixed_capacity
    assert (
        BuildConfig.resolve(plugin_model(), settings=[f"{k}={v}" for k, v in config.to_json().items() if v]) == config
    )


@pytest.mark.parametrize("key", PLUGIN_VALUES)
def test_precedence_of_plugin_settings(key: str, tmp_path: Path) -> None:
    low, middle, high = PLUGIN_VALUES[key]
    file = write(tmp_path, {"target": "tensorrt-llm", key: low})

    def value(**sources: Any) -> Any:
        return getattr(BuildConfig.resolve(plugin_model(), file=file, **sources), key)

    resolved = {"auto": {"lowering": "plugin", "labels": "prefix"}.get(key)}
    assert value() == low
    assert value(flags={key: middle}) == resolved.get(middle, middle)
    assert value(flags={key: middle}, settings=[f"{key}={high}"]) == high


def test_steps_are_no_larger_than_they_can_be() -> None:
    assert plugin(max_batch_size=2, max_seq_len=512).max_num_tokens == 1024
    assert plugin(max_batch_size=2, max_seq_len=512, tokens_per_block=128).tokens_per_block == 128
    small = plugin(max_batch_size=1, max_seq_len=16, budget=16, sink=1, recent=4)
    assert small.max_num_tokens == 32, "a block of a prompt"
    refused(plugin_model(), "max_num_tokens 38 is below 39", flags={"target": "tensorrt", "max_num_tokens": 38})
    refused(plugin_model(), "tokens_per_block 24 is not possible", settings=["target=tensorrt", "tokens_per_block=24"])
    flags: dict[str, Any] = {"target": "tensorrt", "max_num_tokens": 1 << 20}
    refused(plugin_model(), "max_num_tokens 1048576 is more than the plugin can address", "1048575", flags=flags)


@pytest.mark.parametrize(("head_dim", "n_tip"), [(64, 16), (96, 16), (128, 24), (256, 48)])
def test_default_n_tip_is_one_that_a_kernel_has(head_dim: int, n_tip: int) -> None:
    assert plugin(plugin_model(head_dim=head_dim)).n_tip == n_tip
    assert plugin(plugin_model(head_dim=head_dim), n_tip=8).n_tip == 8
    refused(plugin_model(), "no kernel for n-tip 12 (--n-tip 16)", flags={"target": "tensorrt", "n_tip": 12})


def test_labels_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit labels are the default as soon as the plugin reads them, where they fit into a label head."""
    refused(plugin_model(), "does not read int4 labels", flags={"target": "tensorrt", "labels": "int4"})
    monkeypatch.setattr(plugin_limits, "READABLE", ("prefix", "int4", "int8", "fp8"))
    assert (plugin().labels, plugin().n_tip) == ("int4", 32)
    assert (plugin(labels="prefix").labels, plugin(labels="prefix").n_tip) == ("prefix", 24)
    many = plugin_model(num_key_value_heads=16)
    assert (plugin(many).labels, plugin(many).n_tip) == ("prefix", 24)
    assert plugin(many, n_tip=16).labels == "int4"
    assert plugin(many, labels="int4").n_tip == 16, "as many as fit"
    assert plugin(labels="int8").n_tip == plugin(labels="fp8").n_tip == 16
    message = "int8 labels of 8 KV heads take 512 bytes a token, a label head has 256"
    refused(plugin_model(), message, flags={"target": "tensorrt", "labels": "int8", "n_tip": 32})


def test_dtype_of_the_plugin() -> None:
    config = plugin(plugin_model("F32"))
    assert config.dtype == "bfloat16"
    assert config.notes == ("dtype bfloat16: the plugin does not compute in float32",)
    assert plugin(plugin_model("F16")).dtype == "float16"
    refused(plugin_model(), "does not compute in float32", flags={"target": "tensorrt", "dtype": "float32"})


def test_what_no_kernel_executes(small_heads: Checkpoint) -> None:
    refused(small_heads, "no kernel for heads of 32 dims", flags={"target": "tensorrt"})
    refused(plugin_model(), "cannot attend to 5000 tokens", flags={"target": "tensorrt", "budget": 5000})
    dense = {"target": "tensorrt", "budget": 5000, "dense_layers": [0, 1, 2, 3]}
    assert BuildConfig.resolve(plugin_model(), flags=dense).budget == 5000, "which no layer looks at"


def rtx(checkpoint: Checkpoint | None = None, **flags: Any) -> BuildConfig:
    return plugin(checkpoint, target="tensorrt-rtx", **flags)


def test_the_plugin_is_the_default_where_its_library_is(
    small_heads: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str | None]] = []
    reason: list[str | None] = [None]

    def missing(*question: Any) -> str | None:
        asked.append(question)
        return reason[0]

    monkeypatch.setattr(config_module, "missing", missing)
    assert (rtx(arch="89").lowering, asked) == ("plugin", [(128, "89")])
    assert rtx().notes[0].startswith("lowering plugin: ")
    assert rtx(lowering="standard").lowering == "standard"
    assert not rtx(lowering="standard").notes
    small = rtx(small_heads)
    assert small.lowering == "standard"
    assert "lowering standard, not plugin: the plugin has no kernel for heads of 32 dims" in small.notes[0]
    reason[0] = "no nvcc"
    assert rtx().lowering == "standard"
    assert rtx().notes == ("lowering standard, not plugin: no nvcc",)
    assert rtx(lowering="plugin").lowering == "plugin", "the library is asked for when the engine is built"
    flags: dict[str, Any] = {"target": "tensorrt-rtx", "max_num_tokens": 4096}
    refused(plugin_model(), "max_num_tokens belongs to the plugin lowering", flags=flags)


@pytest.mark.parametrize("given", ["89", "8.9", "sm_89"])
def test_architecture(given: str) -> None:
    assert BuildConfig.resolve(plugin_model(), settings=["target=tensorrt", f"arch={given}"]).arch == "89"


def test_the_gpu_here_is_the_default_where_it_fits() -> None:
    def arch(target: str, gpu: str | None) -> str | None:
        flags = {"target": target, "lowering": "auto" if target != "tensorrt-rtx" else "standard"}
        return BuildConfig.resolve(plugin_model(), flags=flags, default_arch=gpu).arch

    assert [arch("tensorrt", gpu) for gpu in ("90", "75", None)] == ["90", None, None]
    assert [arch("tensorrt-rtx", gpu) for gpu in ("89", "90", None)] == ["89", None, None]
    assert arch("onnxruntime", "90") is None
