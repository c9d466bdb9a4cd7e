"""`fasa-trt doctor`: what is installed here, and which targets can be built and run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasa_trt.cli import options as opt

if TYPE_CHECKING:
    from fasa_trt.runtime.machine import Cuda

# module, and the packages that may provide it
PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnx_ir": ("onnx-ir",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "tensorrt": ("tensorrt",),
    "tensorrt_llm": ("tensorrt-llm",),
}


def doctor(json_output: opt.Json = False) -> None:
    """Show what is installed, which targets can be built and run here, and what the others need.

    Example: fasa-trt doctor --json
    """
    facts = examine()
    if json_output:
        from fasa_trt.cli.console import print_json

        print_json(facts)
    else:
        _show(facts)


def examine() -> dict[str, Any]:
    """All that doctor shows; made of JSON types alone."""
    import platform
    from dataclasses import asdict

    from fasa_trt import __version__
    from fasa_trt.runtime.machine import cuda, nvcc_version, package_version
    from fasa_trt.runtime.targets import default_target, targets

    driver = cuda()
    table = targets(driver)
    return {
        "fasa_trt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {module: package_version(module, *names) for module, names in PACKAGES.items()},
        "onnxruntime_providers": _providers(),
        "nvcc": nvcc_version(),
        "kernels": _kernels(),
        "plugin": _plugin(),
        "cuda_driver": driver.version,
        "gpus": _gpus(driver),
        "targets": [{**asdict(target), "needs": list(target.needs)} for target in table],
        "default_target": default_target(table),
    }


def _gpus(driver: Cuda) -> list[dict[str, Any]]:
    return [
        {
            "name": gpu.name,
            "compute_capability": ".".join(map(str, gpu.compute_capability)),
            "memory_bytes": gpu.memory,
        }
        for gpu in driver.gpus
    ]


def _kernels() -> dict[str, Any]:
    """Whether the CUDA kernels can be compiled here, and what that needs."""
    from fasa_trt.core.errors import FasaError
    from fasa_trt.plugins.toolchain import find_flashinfer, find_nvcc

    needs = []
    for find in (find_nvcc, find_flashinfer):
        try:
            find()
        except FasaError as error:
            needs.append(str(error))
    return {"can_build": not needs, "needs": needs}


def _plugin() -> dict[str, Any]:
    """TensorRT's plugin libraries at hand, by head_dim: the path, or None; and what is wrong where they are named."""
    from fasa_trt.core.errors import FasaError
    from fasa_trt.plugins import library, plugin_library

    try:
        found = {str(head_dim): plugin_library.find(head_dim) for head_dim in library.HEAD_DIMS}
    except FasaError as error:
        return {"libraries": {}, "needs": [str(error)]}
    return {"libraries": {head_dim: file and str(file) for head_dim, file in found.items()}, "needs": []}


def _providers() -> list[str]:
    """The devices that the installed onnxruntime can use, as it calls them; none when it does not load."""
    try:
        import onnxruntime
    except (ImportError, OSError):
        return []
    providers: list[str] = onnxruntime.get_available_providers()
    return providers


def _show(facts: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from fasa_trt.cli.console import human_bytes, out

    machine = Table("", "", show_header=False, title="this machine")
    machine.add_row("fasa-trt", facts["fasa_trt"])
    machine.add_row("Python", f"{facts['python']}, {facts['platform']}")
    for module, version in facts["packages"].items():
        machine.add_row(module, version or "[dim]not installed[/]")
    machine.add_row("onnxruntime providers", ", ".join(facts["onnxruntime_providers"]) or "[dim]none[/]")
    machine.add_row("nvcc", facts["nvcc"] or "[dim]not found[/]")
    machine.add_row("CUDA kernels", "can be built" if facts["kernels"]["can_build"] else "[dim]cannot be built[/]")
    built = [head_dim for head_dim, file in facts["plugin"]["libraries"].items() if file]
    machine.add_row("TensorRT plugin", f"built for head_dim {', '.join(built)}" if built else "[dim]not built yet[/]")
    machine.add_row("CUDA driver", facts["cuda_driver"] or "[dim]not found[/]")
    for gpu in facts["gpus"]:
        memory = human_bytes(gpu["memory_bytes"])
        machine.add_row("GPU", f"{escape(gpu['name'])}, {memory}, compute capability {gpu['compute_capability']}")
    if not facts["gpus"]:
        machine.add_row("GPU", "[dim]none[/]")
    out.print(machine)
    table = Table("target", "builds here", "runs here", title="targets")
    for target in facts["targets"]:
        table.add_row(target["name"], *("[green]yes[/]" if target[key] else "no" for key in ("can_build", "can_run")))
    out.print(table)
    for target in facts["targets"]:
        for need in target["needs"]:  # below the table and unwrapped, so that a command can be copied
            out.print(f"[bold]{target['name']}[/] {escape(need)}", soft_wrap=True)
    for part, key in (("CUDA kernels", "kernels"), ("TensorRT plugin", "plugin")):
        for need in facts[key]["needs"]:
            out.print(f"[bold]{part}[/] {escape(need)}", soft_wrap=True)
    out.print(f"fasa-trt build takes [bold]{facts['default_target']}[/] unless told otherwise.", soft_wrap=True)
