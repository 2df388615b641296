"""The runner: plans are checked, runs are rows, an interrupted comparison goes on, the table says what was equal."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, run

from golf import records
from golf.ablate import Load, with_paces
from golf.errors import UsageError
from golf.plan import average_step_flops, budget_flags, configuration, make_plan, read_plan, words_of, work_of
from golf.result_rows import bpb_of, read_rows, same, table, wanted

PLAN = """
preset = "smoke"
data = "{data}"
equal = "{equal}"
amount = {amount}
seeds = [1, 2]
flags = {flags}
[variants]
control = []
slow = ["--recipe.matrix-rate", "0.001"]
broken = ["--run.micro-rows", "{rows}"]
"""


def plan_file(place: Path, corpus: Path, equal: str = "steps", amount: float = 3, rows: int = 4) -> Path:
    path = place / "plan.toml"
    flags = json.dumps(list(TINY))
    path.write_text(PLAN.format(data=corpus, equal=equal, amount=amount, flags=flags, rows=rows))
    return path


@pytest.mark.slow
def test_runs_become_rows_and_a_table_and_are_not_run_twice(tmp_path, corpus):
    path = plan_file(tmp_path, corpus)
    path.write_text(f'keep = "{tmp_path}/kept"\n' + path.read_text())
    first = run("-m", "golf.ablate", path, "--most", 2)
    assert first.returncode == 0, first.stderr
    rows = read_rows(path.with_suffix(".jsonl"))
    assert [(r["variant"], r["seed"]) for r in rows] == [("control", 1), ("slow", 1)]  # seed by seed
    with open(path.with_suffix(".jsonl"), "a") as file:
        file.write('{"variant": "contr')  # cut off by a crash
    second = run("-m", "golf.ablate", path)
    assert second.returncode == 0, second.stderr
    rows = read_rows(path.with_suffix(".jsonl"))
    assert len(rows) == 6 and len({(r["variant"], r["seed"]) for r in rows}) == 6
    assert all(r["steps"] == 3 for r in rows if r["status"] == "complete")
    assert "Equal steps: 3 steps" in second.stdout and "Welch p" in second.stdout
    again = run("-m", "golf.ablate", path, "--table")
    assert again.stdout in second.stdout
    kept = records.read(tmp_path / "kept" / "slow-seed2")
    assert (kept.name, kept.record) == ("slow-seed2", str(tmp_path / "kept" / "slow-seed2")) and kept.seed == 2


@pytest.mark.parametrize(("change", "words"), [
    (("equal =", "eqal ="), "eqal is unknown"), (('"steps"', '"luck"'), "give one of time"),
    (('"smoke"', '"smok"'), "preset 'smok'"), (("seeds = [1, 2]", "seeds = 1"), "seeds is 1"),
    (("amount = 3", ""), "amount is missing"), (("[variants]", "[variants"), "is not TOML"),
    (('"0.001"', '"fast"'), "matrix-rate"), (("control = []", "control = 3"), "variant control"),
    (("amount = 3", "amount = -5"), "amount is -5"), (("amount = 3", "amount = nan"), "amount is nan"),
    (("amount = 3", "amount = true"), "amount is True"), (("[1, 2]", '[1, "x"]'), "seed 'x' is no whole number"),
])  # fmt: skip
def test_a_plan_that_cannot_work_is_one_sentence(tmp_path, corpus, change, words):
    path = plan_file(tmp_path, corpus)
    path.write_text(path.read_text().replace(*change))
    done = run("-m", "golf.ablate", path)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_a_plan_may_be_given_as_options(tmp_path, corpus):
    words = ["--preset", "smoke", "--data", str(corpus), "--amount", "2", "--seeds", "3", "4", "--variants",
             f"control={' '.join(TINY)}", f"slow={' '.join(TINY)} --recipe.matrix-rate 0.001"]  # fmt: skip
    done = run("-m", "golf.ablate", *words, "--results", tmp_path / "x.jsonl", "--table")
    assert done.returncode == 0 and "seeds [3, 4]" in done.stdout and "| slow |" in done.stdout, done.stderr
    assert "--results" in run("-m", "golf.ablate", *words).stderr
    assert "--preset: give it" in run("-m", "golf.ablate", "--results", "x").stderr
    for words, said in ((["a=", "a="], "stands twice"), (['a="x'], "quotation mark"), (["a"], "NAME=FLAGS")):
        done = run("-m", "golf.ablate", "--preset", "smoke", "--amount", 2, "--results", "x", "--variants", *words)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [[], ["--pairs"]])
def test_a_comparison_that_is_asked_to_end_takes_its_runs_with_it(tmp_path, corpus, pairs):
    path = plan_file(tmp_path, corpus, amount=100_000)
    process, found = subprocess.Popen([sys.executable, "-m", "golf.ablate", str(path), *pairs], cwd=ROOT), []
    try:
        wanted = 1 + len(pairs)
        for _ in range(300):
            found = [p for p in psutil.Process(process.pid).children() if str(ROOT / "train_gpt.py") in p.cmdline()]
            if len(found) >= wanted and all(p.cpu_times().user > 1 for p in found):
                break
            time.sleep(0.1)
        assert len(found) >= wanted
        process.terminate()
        assert process.wait(20) == 130
        assert not [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    finally:
        for one in (process, *found):
            with contextlib.suppress(psutil.Error):
                one.kill()
    assert not path.with_suffix(".jsonl").exists()


def row(variant: str, seed: int, bpb: float, **more: object) -> dict:
    return {"variant": variant, "seed": seed, "val_bpb": bpb, "equal": "time", "amount": 3, "cpu_share": 1.0,
            "steps": 10, "train_seconds": 1.0, "tokens_per_second": 9.0, "tokens": 90, "bytes_total": 5,
            "status": "complete", **more}  # fmt: skip


def test_the_table_pairs_seeds_and_leaves_void_runs_out(tmp_path, corpus):
    plan = read_plan(plan_file(tmp_path, corpus, "time"))

    def of(variant: str, seed: int, bpb: float, **more: object) -> dict:
        config = configuration(plan, variant, seed)
        words = [*words_of(plan, variant, seed), *budget_flags(plan, variant, config)]
        return row(variant, seed, bpb, fingerprint=config.fingerprint, flags=words, judge=False, **more)

    rows = [of(v, s, b) for v, s, b in (
        ("control", 1, 2.0), ("control", 2, 2.2), ("slow", 1, 1.9), ("slow", 2, 2.1))]  # fmt: skip
    rows.append(of("broken", 1, 1.0, cpu_share=0.9))
    text = table(plan, rows)
    assert "+0.1000 | 0.0000" in text and text.index("| slow") < text.index("| control")
    assert "| broken | - |" in text
    assert wanted(plan, rows) == [("broken", 1), ("broken", 2)]
    rows.append(of("broken", 1, 1.0, cpu_share=0.9))
    assert wanted(plan, rows) == [("broken", 2)]  # tried often enough


def test_a_variant_may_name_data_of_its_own(tmp_path, corpus):
    path = plan_file(tmp_path, corpus)
    path.write_text(path.read_text().replace("control = []", 'control = ["--run.data", "elsewhere"]'))
    plan = read_plan(path)
    assert configuration(plan, "control", 1).run.data == "elsewhere"
    assert configuration(plan, "slow", 1).run.data == str(corpus)


def test_a_variant_may_begin_with_a_preset_of_its_own(tmp_path, corpus):
    path = plan_file(tmp_path, corpus)
    path.write_text(path.read_text().replace("control = []", 'control = ["laptop_naive", "--run.compile", "model"]'))
    plan = read_plan(path)
    control, slow = (configuration(plan, name, 1) for name in ("control", "slow"))
    assert (control.preset, slow.preset) == ("laptop_naive", "smoke")
    assert control.run.compile == "model" and control.run.data == slow.run.data == str(corpus)


def test_equal_flops_gives_steps_by_the_work_of_each(tmp_path, corpus):
    plan = read_plan(plan_file(tmp_path, corpus, "flops", 1e12))
    config = configuration(plan, "control", 1)
    (_, steps) = budget_flags(plan, "control", config)
    assert int(steps) == round(1e12 / average_step_flops(config))


def test_a_results_file_with_another_fault_is_refused(tmp_path):
    good = json.dumps(row("a", 1, 2.0, flags=[])).encode()
    for bad in (b"{broken}", b"5", b"{}", b"\xff", b"[" * 100_000):
        (tmp_path / "x.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good + b"\n")
        with pytest.raises(UsageError, match="line 2"):
            read_rows(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(good + b"\n" + good[:30])  # cut off
    assert len(read_rows(tmp_path / "x.jsonl")) == 1


def test_a_row_of_other_options_of_the_run_is_another(tmp_path, corpus):
    """The number type is in no fingerprint, and moves scores."""
    plan = read_plan(plan_file(tmp_path, corpus))
    words = [*words_of(plan, "control", 1), *budget_flags(plan, "control", configuration(plan, "control", 1))]
    mine = row("control", 1, 2.0, equal="steps", amount=plan.amount, flags=words, judge=False,
               fingerprint=configuration(plan, "control", 1).fingerprint)  # fmt: skip
    assert same(plan, mine)
    other = replace(plan, variants=plan.variants | {"control": ["--run.dtype", "bfloat16"]})
    assert not same(other, mine) and ("control", 1) in wanted(other, [mine])
    assert not same(plan, mine | {"flags": [*words, "--run.threads=7"]})
    bytes_ = replace(plan, equal="bytes", flags=[*plan.flags, "--run.cap", "60"])
    words = [*words_of(bytes_, "control", 1), *budget_flags(bytes_, "control", configuration(bytes_, "control", 1))]
    short = mine | {"equal": "bytes", "flags": words}
    assert same(bytes_, short) and not same(replace(bytes_, flags=[*plan.flags, "--run.cap", "30"]), short)


@pytest.mark.parametrize("text", ["[]", "{", '{"control": 1}', '{"control": {"work": "x"}}', "[" * 100_000])
def test_paces_that_are_none_are_one_sentence(tmp_path, corpus, text):
    path = plan_file(tmp_path, corpus, "pace")
    path.with_suffix(".pace.json").write_text(text)
    with pytest.raises(UsageError, match="pace.json"):
        with_paces(read_plan(path), path.with_suffix(".jsonl"))


def test_options_that_a_search_lacks_are_refused(tmp_path):
    done = run("-m", "golf.ablate", "--space", tmp_path / "x.toml", "--most", 2)
    assert done.returncode == 2 and "--most" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "ablations").glob("*.toml")), ids=lambda p: p.stem)
def test_the_plans_that_come_with_the_program_can_be_read(path):
    """And their tables printed: paces beside them are of what their variants compute."""
    plan, results = read_plan(path), path.with_suffix(".jsonl")
    assert plan.seeds and plan.variants
    if path.with_suffix(".pace.json").exists():
        plan = with_paces(plan, results)
    if results.exists() and (plan.equal != "pace" or plan.paces):
        assert table(plan, read_rows(results)).count("\n| ") >= len(plan.variants)


def test_a_run_that_crashed_has_no_score():
    row = {"unpacked_val_bpb": 2.0, "status": "crash"}
    assert bpb_of(row) is None and bpb_of(row | {"status": "complete"}) == 2.0
    assert bpb_of(row | {"status": "complete", "quantization_penalty": {}}) is None  # it was not measured


def test_a_pace_is_of_what_a_variant_computes(tmp_path, corpus):
    """Another width under the same name is timed again; another rate is not."""
    plan = make_plan({"preset": "smoke", "data": str(corpus), "equal": "pace", "amount": 1, "seeds": [1],
                      "variants": {"a": [*TINY]}}, "plan")  # fmt: skip
    results = tmp_path / "rows.jsonl"
    with pytest.raises(UsageError, match="nothing is timed yet"):
        with_paces(plan, results)
    work = work_of(configuration(plan, "a", 1))
    results.with_suffix(".pace.json").write_text(json.dumps({"a": {"work": work, "pace": "1=5.0"}}))
    assert with_paces(plan, results).paces == {"a": "1=5.0"}
    slower = replace(plan, variants={"a": [*TINY, "--recipe.matrix-rate", "0.01"]})
    assert with_paces(slower, results).paces == {"a": "1=5.0"}
    with pytest.raises(UsageError, match="delete the file"):
        with_paces(replace(plan, variants={"a": [*TINY, "--shape.width", "64"]}), results)


def test_the_share_of_two_runs_is_of_the_time_in_which_both_ran():
    """One ends early: what comes after says nothing of a pair."""
    spin = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\ntime.sleep(1)"
    short, long = (subprocess.Popen([sys.executable, "-c", spin.format(s)]) for s in (1.5, 3.0))
    load = Load(2)
    load.add(short)
    load.look()
    assert load.ours == 0
    load.add(long)
    while long.poll() is None:
        load.look()
        at_the_end = load.ours
        time.sleep(0.05)
    assert at_the_end == load.ours and 1.0 < load.ours < 4.8 and 0 < load.share() <= 1
