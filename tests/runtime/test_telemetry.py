"""ONNX Runtime's own telemetry is off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import pathlib, sys
from runtime.backends import open_backend
from runtime.manifest import load_manifest
bundle = pathlib.Path(sys.argv[1])
open_backend("cpu").load(bundle, load_manifest(bundle).engine("solver_step"))
"""


@pytest.mark.parametrize(("setting", "collects"), [({}, False), ({"ORT_DISABLE_TELEMETRY": "0"}, True)])
def test_nothing_is_collected_unless_the_user_asks_for_it(
    setting: dict[str, str], collects: bool, bundle: Path, tmp_path: Path
) -> None:
    """It kept a random identifier in the folder for temporary files, and a queue of events in the cache folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp_path))
    subprocess.run([sys.executable, "-c", PROGRAM, str(bundle)], env=kept | places | setting, check=True, timeout=60)
    assert bool(list(tmp_path.rglob("*"))) == collects
