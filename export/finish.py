"""The half of a build that needs TensorRT: from an exported model to the plan that runs.

It can be left to another machine: a *prepared* directory holds the model as ONNX and everything else of the engine
directory as it will be.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasa_trt.core.contract import TRTLLM_TENSORRT, TRTLLM_VERSION
from fasa_trt.core.engine_dir import CONFIG, ONNX_FILES, EngineDirectory, open_engine, write_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.export.config import architectures
from fasa_trt.export.tensorrt import PRODUCTS, RTX_ARCHITECTURES, Flavour, build_plan, load_tensorrt, standard_ranges
from fasa_trt.export.trtllm_config import ENGINE_FILE, check_trtllm_config, limits_of
from fasa_trt.plugins import plugin_library

Report = Callable[[str, int, int], None]  # stage, steps done, steps in all


@dataclass(frozen=True)
class Builder:
    """What builds a target's engines. exact: the only version whose plans the target loads. file: of the plan."""

    flavour: Flavour
    file: str
    exact: tuple[int, ...] | None = None


BUILDERS: Mapping[str, Builder] = {
    "tensorrt-rtx": Builder("tensorrt_rtx", "model.rtx"),
    "tensorrt": Builder("tensorrt", ENGINE_FILE),
    "tensorrt-llm": Builder("tensorrt", ENGINE_FILE, TRTLLM_TENSORRT),
}


def check_tools(target: str, lowering: str, *, head_dim: int, arch: str | None, gpu: str | None) -> None:
    """Raises FasaError when this machine cannot make a plan; to be asked before the long work.

    arch: as in `BuildConfig`. gpu: the architecture of the GPU here, None where there is none.
    """
    builder = BUILDERS[target]
    elsewhere = "export here with --stop-before-engine, finish there with --from-onnx"
    try:
        load_tensorrt(builder.flavour, builder.exact)
    except FasaError as error:
        if builder.exact is None:
            raise
        release = ".".join(map(str, TRTLLM_VERSION))
        raise FasaError(f"engines for TensorRT-LLM {release} need its own TensorRT: {error}") from None
    product = PRODUCTS[builder.flavour]
    if product.times and gpu is None:
        raise FasaError(f"{product.title} builds on the GPU that the engine is for; there is none here", hint=elsewhere)
    if product.times and arch not in (None, gpu):
        raise FasaError(f"{product.title} builds for the GPU here, sm_{gpu}, not for sm_{arch}", hint=elsewhere)
    if lowering == "plugin" and (lacking := plugin_library.missing(head_dim, arch)):
        raise FasaError(
            f"no plugin library: {lacking}", hint=f"fasa-trt plugin build, or {plugin_library.VARIABLE}=<library>"
        )


def check_can_stop(target: str) -> None:
    """Raises FasaError for a target that has nothing to stop before."""
    if target not in BUILDERS:
        raise FasaError(f"{target} runs the ONNX model itself", hint="leave --stop-before-engine out")


def make_plan(
    source: Path, target: Path, config: Mapping[str, Any], *, arch: str | None, report: Report | None = None
) -> dict[str, Any]:
    """Builds the model that `source` holds and writes the plan into `target`, both directories. config: the content
    of config.json. Returns facts for the manifest: of the builder as `tensorrt`, of the plugin as `plugin`."""
    fasa, pretrained, sizes = config["fasa"], config["pretrained_config"], config["build_config"]
    builder, facts, library = BUILDERS[fasa["target"]], {}, None
    load_tensorrt(builder.flavour, builder.exact)
    if fasa["lowering"] == "plugin":
        ranges = limits_of(config).ranges(pretrained["num_hidden_layers"])
        compiled = None if report is None else lambda _, done, total: report("plugin", done, total)
        library = plugin_library.provide(pretrained["head_size"], arch, progress=compiled)
        facts["plugin"] = plugin_library.describe(library)
    else:
        ranges = standard_ranges(sizes["max_batch_size"], sizes["max_seq_len"])
    facts["tensorrt"] = build_plan(
        source / ONNX_FILES[0],
        target / builder.file,
        flavour=builder.flavour,
        ranges=ranges,
        plugin=library,
        architecture=arch,
        progress=None if report is None else lambda done, total: report("build", done, total),
    )
    return facts


def finish_engine(
    prepared: EngineDirectory,
    path: Path,
    *,
    arch: str | None,
    force: bool = False,
    facts: Mapping[str, Any],
    report: Report | None = None,
) -> EngineDirectory:
    """Writes the engine directory `path` from one that stopped before the engine; all of it or nothing. arch: of the
    GPU that it is for. facts: for the manifest, beside those of `prepared`. Raises FasaError."""
    before = {key: value for key, value in prepared.manifest.items() if key not in ("schema", "files")}
    manifest: dict[str, Any] = {**facts, "prepared": before}
    with write_engine(path, force=force, facts=manifest) as directory:
        manifest.update(make_plan(prepared.path, directory, prepared.config, arch=arch, report=report))
        for name in prepared.manifest["files"]:
            if name not in ONNX_FILES:
                shutil.copyfile(prepared.path / name, directory / name)
    return open_engine(path, verify=False)


def open_prepared(path: Path) -> EngineDirectory:
    """A directory that a build left with `--stop-before-engine`. Raises FasaError."""
    engine = open_engine(path, prepared=True)
    if engine.target not in BUILDERS:
        raise FasaError(f"{path / CONFIG}: target {engine.target!r} has no engine to be built")
    if engine.fasa["model_file"] != BUILDERS[engine.target].file:
        raise FasaError(f"{path / CONFIG}: fasa.model_file must be {BUILDERS[engine.target].file}")
    if engine.fasa.get("lowering") not in ("plugin", "standard"):
        raise FasaError(f"{path / CONFIG}: fasa.lowering must be plugin or standard")
    if engine.fasa["lowering"] == "plugin":
        check_trtllm_config(engine.config)
    try:
        _ = engine.head_dim
    except (KeyError, TypeError, ValueError):
        raise FasaError(f"{path / CONFIG} lacks pretrained_config.head_size", hint="export it again") from None
    return engine


def arch_of(prepared: EngineDirectory, *, wanted: str | None, gpu: str | None) -> str | None:
    """The architecture to finish for: the one that is wanted now, else the GPU here where TensorRT can build for no
    other, else the one that was wanted then. Raises FasaError for one that the target does not run on."""
    if wanted is not None:
        wanted = wanted.removeprefix("sm_").replace(".", "")
        known = architectures(prepared.target)
        if wanted not in known:
            raise FasaError(
                f"{prepared.target} engines are not made for GPU architecture {wanted!r}",
                hint=f"one of {', '.join(known)}",
            )
        return wanted
    if PRODUCTS[BUILDERS[prepared.target].flavour].times:
        return gpu
    then = prepared.manifest.get("settings", {}).get("arch")
    return then if then in RTX_ARCHITECTURES else gpu if gpu in RTX_ARCHITECTURES else None
