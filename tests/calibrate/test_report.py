"""The report: numbers, table, picture."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from fasa_trt.calibrate.report import report_files, summarize, summary_table, write_report
from fasa_trt.calibrate.result import Calibration
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.core.rope import Rotary, chunk_pairs

PNG = b"\x89PNG\r\n\x1a\n"


def calibration(layers: int = 3, kv_heads: int = 2, samples: int = 4, greedy: bool = False) -> Calibration:
    """Random tables of `layers` layers, the last but one without RoPE."""
    rng = np.random.default_rng(0)
    agreement = rng.random((samples, 3, layers, 2 * kv_heads, 16), np.float32)
    spread = rng.random((samples, layers, 2 * kv_heads, 16), np.float32)
    frequencies = (10000.0 ** -(np.arange(16) / 16)).astype(np.float32)
    rotary = Rotary(chunk_pairs(32, 32, interleaved=False), frequencies, np.ones(16, np.float32))
    rotating = [layer for layer in range(layers) if layer != layers - 2]
    rules = ("spread", "agreement", "greedy") if greedy else ("spread", "agreement")
    return Calibration(
        profile=Profile(
            agreement=agreement.mean(0),
            spread=spread.mean(0),
            greedy=np.argsort(rng.random((layers, kv_heads, 16))).astype(np.int32) if greedy else None,
            ks=(64, 128, 256),
            num_kv_heads=kv_heads,
            fingerprint="0" * 64,
            info={"samples": samples, "length": 1024},
        ),
        agreement=agreement,
        spread=spread,
        rotary=dict.fromkeys(rotating, rotary),
        keys=dict.fromkeys(rotating, 1024),
        n_tip=6,
        held_out={rule: rng.uniform(0.5, 1, (3, layers, 2 * kv_heads)).astype(np.float32) for rule in rules},
        remarks=("something to know",),
    )


def test_summary() -> None:
    made = calibration(greedy=True)
    summary = json.loads(json.dumps(summarize(made)))
    assert summary["k"] == 256 and summary["n_tip"] == 6 and summary["chunks"] == 16
    assert [layer["layer"] for layer in summary["layers"]] == [0, 2]
    first = summary["layers"][0]
    assert first["found"]["greedy"] == pytest.approx(made.held_out["greedy"][2, 0].mean(), rel=1e-6)
    assert first["weakest"] == pytest.approx(made.held_out["spread"][2, 0].reshape(2, 2).mean(1).min(), rel=1e-6)
    assert first["best_chunk"] == pytest.approx(made.profile.agreement[2, 0].max(-1).mean(), rel=1e-6)
    assert 0 <= first["stability"] <= 1
    assert summary["warnings"] == ["something to know"] and summary["weak_heads"] == []


def test_stability_is_the_mean_over_pairs_of_samples() -> None:
    made = calibration(samples=3)
    score = made.spread.reshape(3, 3, 2, 2, 16).mean(3)
    sets = [[[set(np.argsort(-score[s, layer, g])[:6]) for g in range(2)] for layer in range(3)] for s in range(3)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    wanted = [
        np.mean([len(sets[s][layer][g] & sets[t][layer][g]) / 6 for s, t in pairs for g in range(2)])
        for layer in range(3)
    ]
    np.testing.assert_allclose(made.stability(), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [1, 4])
def test_table(samples: int) -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(summary_table(summarize(calibration(samples=samples, greedy=True))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("Top 256 keys found by 6 of 16 chunks", "spread", "agreement", "greedy", "stability", "mean", "%"):
        assert word in text
    mean = next(line for line in text.splitlines() if "mean" in line)
    assert (" - " in mean) == (samples == 1)


@pytest.mark.parametrize(("layers", "kv_heads", "greedy"), [(3, 2, True), (2, 1, False), (40, 8, False)])
def test_heat_map(layers: int, kv_heads: int, greedy: bool, tmp_path: Path) -> None:
    """Of readable size, whatever the number of rows."""
    file = tmp_path / "map.png"
    assert write_report(calibration(layers, kv_heads, greedy=greedy), file, title="a model") == [file]
    height, width, _ = matplotlib.image.imread(file).shape
    assert 2000 < width < 2600 and 350 < height < 4000


def test_layers_that_turn_at_different_speeds(tmp_path: Path) -> None:
    made = calibration()
    slower = replace(made.rotary[2], inv_freq=made.rotary[2].inv_freq * np.float32(0.01))
    write_report(replace(made, rotary={**made.rotary, 2: slower}), tmp_path / "map.png", title="a model")


def test_unrotated_chunks(tmp_path: Path) -> None:
    made = calibration()
    partial = replace(made.rotary[0], inv_freq=np.pad(made.rotary[0].inv_freq[:8], (0, 8)))
    write_report(replace(made, rotary=dict.fromkeys(made.rotary, partial)), tmp_path / "map.png", title="a model")


def test_directory(tmp_path: Path) -> None:
    made = calibration()
    files = write_report(made, tmp_path / "new" / "report", title="a model")
    assert [file.name for file in files] == ["calibration.png", "calibration.json"]
    assert files[0].read_bytes().startswith(PNG)
    assert json.loads(files[1].read_text()) == summarize(made)


@pytest.mark.parametrize("name", ["report.pdf", "file"])
def test_impossible_targets(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FasaError, match=r"directory, or a file that ends in \.png"):
        report_files(tmp_path / name)
