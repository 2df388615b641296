"""The benchmark for GPUs, as far as a CPU can run it, and what training does only there."""

import json
from itertools import pairwise

import pytest
import torch
from conftest import run

from golf.loss import pieces
from golf.presets import PRESETS
from golf.shape import MOST_LOGITS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so():
    done = run("bench/gpu.py")
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not done.stdout


@pytest.mark.slow
def test_rows_and_checks_run_on_a_cpu():
    done = run("bench/gpu.py", "--device", "cpu", "--rows", "smoke:none,nonsense:none", "--json", timeout=280)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and list(found["failed"]) == ["nonsense:none"]
    assert "KeyError" in found["failed"]["nonsense:none"]
    paths = {row["path"]: row["good"] for row in found["checks"]}
    assert all(paths.values()) and {"float32 none", "bfloat16 none", "bundle"} <= set(paths), found["checks"]
    row = found["rows"]["smoke:none"]["loops"]
    assert set(row) == {"1", "3"} and row["3"]["step_ms"][1] > row["1"]["step_ms"][1]
    for one in row.values():
        seconds = 1e-3 * one["step_ms"][1]
        assert one["tokens_per_second"] == pytest.approx(PRESETS["smoke"].recipe.batch_tokens / seconds, rel=0.01)


def test_logits_on_a_gpu_stay_below_their_bound():
    class OnGpu:
        is_cuda = True

        def __len__(self):
            return 98_304

    for vocabulary in (1024, 8192, 65_536):
        found = pieces(OnGpu(), vocabulary)
        assert max(p.stop - p.start for p in found) * vocabulary <= MOST_LOGITS
        assert found[0].start == 0 and found[-1].stop >= 98_304
        assert all(a.stop == b.start for a, b in pairwise(found))
