"""The examples, as a reader would run them."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT, run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more", "best"), [("ngram", (), 3.6), ("plain", (6,), 4.5)])
def test_a_strangers_submission_is_built_and_judged(corpus, tmp_path, name, more, best):
    out = tmp_path / name
    built = run(f"examples/{name}/build.py", corpus, out, *more)
    assert built.returncode == 0, built.stderr
    done = run("eval_bpb.py", out, "--data", corpus, "--json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["valid"] and 1 < verdict["val_bpb"] < best
    again = run(f"examples/{name}/build.py", corpus, out, *more)
    assert again.returncode != 0  # the folder is there


def test_examples_use_none_of_our_code():
    for path in (ROOT / "examples").glob("*/*.py"):
        assert "import golf" not in path.read_text() and "from golf" not in path.read_text(), path


def test_readmes_tables_are_those_of_the_run_folders():
    done = run("examples/tables.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| bpb |" in done.stdout and "seed" in done.stdout
