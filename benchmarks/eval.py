"""Quality of FASA and its peers at equal budget, recorded.

python -m benchmarks.eval --model examples/models/fasa-tiny --commit SHA --output benchmarks/results/h200/eval-fasa-tiny.json
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import SAMPLE_MODEL, main, write_result
from benchmarks.common import commit as checked_out
from fasa_trt.cli.eval import numbers

METHODS = (
    "fasa,fasa:labels=int8,fasa:reduction=mean_softmax,fasa:n_tip=16:labels=prefix,fasa:rule=agreement,oracle,quest,"
    "snapkv,streamingllm,triattention,random"
)
TASKS = "recall,perplexity_code,generation,copy"


def evaluate(
    model: Annotated[str, typer.Option(help="Checkpoint directory.")] = str(SAMPLE_MODEL),
    output: Annotated[Path | None, typer.Option(help="Result file, rewritten after every task and context.")] = None,
    commit: Annotated[str | None, typer.Option(help="Of the sources, where this is not a git checkout.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Of fasa-trt calibrate.", show_default="calibrates on bundled text")
    ] = None,
    methods: Annotated[str, typer.Option(help="As for fasa-trt eval.")] = METHODS,
    tasks: Annotated[str, typer.Option(help="As for fasa-trt eval.")] = TASKS,
    contexts: Annotated[str, typer.Option(help="Tokens.")] = "2048,4096,8192",
    budgets: Annotated[str, typer.Option(help="Tokens attended per step.")] = "64,128,256,512,1024",
    samples: Annotated[int, typer.Option(min=1, help="Documents of each task and context.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of the generation task.")] = 256,
    calibration: Annotated[int, typer.Option(min=256, help="Tokens of the calibration windows.")] = 8192,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda.")] = "auto",
    limit: Annotated[
        float, typer.Option(help="Seconds after which no further task and context starts; the record names them.")
    ] = 115.0,
) -> None:
    """Run every method with every budget on every task and context, and record scores beside full attention's.

    Example: python -m benchmarks.eval --output eval.json
    """
    from fasa_trt.bench.record import new_record
    from fasa_trt.calibrate.calibrate import calibrate
    from fasa_trt.core.checkpoint import open_checkpoint
    from fasa_trt.core.profile import Profile
    from fasa_trt.evaluation.methods import parse_methods
    from fasa_trt.evaluation.model import load_eval_model
    from fasa_trt.evaluation.results import Results
    from fasa_trt.evaluation.run import EvalPlan, run
    from fasa_trt.evaluation.tasks import parse_tasks
    from fasa_trt.evaluation.tasks.base import TaskSettings

    start = time.perf_counter()
    checkpoint = open_checkpoint(model)
    measured = (
        calibrate(checkpoint, device=device, length=calibration).profile if profile is None else Profile.load(profile)
    )
    loaded = load_eval_model(checkpoint, profile=measured, device=device)
    plan = EvalPlan(
        tasks=parse_tasks(tasks),
        methods=parse_methods(methods, numbers("--budgets", budgets)),
        contexts=numbers("--contexts", contexts),
        settings=TaskSettings(samples=samples, new_tokens=new_tokens),
    )
    plan.check(loaded)
    results = Results.open(None, {}, {})
    record: dict[str, Any] = {
        **new_record("eval", commit or checked_out()),
        "model": checkpoint.path.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "calibration": measured.info,
        "settings": {"seed": plan.settings.seed, "samples": samples, "new_tokens": new_tokens, "ask": plan.ask},
        "skipped": [],
    }
    for task, context in plan.points():
        if time.perf_counter() - start > limit:
            record["skipped"].append({"task": task.name, "context": context})
            print(f"{task.name} at {context}: skipped, {limit:.0f} s are over", flush=True)
            continue
        point = dataclasses.replace(plan, tasks=[task], contexts=[context])
        began = time.perf_counter()
        run(loaded, point, results, lambda stage, done, total: None)
        print(f"{task.name} at {context}: {time.perf_counter() - began:.1f} s", flush=True)
        found = results.to_json()
        record |= {"seconds": time.perf_counter() - start, "rows": found["rows"], "records": found["records"]}
        if output is not None:
            write_result(output, record)
    if output is not None:
        write_result(output, record)
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main(evaluate)
