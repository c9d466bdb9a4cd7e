"""Our declarations of the V3 plugin interface against TensorRT's own headers: wherever TENSORRT_ROOT names these."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fasa_trt.plugins.library import TENSORRT
from tests.plugins.tensorrt.conftest import official_headers, require_compiler
from tests.plugins.tensorrt.driver import COMPILER, HERE, compile_shared, cuda_include


def options(headers: Path | None) -> list[str]:
    return ["-DFASA_TENSORRT_HEADERS=1", "-isystem", str(headers)] if headers else []


def heard(folder: Path, object_headers: Path | None, caller_headers: Path | None) -> list[str]:
    """What a caller compiled with one interface hears from objects compiled with another."""
    folder.mkdir()
    objects = compile_shared(folder / "objects.so", [HERE / "probe_object.cpp"], *options(object_headers))
    command = [
        str(COMPILER), "-std=c++17", f"-I{TENSORRT}", "-isystem", str(cuda_include()), *options(caller_headers),
        str(HERE / "probe_caller.cpp"), str(objects), "-o", str(folder / "caller"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return subprocess.run([folder / "caller"], capture_output=True, text=True, check=True).stdout.splitlines()


def test_ours_with_ours(tmp_path: Path) -> None:
    """The probe itself: every method answers with its own number."""
    require_compiler()
    lines = heard(tmp_path / "both", None, None)
    assert lines[:6] == [
        "core 'PLUGIN_V3ONE_CORE' 1 0, language 0",
        "build 'PLUGIN_V3ONE_BUILD' 1 0, language 0",
        "runtime 'PLUGIN_V3ONE_RUNTIME' 1 0, language 0",
        "plugin 'PLUGIN' 1 0, language 0",
        "creator 'PLUGIN CREATOR_V3ONE' 1 0, language 0",
        "core 1 2 3",
    ]
    assert lines[6:18] == [
        "configurePlugin 3112",
        "getOutputDataTypes 242",
        "getOutputShapes 315",
        "its result 83",
        "supportsFormatCombination 1",
        "getNbOutputs 5",
        f"getWorkspaceSize {(6 << 40) + 3}",
        "getValidTactics 71",
        "getNbTactics 8",
        "getTimingCacheID 9",
        "getFormatCombinationLimit 10",
        "getMetadataString 0",
    ]
    assert lines[18:29] == [
        "setTactic 1003",
        "onShapeChange 2312",
        "enqueue 3019",
        "attachToContext 4",
        "getFieldsToSerialize 1 field data 10 11",
        "getCapabilityInterface 1",
        "getCapabilityInterface 2",
        "getCapabilityInterface 3",
        "clone 5",
        "createPlugin 8",
        "getFieldNames 12",
    ]


def test_ours_with_tensorrts(tmp_path: Path) -> None:
    require_compiler()
    headers = official_headers()
    if headers is None:
        pytest.skip("needs TENSORRT_ROOT")
    theirs = heard(tmp_path / "theirs", headers, headers)
    assert heard(tmp_path / "ours", None, None) == theirs
    assert heard(tmp_path / "our-caller", headers, None) == theirs
    assert heard(tmp_path / "our-objects", None, headers) == theirs
