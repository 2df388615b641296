"""What passes are worth: a law that is known is found again, and what lies outside is said to."""

from __future__ import annotations

import json
import math

import pytest
from scipy import stats
from test_ablate import plan_file

from golf import capacity
from golf.errors import UsageError
from golf.plan import configuration, read_plan, words_of

PHI = 0.46  # the published law's
SIZES = {"n1": 1, "n1_5": 1.5, "n2": 2, "n4": 4}
VARIANTS = """
[variants]
n1 = ["--shape.core", "2", "--shape.loops", "1"]
n1_5 = ["--shape.core", "3", "--shape.loops", "1"]
n2 = ["--shape.core", "4", "--shape.loops", "1"]
n4 = ["--shape.core", "8", "--shape.loops", "1"]
twice = ["--shape.core", "2", "--shape.loops", "2"]
four_times = ["--shape.core", "2", "--shape.loops", "4"]
"""


@pytest.fixture
def plan(tmp_path, corpus):
    path = plan_file(tmp_path, corpus)
    head, flags = path.read_text().partition("[variants]")[0], 'flags = ["--shape.prelude", "0", "--shape.coda", "0", '
    path.write_text(head.replace("flags = [", flags) + VARIANTS)
    return path


def rows_of(path, score) -> list[dict]:
    plan, rows = read_plan(path), []
    for seed in plan.seeds:
        for name in plan.variants:
            config = configuration(plan, name, seed)
            rows.append({
                "variant": name, "seed": seed, "equal": plan.equal, "amount": plan.amount, "judge": False,
                "fingerprint": config.fingerprint, "flags": words_of(plan, name, seed), "cpu_share": 1.0,
                "unpacked_val_bpb": score(name, seed, config.shape), "val_bpb": None,
            })  # fmt: skip
    return rows


def law(name: str, seed: int, shape, phi: float = PHI) -> float:
    """bpb that falls with the logarithm of the size, so that what lies between two sizes is exact."""
    return 2.5 + 0.01 * seed - 0.1 * math.log(shape.core * shape.loops**phi)


def test_a_known_law_is_found_again(plan):
    found = {w.variant: w for w in capacity.measure(read_plan(plan), rows_of(plan, law))}
    assert found["twice"].passes == 2 and found["four_times"].passes == 4
    for worth in found.values():
        assert worth.sizes == pytest.approx([worth.passes**PHI] * 2) and worth.of_means == pytest.approx(worth.sizes[0])
        assert worth.phi == pytest.approx(PHI) and worth.interval == pytest.approx((PHI, PHI))


def test_the_interval_is_students(plan):
    slopes = {1: 0.3, 2: 0.5}
    rows = rows_of(plan, lambda name, seed, shape: law(name, seed, shape, slopes[seed]))
    (worth, _) = capacity.measure(read_plan(plan), rows)
    wanted = stats.t.interval(0.95, 1, loc=0.4, scale=0.1)
    assert worth.phi == pytest.approx(0.4) and worth.interval == pytest.approx(wanted) and worth.depth == 2


def test_outside_of_what_was_run_there_is_no_size(plan):
    def score(name, seed, shape) -> float:
        return law(name, seed, shape) + (0.5 if shape.loops == 4 else -0.5 if name == "twice" and seed == 2 else 0)

    rows = rows_of(plan, score)
    path = plan.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (twice, four) = capacity.measure(read_plan(plan), rows)
    assert four.sizes == [None, None] and four.sides == ["under 1"] * 2 and four.phi is four.of_means is None
    assert twice.sizes == [pytest.approx(2**PHI), None] and twice.sides == ["", "over 4"]
    assert twice.phi is None and twice.interval is None  # the mean of the seeds that have a size would be biased
    assert "under 1, under 1" in capacity.table([twice, four])


def test_sizes_that_get_no_better_are_crossed_where_they_do():
    assert capacity.equal_size([1, 2, 4], [2.0, 2.1, 1.9], 2.0) == pytest.approx(2**1.5)
    assert capacity.equal_size([1, 2], [2.0, 2.0], 2.0) is None


def test_a_plan_of_something_else_is_refused(tmp_path, corpus):
    with pytest.raises(UsageError, match="no looped model"):
        capacity.measure(read_plan(plan_file(tmp_path, corpus)), [])
