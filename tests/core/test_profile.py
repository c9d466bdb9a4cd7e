"""Profiles survive the disk, damaged ones are refused, and rankings follow their rules."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile

LAYERS, HEADS, KV_HEADS, CHUNKS, KS = 3, 6, 2, 8, (64, 256, 1024)


def make(seed: int = 0, *, greedy: bool = True, levels: int = 0) -> Profile:
    """levels: draw from that many values only, so that there are ties."""
    rng = np.random.default_rng(seed)

    def table(*shape: int) -> NDArray[np.float32]:
        if levels:
            return rng.integers(0, levels, shape).astype(np.float32)
        return rng.random(shape, np.float32)

    order = rng.permuted(np.tile(np.arange(CHUNKS, dtype=np.int32), (LAYERS, KV_HEADS, 1)), axis=-1)
    return Profile(
        agreement=table(len(KS), LAYERS, HEADS, CHUNKS),
        spread=table(LAYERS, HEADS, CHUNKS),
        ks=KS,
        num_kv_heads=KV_HEADS,
        fingerprint="f" * 64,
        greedy=order if greedy else None,
        info={"samples": 8, "corpus": "caf\N{LATIN SMALL LETTER E WITH ACUTE}"},
    )


@pytest.mark.parametrize("greedy", [True, False])
def test_round_trip(greedy: bool, tmp_path: Path) -> None:
    profile = make(greedy=greedy)
    profile.save(tmp_path / "new" / "profile.safetensors")
    loaded = Profile.load(tmp_path / "new" / "profile.safetensors")
    for field in dataclasses.fields(Profile):
        saved, got = getattr(profile, field.name), getattr(loaded, field.name)
        if isinstance(saved, np.ndarray):
            assert got.dtype == saved.dtype
            np.testing.assert_array_equal(got, saved)
        else:
            assert got == saved and type(got) is type(saved)
    assert (loaded.num_layers, loaded.num_chunks) == (LAYERS, CHUNKS)


def test_smallest_profile(tmp_path: Path) -> None:
    one = np.zeros((1, 1, 1), np.float32)
    profile = Profile(agreement=one[None], spread=one, ks=(1,), num_kv_heads=1, fingerprint="f")
    profile.save(tmp_path / "p")
    assert Profile.load(tmp_path / "p").ranking("agreement", budget=1).tolist() == [[[0]]]


def test_saves_arrays_that_are_not_contiguous(tmp_path: Path) -> None:
    profile = make()
    turned = np.asfortranarray(profile.spread)
    dataclasses.replace(profile, spread=turned[:, ::-1]).save(tmp_path / "p")
    np.testing.assert_array_equal(Profile.load(tmp_path / "p").spread, profile.spread[:, ::-1])


def test_same_measurements_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FasaError, match="cannot write .*permissions"):
        make().save(tmp_path / "file" / "profile.safetensors")


# --- ranking ---


def brute_ranking(table: NDArray[Any], layer: int, kv_head: int) -> list[int]:
    """Picks the chunk with the largest group mean, the first of equals, one after the other."""
    group = HEADS // KV_HEADS
    means = [
        sum(float(table[layer, kv_head * group + g, chunk]) for g in range(group)) / group for chunk in range(CHUNKS)
    ]
    order: list[int] = []
    while len(order) < CHUNKS:
        left = [chunk for chunk in range(CHUNKS) if chunk not in order]
        order.append(max(left, key=lambda chunk: (means[chunk], -chunk)))
    return order


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize(("rule", "budget"), [("spread", 256), ("agreement", 64), ("agreement", 1024)])
def test_ranking(rule: str, budget: int, levels: int) -> None:
    profile = make(seed=budget, levels=levels)
    table = profile.spread if rule == "spread" else profile.agreement[KS.index(budget)]
    got = profile.ranking(rule, budget=budget)
    wanted = [[brute_ranking(table, layer, g) for g in range(KV_HEADS)] for layer in range(LAYERS)]
    assert got.tolist() == wanted
    assert got.dtype == np.int64


def test_greedy_order_is_taken_as_it_is() -> None:
    profile = make()
    assert profile.greedy is not None
    got = profile.ranking("greedy", budget=256)
    np.testing.assert_array_equal(got, profile.greedy)
    assert got.dtype == np.int64


def test_greedy_that_was_not_computed() -> None:
    with pytest.raises(FasaError, match=r"this profile has no greedy order \(calibrate again with --greedy\)"):
        make(greedy=False).ranking("greedy", budget=256)


@pytest.mark.parametrize(
    ("budget", "k"),
    [(1, 64), (64, 64), (127, 64), (129, 256), (256, 256), (511, 256), (513, 1024), (1024, 1024), (99999, 1024)],
)
def test_nearest_k_in_ratio(budget: int, k: int) -> None:
    assert KS[make().nearest_k(budget)] == k


# --- whose profile is it? ---


def test_profile_of_the_model() -> None:
    make().check("f" * 64)


def test_profile_of_another_model() -> None:
    with pytest.raises(FasaError) as caught:
        make().check("0" * 64)
    message = str(caught.value)
    assert "calibrated on another model (profile ffffffffffff, model 000000000000)" in message
    assert "run fasa-trt calibrate on this model" in message


# --- damaged files ---


def refused(path: Path, *words: str) -> None:
    with pytest.raises(FasaError) as caught:
        Profile.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    make().save(tmp_path / "profile.safetensors")
    return tmp_path / "profile.safetensors"


def rewrite(file: Path, facts: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Writes the file again with some facts and tensors replaced, or removed where the new value is `...`."""
    with safe_open(file, framework="numpy") as opened:
        old_facts = json.loads(opened.metadata()["fasa"])
        old_tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    merged = {key: value for key, value in {**old_facts, **facts}.items() if value is not ...}
    arrays = {name: value for name, value in {**old_tensors, **tensors}.items() if value is not ...}
    save_file(arrays, file, metadata={"fasa": json.dumps(merged)})


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such profile", "fasa-trt calibrate")
    refused(tmp_path, "no such profile")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(share: float, file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    refused(file, "is not a calibration profile", "calibrate again")


def test_some_other_safetensors_file(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "is not a calibration profile")


def test_other_schema(file: Path) -> None:
    """Told as such even if everything else has changed too."""
    rewrite(file, {"schema": 99, "ks": ...}, {"spread": ...})
    refused(file, "is a profile of schema 99, this version reads 1", "calibrate again")


@pytest.mark.parametrize("key", ["schema", "ks", "num_kv_heads", "fingerprint", "info"])
def test_missing_fact(key: str, file: Path) -> None:
    rewrite(file, {key: ...}, {})
    refused(file, "is not a calibration profile", key)


@pytest.mark.parametrize("name", ["agreement", "spread"])
def test_missing_table(name: str, file: Path) -> None:
    rewrite(file, {}, {name: ...})
    refused(file, "is not a calibration profile", name)


@pytest.mark.parametrize("metadata", ["", "[]", "3", "null", '"x"'])
def test_facts_are_garbage(metadata: str, file: Path) -> None:
    save_file({"spread": np.zeros((1, 1, 1), np.float32)}, file, metadata={"fasa": metadata})
    refused(file, "is not a calibration profile")


@pytest.mark.parametrize(
    ("facts", "tensors"),
    [
        ({"ks": [64]}, {}),
        ({"ks": []}, {"agreement": np.zeros((0, LAYERS, HEADS, CHUNKS), np.float32)}),
        ({"ks": [0, 256, 1024]}, {}),
        ({"ks": ["64", "256", "1024"]}, {}),
        ({"num_kv_heads": 4}, {"greedy": ...}),
        ({"num_kv_heads": 0}, {"greedy": ...}),
        ({"num_kv_heads": -2}, {"greedy": ...}),
        ({"num_kv_heads": "2"}, {"greedy": ...}),
        ({}, {"spread": np.zeros((LAYERS, HEADS, CHUNKS + 1), np.float32)}),
        ({}, {"spread": np.zeros((LAYERS, HEADS * CHUNKS), np.float32)}),
        ({}, {"spread": np.zeros((LAYERS, 0, CHUNKS), np.float32)}),
        (
            {},
            {
                "spread": np.zeros((LAYERS, 0, CHUNKS), np.float32),
                "agreement": np.zeros((len(KS), LAYERS, 0, CHUNKS), np.float32),
            },
        ),
        ({}, {"agreement": np.zeros((LAYERS, HEADS, CHUNKS), np.float32)}),
        ({}, {"greedy": np.tile(np.arange(CHUNKS, dtype=np.int32), (LAYERS, HEADS, 1))}),
        ({}, {"greedy": np.zeros((LAYERS, KV_HEADS, CHUNKS), np.int32)}),
        ({}, {"greedy": np.tile(np.arange(1, CHUNKS + 1, dtype=np.int32), (LAYERS, KV_HEADS, 1))}),
    ],
)
def test_tables_that_do_not_fit_together(facts: dict[str, Any], tensors: dict[str, Any], file: Path) -> None:
    rewrite(file, facts, tensors)
    refused(file, "is not a calibration profile", "calibrate again")
