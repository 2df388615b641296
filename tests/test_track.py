"""The mirror: refused in a sentence where trackio is missing, and every step where it is there."""

from __future__ import annotations

import sqlite3
from importlib.util import find_spec

import pytest

from golf import track
from golf.presets import PRESETS
from tests.conftest import ROOT, TINY, run


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed here")
def test_a_mirror_without_trackio_is_refused_before_any_time_is_spent(corpus, tmp_path):
    done = run("train_gpt.py", "smoke", *TINY, "--run.data", corpus, "--run.runs", tmp_path, "--run.track", "trackio")
    assert done.returncode == 2 and "pip install trackio" in done.stderr and not list(tmp_path.iterdir())


def test_every_step_of_a_kept_run_is_mirrored(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    track.mirror(next((ROOT / "runs").glob("*laptop-seed1*")), PRESETS["laptop"])
    (store,) = tmp_path.glob("*.db")
    with sqlite3.connect(store) as found:
        assert found.execute("select count(*) from metrics").fetchone()[0] >= 3423
