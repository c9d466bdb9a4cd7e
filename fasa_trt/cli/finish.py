"""`fasa-trt build --from-onnx`: the second half of a build whose first half was made elsewhere."""

from __future__ import annotations

from pathlib import Path


def finish(
    prepared_path: Path, output: Path, arch: str | None, given: list[str], *, force: bool, json_output: bool
) -> None:
    """Builds the engine of what `--stop-before-engine` left. given: options that are not for this half. Raises
    FasaError."""
    from fasa_trt.cli.console import print_json, progress, say
    from fasa_trt.cli.settings import command_line, gpu_architecture
    from fasa_trt.core.engine_dir import check_replaceable
    from fasa_trt.core.errors import FasaError
    from fasa_trt.export.engine import build_facts
    from fasa_trt.export.finish import arch_of, check_tools, finish_engine, open_prepared

    if given:
        raise FasaError(f"{given[0]} was decided when {prepared_path} was exported", hint="leave it out")
    check_replaceable(output, force)
    prepared = open_prepared(prepared_path)
    gpu = gpu_architecture()
    chosen = arch_of(prepared, wanted=arch, gpu=gpu)
    check_tools(prepared.target, prepared.fasa["lowering"], head_dim=prepared.head_dim, arch=chosen, gpu=gpu)
    with progress() as report:
        engine = finish_engine(
            prepared, output, arch=chosen, force=force, facts=build_facts(command_line()), report=report
        )
    if json_output:
        print_json({"engine": str(engine.path)})
    else:
        say(f"[green]built[/] {engine.path}: {engine.model_file.name} for {engine.target}")
