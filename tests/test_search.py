"""The search: what is tried, what is left out before training, how the better ones go on."""

from __future__ import annotations

import html
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf import search
from golf.errors import UsageError
from golf.plan import Plan
from golf.result_rows import bpb_of, read_rows
from tests.conftest import TINY, run

PLAN = """
preset = "smoke"
data = "{data}"
equal = "steps"
amount = 8
seeds = [1]
flags = {flags}
[search]
{how}
[space]
{space}
"""


def space_file(place: Path, corpus: Path | str, space: str, how: str = "rounds = 2") -> Path:
    path = place / "space.toml"
    flags = json.dumps([*TINY, "--pack.calibration-batches", "0"])
    path.write_text(PLAN.format(data=corpus, flags=flags, space=space, how=how))
    return path


RATES = '"recipe.matrix-rate" = { low = 0.001, high = 0.1, scale = "log" }'


def test_a_random_search_draws_what_its_seed_says_inside_the_ranges(tmp_path):
    how = 'tries = 12\nseed = {}'
    one, same, other = (
        search.candidates(search.read(space_file(tmp_path, "x", RATES + '\n"shape.loops" = [2, 3]', how.format(seed))))
        for seed in (1, 1, 2)
    )
    assert one == same != other and len(one) == 12
    rates = [c["recipe.matrix-rate"] for c in one]
    assert all(0.001 <= r <= 0.1 for r in rates) and {c["shape.loops"] for c in one} == {2, 3}
    assert sum(r < 0.01 for r in rates) in range(2, 11)  # spread in the logarithm


def test_a_grid_is_every_combination_and_no_configuration_twice(tmp_path):
    grid = search.read(space_file(tmp_path, "x", '"shape.loops" = [2, 3]\n"shape.smear" = [true, false]',
                                  'method = "grid"'))  # fmt: skip
    found = search.candidates(grid)
    assert len(found) == 4 == len({tuple(c.values()) for c in found})
    assert search.flags_of(found[1]) == ["--shape.loops", "2", "--shape.no-smear"]
    few = search.read(space_file(tmp_path, "x", '"shape.loops" = [2, 3]', "tries = 50"))
    assert len(search.candidates(few)) == 2


@given(st.integers(1, 8), st.floats(0.1, 0.9), st.integers(1, 10**5))
def test_rounds_end_at_the_amount_and_grow_by_what_is_kept(rounds, keep, amount):
    plan = Plan("smoke", "x", "steps", amount, [1], {"control": []})
    found = search.amounts(search.Search(plan, {}, rounds=rounds, keep=keep))
    assert len(found) == rounds and found[-1] == amount and found == sorted(found)
    assert all(abs(b * keep - a) <= 1.5 for a, b in itertools.pairwise(found))


def test_what_cannot_fit_is_left_out_before_any_training(tmp_path):
    plan = search.read(space_file(tmp_path, "x", '"shape.width" = [32, 33, 4096]', 'method = "grid"'))
    good, left_out = search.fitting(plan, search.candidates(plan))
    assert [o["shape.width"] for o in good.values()] == [32]
    assert "not divisible" in left_out["c2"] and "bytes" in left_out["c3"]


def test_a_strangers_names_are_escaped_on_the_page():
    nasty = "</title><script>alert(1)</script><img src=x onerror=alert(2)>"
    page = search.picture(nasty, [(1, 8, nasty, 2.0)], {nasty: {nasty: nasty, "recipe.matrix-rate": 0.1}})
    assert "<script" not in page and "<img" not in page and page.count(html.escape(nasty)) >= 3


@pytest.mark.slow
def test_the_better_half_goes_on_and_an_interrupted_search_too(tmp_path, corpus):
    path = space_file(tmp_path, corpus, '"recipe.matrix-rate" = [0.0, 0.02, 0.04]', 'method = "grid"\nrounds = 2')
    done = run("-m", "golf.ablate", "--space", path)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = read_rows(path.with_suffix(".jsonl"))
    first = {r["variant"]: bpb_of(r) for r in rows if r["steps"] == 4}
    second = {r["variant"] for r in rows if r["steps"] == 8}
    assert len(first) == 3 and second == set(sorted(first, key=first.get)[:2]) and "c1" not in second
    page = path.with_suffix(".html").read_text()
    assert page.count('class="curve"') == 3 and "<script" not in page
    lines = path.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    path.with_suffix(".jsonl").write_text("".join(lines[:-1]))
    again = run("-m", "golf.ablate", "--space", path)
    assert again.returncode == 0 and len(read_rows(path.with_suffix(".jsonl"))) == 5
    shown = run("-m", "golf.ablate", "--space", path, "--table")
    assert shown.returncode == 0 and "| 2 | c" in shown.stdout


@pytest.mark.parametrize(("space", "how", "said"), [
    ('"recipe.matrix-rat" = [1.0]', "", "matrix-rat"), (RATES, 'method = "grid"', "a grid takes lists"),
    (RATES, "keep = 1.5", "search.keep"), (RATES, "rounds = 0", "search.rounds"), (RATES, "tires = 4", "search.tires"),
    ('"x" = []', "", "space.x"), ('"x" = { low = 2, high = 1 }', "", "space.x"),
    ('"x" = { low = 0, high = 1, scale = "log" }', "", "space.x"), ("", "", "[space]"),
    ('"shape.width" = [33]', 'method = "grid"', "no configuration"),
])  # fmt: skip
def test_a_space_that_cannot_be_searched_is_one_sentence(tmp_path, space, how, said):
    path = space_file(tmp_path, "nowhere", space, how)
    try:
        found = search.read(path)
        good, left_out = search.fitting(found, search.candidates(found))
        assert not good
        told = " ".join(left_out.values()) + " no configuration"
    except UsageError as error:
        told = str(error)
    assert said in told
    if said in ("a grid takes lists", "no configuration"):
        done = run("-m", "golf.ablate", "--space", path)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
