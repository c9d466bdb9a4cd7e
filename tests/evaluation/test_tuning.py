"""The search for settings: what it tries, what it measures, and that it keeps to its bound."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tuning import search
from fasa_trt.evaluation.tuning.grid import build_settings, grid, kv_bytes, possible_n_tips
from fasa_trt.evaluation.tuning.meter import LossMeter
from fasa_trt.evaluation.tuning.plot import tradeoff_svg
from fasa_trt.evaluation.tuning.result import Point, Tuning, frontier
from fasa_trt.evaluation.tuning.search import dense_counts, tune
from fasa_trt.evaluation.tuning.windows import ScoredWindow, tuning_windows
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.plugin_limits import N_TIPS
from tests.models import make_model

LENGTH = 512
Windows = tuple[list[ScoredWindow], list[ScoredWindow]]


def quiet(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total, stage


@pytest.fixture(scope="module")
def windows(tiny: EvalModel) -> Windows:
    return tuning_windows(tiny.encode, tiny.prefix, None, length=LENGTH, count=2, seed=1)


@pytest.fixture(scope="module")
def base(tiny: EvalModel) -> BuildConfig:
    return BuildConfig.resolve(tiny.checkpoint, flags={"dense_layers": []})


def settings(tiny: EvalModel, base: BuildConfig) -> list[BuildConfig]:
    return grid(tiny.checkpoint, base, length=LENGTH, n_tips=[8, 16, 32], budgets=[64, 128])


def test_windows_fill_their_length_and_do_not_overlap(tiny: EvalModel, windows: Windows) -> None:
    again = tuning_windows(tiny.encode, tiny.prefix, None, length=LENGTH, count=2, seed=1)
    assert again == windows
    every = [*windows[0], *windows[1]]
    assert len({tuple(window.prompt) for window in every}) == 4
    for window in every:
        assert 0.8 * LENGTH < len(window.prompt) + len(window.steps) <= LENGTH
        assert len(window.scored) == len(window.steps) - 1
    other = tuning_windows(tiny.encode, tiny.prefix, None, length=LENGTH, count=2, seed=2)
    assert {tuple(window.prompt) for window in every}.isdisjoint(tuple(window.prompt) for window in other[0])


def test_only_answers_of_recall_windows_are_scored(tiny: EvalModel, windows: Windows) -> None:
    for plain, recall in windows:
        assert all(plain.scored)
        scored = [token for token, counts in zip(recall.steps[1:], recall.scored, strict=True) if counts]
        text, answers = tiny.decode(list(recall.prompt)), tiny.decode(scored).split()
        assert len(answers) >= 3
        for answer in answers:
            assert len(answer) == 5 and f" = {answer}\n" in text


def test_text_of_ones_own(tiny: EvalModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {number}\n" for number in range(400)))
    found, held_out = tuning_windows(tiny.encode, tiny.prefix, file, length=512, count=1, seed=0)
    assert len(found) == len(held_out) == 1 and all(found[0].scored)
    with pytest.raises(FasaError, match="fills one window of 2048 tokens"):
        tuning_windows(tiny.encode, tiny.prefix, file, length=2048, count=1, seed=0)
    with pytest.raises(FasaError, match="windows of 100 tokens are too short"):
        tuning_windows(tiny.encode, tiny.prefix, file, length=100, count=1, seed=0)


def test_only_what_a_target_builds_is_tried(tiny: EvalModel, base: BuildConfig) -> None:
    found = grid(tiny.checkpoint, base, length=LENGTH)
    assert {config.n_tip for config in found} == {8, 16, 24, 32, 48}
    assert {config.budget for config in found} == {64, 128, 256}
    assert {config.reduction for config in found} == {"sum", "sampled_softmax"} and len(found) == 5 * 3 * 2
    assert not any(config.dense_layers for config in found)
    plugin = BuildConfig.resolve(tiny.checkpoint, flags={"target": "tensorrt"})
    assert plugin.labels == "int4"
    assert possible_n_tips(tiny.checkpoint, plugin) == list(N_TIPS)  # 2 KV heads: all fit into a label head
    wide = replace(plugin, labels="int8")
    assert {config.n_tip for config in grid(tiny.checkpoint, wide, length=LENGTH)} == set(N_TIPS)
    with pytest.raises(FasaError, match="no kernel for n-tip 20"):
        grid(tiny.checkpoint, plugin, length=LENGTH, n_tips=[20])
    assert grid(tiny.checkpoint, base, length=LENGTH, n_tips=[20], budgets=[64])[0].n_tip == 20
    named = grid(tiny.checkpoint, base, length=LENGTH, reductions=["max_softmax"])
    assert {config.reduction for config in named} == {"max_softmax"}


def test_label_heads_limit_n_tip(tmp_path: Path) -> None:
    from fasa_trt.core.checkpoint import open_checkpoint

    heads = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    checkpoint = open_checkpoint(make_model("llama", tmp_path, **heads))
    plugin = BuildConfig.resolve(checkpoint, flags={"target": "tensorrt", "labels": "int4", "n_tip": 8})
    assert possible_n_tips(checkpoint, plugin) == [8, 16]  # 8 heads of n_tip bytes in a row of 128


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"reductions": ["per_head"]}, "one token set for each KV head"),
        ({}, {"budgets": [LENGTH]}, f"a budget of {LENGTH} covers a window"),
        ({"recent": 600, "budget": 700}, {}, "every budget covers"),
        ({}, {"budgets": [32]}, "do not fit into a budget of 32"),
        ({}, {"n_tips": [65]}, "64 frequency chunks"),
    ],
)
def test_settings_that_are_refused(
    tiny: EvalModel, base: BuildConfig, changes: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(FasaError, match=words):
        grid(tiny.checkpoint, replace(base, **changes), length=LENGTH, **options)


def test_bytes_are_those_of_the_engine(tiny: EvalModel, base: BuildConfig) -> None:
    config = replace(base, n_tip=16, budget=64, dense_layers=(0,))
    heads, head_dim, width = tiny.num_kv_heads, tiny.head_dim, 4
    dense = 2 * head_dim * LENGTH * heads * width
    sparse = (2 * 16 * LENGTH + 2 * head_dim * 64) * heads * width
    assert kv_bytes(tiny.checkpoint, tiny.profile, config, LENGTH) == (dense + 5 * sparse, 6 * dense)


def test_dense_loss_is_the_models_own(tiny: EvalModel, tiny_dir: Path, windows: Windows, base: BuildConfig) -> None:
    meter = LossMeter(tiny, windows[0])
    plain = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    losses = []
    for window in windows[0]:
        tokens = torch.tensor([[*window.prompt, *window.steps]])
        with torch.inference_mode():
            logits = plain(tokens).logits[0, len(window.prompt) : -1]
        found = torch.nn.functional.cross_entropy(logits, torch.tensor(window.steps[1:]), reduction="none")
        losses += found[torch.tensor(window.scored)].tolist()
    assert meter.scored == len(losses)
    assert meter.dense == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert meter.relative(replace(base, dense_layers=tuple(range(6)))) == 0.0
    few = meter.relative(replace(base, n_tip=2, budget=40))
    assert few > 0.02  # it does attend to less
    one_sparse = [
        meter.relative(replace(base, n_tip=2, budget=40, dense_layers=tuple({*range(6)} - {layer})))
        for layer in range(6)
    ]
    assert min(one_sparse) < few / 2 < max(one_sparse)  # layers differ


def test_the_bound_is_kept_on_both_sets_of_windows(tiny: EvalModel, windows: Windows, base: BuildConfig) -> None:
    found = tune(tiny, settings(tiny, base), windows, length=LENGTH, max_loss=0.05, progress=quiet)
    chosen = found.chosen
    for meter, loss in zip((LossMeter(tiny, each) for each in windows), (chosen.loss, chosen.held_out), strict=True):
        assert meter.relative(chosen.config) == pytest.approx(loss, abs=1e-6)
        assert loss is not None and loss <= 0.05
    assert chosen in found.points and chosen.kv_bytes < found.dense_bytes
    cheaper = [point for point in found.points if point.kv_bytes < chosen.kv_bytes]
    assert all(point.worst > 0.05 for point in cheaper)
    assert build_settings(chosen.config)["n_tip"] == chosen.config.n_tip
    assert found.to_json()["kv_share"] == chosen.kv_bytes / found.dense_bytes


class MadeUpLosses:
    """Stands for LossMeter: any loss for any setting, at random but always the same, falling with what is read."""

    dense, scored = 1.0, 10

    def __init__(self, seed: int) -> None:
        self.seed, self.asked = seed, 0

    def relative(self, config: BuildConfig) -> float:
        self.asked += 1
        noise = random.Random(f"{self.seed} {config.reduction} {config.n_tip} {config.budget} {config.dense_layers}")
        layers = sum((0.1, 0.6, 0.05, 0.02, 0.2, 0.03)[layer] for layer in range(6) if layer not in config.dense_layers)
        return layers * (8 / (config.n_tip or 1)) * (64 / config.budget) * noise.uniform(0.02, 0.4) - 0.01


@pytest.mark.parametrize("seed", range(8))
def test_a_looser_bound_never_reads_more(
    tiny: EvalModel, base: BuildConfig, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def read(max_loss: float) -> tuple[float, Tuning | None]:
        meters = iter((MadeUpLosses(seed), MadeUpLosses(seed + 100)))
        monkeypatch.setattr(search, "LossMeter", lambda model, windows: next(meters))
        try:
            found = tune(tiny, settings(tiny, base), ([], []), length=LENGTH, max_loss=max_loss, progress=quiet)
        except FasaError:
            return float("inf"), None
        assert found.chosen.worst <= max_loss
        return found.chosen.kv_bytes, found

    results = [read(max_loss) for max_loss in (0.0, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5)]
    reads = [bytes_ for bytes_, _ in results]
    assert reads == sorted(reads, reverse=True)
    assert len(set(reads)) > 2 and read(0.02) == results[3]


@pytest.mark.parametrize("better", ["sum", "sampled_softmax"])
def test_the_reduction_is_decided_by_one_measurement_more(
    tiny: EvalModel, base: BuildConfig, monkeypatch: pytest.MonkeyPatch, better: str
) -> None:
    class OneReduction(MadeUpLosses):
        def relative(self, config: BuildConfig) -> float:
            self.asked += 1
            return (0.1 if config.reduction == better else 0.2) * 64 / config.budget

    made = [OneReduction(0), OneReduction(1)]
    meters = iter(made)
    monkeypatch.setattr(search, "LossMeter", lambda model, windows: next(meters))
    found = tune(tiny, settings(tiny, base), ([], []), length=LENGTH, max_loss=0.3, progress=quiet)
    assert found.chosen.config.reduction == better == build_settings(found.chosen.config)["reduction"]
    other = [point for point in found.points if point.config.reduction != better]
    assert len(other) == 1 and len(found.points) == 3 * 2 + 1
    assert [meter.asked for meter in made] == [7, 1]
    middle = sorted(point.kv_bytes for point in found.points if point.config.reduction == better)[3]
    assert other[0].kv_bytes == middle


def test_a_layer_that_pays_becomes_dense(tiny: EvalModel, base: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneBadLayer(MadeUpLosses):
        def relative(self, config: BuildConfig) -> float:
            return 0.001 if 1 in config.dense_layers else 0.5

    monkeypatch.setattr(search, "LossMeter", lambda model, windows: OneBadLayer(0))
    found = tune(tiny, settings(tiny, base), ([], []), length=LENGTH, max_loss=0.005, progress=quiet)
    assert found.chosen.config.dense_layers == (1,)
    assert (found.chosen.config.n_tip, found.chosen.config.budget) == (8, 64)


def test_nothing_within_the_bound(tiny: EvalModel, base: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter((0.02, 0.08))  # searched on, held out

    def meter(model: EvalModel, windows: object) -> MadeUpLosses:
        made, loss = MadeUpLosses(0), next(losses)
        made.relative = lambda config: loss / config.budget * 64  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(search, "LossMeter", meter)
    with pytest.raises(FasaError, match=r"within 3.00%.*budget 128, sum, has \+1.00% .* and \+4.00% .*--max-loss 4.0%"):
        tune(tiny, settings(tiny, base), ([], []), length=LENGTH, max_loss=0.03, progress=quiet)


def test_windows_that_do_not_fit(tiny: EvalModel, base: BuildConfig, windows: Windows) -> None:
    with pytest.raises(FasaError, match="do not fit into the memory of cpu"):
        tune(tiny, settings(tiny, base), windows, length=1 << 15, max_loss=0.1, progress=quiet)


def test_frontier_and_counts(base: BuildConfig) -> None:
    points = [Point(base, loss, read) for loss, read in ((0.3, 10), (0.1, 20), (0.2, 30), (0.1, 30), (0.0, 40))]
    assert [(point.loss, point.kv_bytes) for point in frontier(points)] == [(0.3, 10), (0.1, 20), (0.0, 40)]
    assert dense_counts(6) == [1, 2, 3, 4] and dense_counts(2) == [1] and dense_counts(1) == []
    assert dense_counts(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24]


def test_plot(base: BuildConfig) -> None:
    points = (Point(base, 0.3, 1000), Point(replace(base, dense_layers=(0,)), -0.1, 2000, held_out=0.004))
    tuning = Tuning(points[1], points, 0.005, 8000, (2.0, 2.1), (10, 10), 2048)
    drawn = tradeoff_svg(tuning)
    assert drawn == tradeoff_svg(tuning)
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert b"<!-- chosen -->" in drawn and b"2048 tokens" in drawn and b"bound 0.50%" in drawn
