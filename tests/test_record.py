"""Run folders as people meet them: listed, compared, cleaned."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from scipy import stats as scipy_stats

from golf import records, run_list, stats, verdicts
from golf.errors import UsageError
from golf.log_file import lock
from golf.presets import PRESETS, parse_command_line
from tests.conftest import ROOT, run


def folder_of(place: Path, name: str, **values: object) -> Path:
    """A run folder with a record of these values and nothing else."""
    folder = place / name
    folder.mkdir(parents=True)
    config = replace(PRESETS["smoke"])
    usual = records.Record(
        name=name, track="smoke", corpus="builtin", corpus_fingerprint="c0", cap=400_000, preset="smoke",
        fingerprint="f0", seed=1, val_loss=2.0, val_bpb=1.5, config=json.loads(json.dumps(asdict(config))),
    )  # fmt: skip
    (folder / "log.jsonl").write_text('{"event": "start"}\n')
    records.write(folder, replace(usual, **values))
    return folder


def seeds(place: Path, name: str, losses: list[float], **values: object) -> list[Path]:
    return [folder_of(place, f"{name}-{n}", seed=n, val_loss=loss, val_bpb=loss * 0.75, **values)
            for n, loss in enumerate(losses, 1)]  # fmt: skip


# == comparing =====================================================================================================


def test_a_comparison_is_welchs_test_as_scipy_has_it(tmp_path):
    ours, theirs = [2.000, 2.004, 1.999], [2.020, 2.018, 2.027]
    found = stats.compare(ours, [v / 2 for v in ours], theirs, [v / 2 for v in theirs])
    assert found.p == scipy_stats.ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue
    assert found.gain_nats == pytest.approx(statistics.mean(theirs) - statistics.mean(ours))
    shifted = scipy_stats.ttest_ind([v + 0.005 for v in ours], theirs, equal_var=False, alternative="less").pvalue
    assert found.p_rule == pytest.approx(shifted) and found.meets_rule and found.meets_practice


def test_a_gain_that_is_hardly_the_rules_is_not_shown_to_be_it():
    ours, theirs = [2.0, 2.0005, 1.9995], [2.006, 2.0065, 2.0055]
    found = stats.compare(ours, ours, theirs, theirs)
    assert found.p < 0.01 < found.p_rule and found.gain_nats > 0.005 and not found.meets_rule


def test_each_seed_beyond_those_planned_is_a_look():
    ours, theirs = [2.00, 2.01, 2.02, 2.00], [2.03, 2.02, 2.04]
    once, more = (stats.compare(ours, ours, theirs, theirs, planned) for planned in (0, 3))
    assert once.looks == 1 and more.looks == 2
    assert more.p == pytest.approx(2 * once.p) and more.p_rule == pytest.approx(min(1.0, 2 * once.p_rule))


def test_seeds_needed_are_enough_and_one_fewer_is_not():
    need = stats.seeds_needed(0.012, 0.004)
    error = lambda n: 0.004 * (2 / n) ** 0.5  # noqa: E731
    p = [scipy_stats.t.sf((0.012 - 0.005) / error(n), 2 * (n - 1)) for n in (need - 1, need)]
    assert p[0] >= 0.01 > p[1]
    assert stats.seeds_needed(0.004, 0.001) is None and stats.seeds_needed(0.0051, 1.0) is None


def test_one_seed_a_side_is_no_test():
    found = stats.compare([2.0], [1.5], [3.0], [2.5])
    assert found.p is None and not found.meets_rule and "no test" in found.sentences()[-1]


def test_the_command_compares_names_those_left_out_and_refuses_other_corpora(tmp_path):
    ours = seeds(tmp_path, "ours", [2.00, 2.01, 2.005], fingerprint="f1")
    theirs = seeds(tmp_path, "theirs", [2.05, 2.06, 2.055], fingerprint="f2")
    fourth = folder_of(tmp_path, "ours-4", seed=4, fingerprint="f1", val_loss=2.2)
    words = ["record.py", "compare", *ours, "--against", *theirs, "--planned", 3]
    told = json.loads(run(*words, "--json").stdout)
    assert told["meets_rule"] and told["ours"] == told["theirs"] == 3 and told["gain_nats"] == pytest.approx(0.05)
    assert [r["run"] for r in told["left_out"]] == [fourth.name]
    said = run(*words)
    assert "rule, 0.005 nats at p < 0.01: met" in said.stdout and "left out" in said.stderr
    elsewhere = seeds(tmp_path, "other", [2.1, 2.2], fingerprint="f3", corpus_fingerprint="c1")
    done = run("record.py", "compare", *ours, "--against", *elsewhere)
    assert done.returncode == 2 and "--mixed" in done.stderr
    assert run("record.py", "compare", *ours, "--against", *elsewhere, "--mixed").returncode == 0
    itself = run("record.py", "compare", *ours, "--against", *theirs, ours[0])
    assert itself.returncode == 2 and "on both sides" in itself.stderr


@pytest.mark.parametrize(("values", "said"), [
    ({"seed": 1}, "seed 1 stands twice"), ({"fingerprint": "other", "seed": 9}, "2 configurations"),
    ({"status": "crash", "seed": 9}, "no valid score (crash)"),
    ({"seed": 9, "config": {"run": {"cap": 5}}}, "differ in seconds of training"),
    ({"seed": 9, "config": {"run": {"max_steps": 5}}}, "differ in --run.max-steps"),
])  # fmt: skip
def test_a_side_is_one_configuration_and_every_seed_once(tmp_path, values, said):
    ours = seeds(tmp_path, "ours", [2.0, 2.1])
    with pytest.raises(UsageError, match=said.replace("(", r"\(").replace(")", r"\)")):
        run_list.sides([*ours, folder_of(tmp_path, "more", **values)], ours, mixed=False)


def test_seed_0_stands_twice_like_any_other(tmp_path):
    twice = [folder_of(tmp_path, name, seed=0) for name in ("a", "b")]
    with pytest.raises(UsageError, match="seed 0 stands twice"):
        run_list.sides(twice, seeds(tmp_path, "theirs", [2.0, 2.1]), mixed=False)


def test_other_tokenizers_are_compared_in_bits_a_byte(tmp_path):
    """Larger pieces cost more nats each: what is better is what takes fewer bits a byte."""
    ours = seeds(tmp_path, "ours", [4.80, 4.81, 4.79], tokenizer_sha256="large")
    for folder, bpb in zip(ours, (2.10, 2.11, 2.09), strict=True):
        records.write(folder, replace(records.read(folder), val_bpb=bpb))
    theirs = seeds(tmp_path, "theirs", [3.96, 3.97, 3.95], tokenizer_sha256="small")  # 0.75 of that in bits a byte
    done = run("record.py", "compare", *ours, "--against", *theirs, "--json")
    told = json.loads(done.stdout)
    assert told["gain_bpb"] == pytest.approx(2.97 - 2.10) and told["gain_nats"] == pytest.approx(0.87 / 0.75)
    assert told["meets_rule"]
    assert "tokenizers differ" in run("record.py", "compare", *ours, "--against", *theirs).stdout


def test_a_run_that_was_lost_is_named_as_left_out(tmp_path):
    ours, theirs = seeds(tmp_path, "ours", [2.0, 2.1]), seeds(tmp_path, "theirs", [2.2, 2.3])
    (tmp_path / "killed").mkdir()
    told = '{"event": "start", "fingerprint": "f0", "corpus": {"fingerprint": "c0"}, "config": {"run": {"cap": CAP}}}\n'
    (tmp_path / "killed" / "log.jsonl").write_text(told.replace("CAP", "0"))
    (tmp_path / "shorter").mkdir()
    (tmp_path / "shorter" / "log.jsonl").write_text(told.replace("CAP", "5"))  # another experiment
    folder_of(tmp_path, "elsewhere", corpus_fingerprint="c1", seed=9)
    folder_of(tmp_path, "odd", config={"run": {"cap": [1], "max_steps": {}}})
    done = run("record.py", "compare", *ours, "--against", *theirs)
    assert done.stderr.splitlines() == ["left out, of the same configurations: killed (lost)"]


@pytest.mark.parametrize(("text", "said"), [
    ('{"seed": 1%s}' % ("0" * 400), "more digits"), ('{"val_loss": 1%s}' % ("0" * 400), "more digits"),
    ('{"config": {"recipe": [1]}}', "config.recipe is not an object"),
    ('{"name": "\\ud800"}', "half a character"), ('{"more": [{"corpus": "c\\udfff"}]}', "half a character"),
])  # fmt: skip
def test_a_record_with_numbers_or_parts_of_no_use_is_refused(tmp_path, text, said):
    (tmp_path / "submission.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        records.read(tmp_path)


# == listing =======================================================================================================


def test_every_started_run_is_listed_however_it_ended(tmp_path):
    folder_of(tmp_path, "scored")
    folder_of(tmp_path, "stopped", status="interrupted", reason="asked to stop", val_bpb=None, val_loss=None)
    for name, log in (
        ("failed", '{"event": "step", "step": 3}\n{"event": "failed", "error": "RuntimeError: boom"}\n'),
        ("lost", '{"event": "step", "step": 7}\n{"event": "st'), ("empty", ""),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(log)
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "submission.json").write_text('{"schema": 99}')
    (tmp_path / "no run").mkdir()
    rows = {r["run"]: r for r in json.loads(run("record.py", "list", "--runs", tmp_path, "--json").stdout)}
    assert {name: r["status"] for name, r in rows.items()} == {
        "scored": "complete", "stopped": "interrupted", "failed": "crash", "lost": "lost", "empty": "lost",
        "older": "damaged",
    }  # fmt: skip
    assert "boom" in rows["failed"]["reason"] and "step 7" in rows["lost"]["reason"]
    assert "schema 99" in rows["older"]["reason"] and rows["stopped"]["reason"] == "asked to stop"
    plain = run("record.py", "list", "--runs", tmp_path)
    assert plain.returncode == 0 and plain.stdout.splitlines()[-1] == "6 runs, 1 with a score"


def test_a_run_that_is_written_is_running_and_nobody_else_may_write_it(tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom golf.journal import Journal\n"
        "with Journal(Path(sys.argv[1]), 0):\n"
        "    print('open', flush=True)\n    time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(place)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "open\n"
        assert [r.status for r in run_list.started(tmp_path)] == ["running"] and run_list.leftovers(tmp_path) == []
        second = subprocess.run([sys.executable, "-c", script, str(place)], cwd=ROOT, capture_output=True, text=True)
        assert second.returncode != 0 and "another process writes this run" in second.stderr
    finally:
        writer.kill()
        writer.wait()
    assert [r.status for r in run_list.started(tmp_path)] == ["lost"]


def test_a_strangers_words_make_no_tag_and_no_table_in_markdown(tmp_path):
    nasty = "<script>alert(1)</script> | x | [a](javascript:b)\n# `head`"
    folder = folder_of(tmp_path, "run-0", corpus=nasty, blurb=nasty)
    folder.rename(tmp_path / "<img src=x onerror=alert(2)>")
    (folder,) = tmp_path.iterdir()
    pages = run_list.leaderboard(tmp_path), records.readme(folder, replace(records.read(folder), name=nasty))
    assert not re.search(r"<script|<img|(?<!\\)\[a\]|\n# `", "".join(pages))
    assert all(line.count(" | ") in (0, 1, 7) for line in pages[0].splitlines())


def test_two_thousand_runs_are_listed_soon_enough_to_wait_for(tmp_path):
    first = folder_of(tmp_path, "run-0")
    for n in range(1, 2000):
        shutil.copytree(first, tmp_path / f"run-{n}")
    began = time.process_time()
    assert len(run_list.started(tmp_path)) == 2000
    assert time.process_time() - began < 10  # 0.6 to 0.9 s were seen


def test_a_record_shows_what_it_says_and_a_forged_verdict_is_none(tmp_path):
    folder = folder_of(tmp_path, "one", quantization_penalty={"1": 0.02})
    done = run("record.py", "show", folder)
    assert "val_bpb: 1.5" in done.stdout and "+0.02000 bpb" in done.stdout and "verdict: none" in done.stdout
    (folder / "verdict.json").write_text('{"valid": "yes", "checks": 7}')
    assert json.loads(run("record.py", "show", folder, "--json").stdout)["verdict"] is None
    assert run("record.py", "show", tmp_path / "nowhere").returncode == 2


def test_a_record_from_before_a_key_was_there_is_read_everywhere(tmp_path):
    folder, other = folder_of(tmp_path, "old"), folder_of(tmp_path, "other", seed=2)
    told = json.loads((folder / "submission.json").read_text())
    for key in ("training_flops", "quantization_penalty", "content_shapes", "environment"):
        del told[key]
    (folder / "submission.json").write_text(json.dumps(told))
    assert "training_flops: not counted" in run("record.py", "show", folder).stdout
    assert json.loads(run("record.py", "list", "--runs", tmp_path, "--json").stdout)[0]["status"] == "complete"
    for command in (["report", folder], ["compare", folder, "--against", other], ["leaderboard", "--runs", tmp_path]):
        done = run("record.py", *command)
        assert done.returncode == 0, done.stderr


def test_names_with_spaces_and_letters_of_any_script_are_names(tmp_path):
    folder = folder_of(tmp_path, "ein Lauf \u2013 \u8bd5\u9a8c & <b>")
    assert folder.name in run("record.py", "list", "--runs", tmp_path).stdout
    assert run("record.py", "report", folder).returncode == 0
    page = (folder / "report.html").read_text("utf-8")
    assert "&amp; &lt;b&gt;" in page and "<b>" + "&" not in page


@pytest.mark.parametrize("command", [["report", "FOLDER"], ["leaderboard", "--runs", "RUNS"]])
def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path, command):
    folder = folder_of(tmp_path, "one")
    before = sorted(p for p in tmp_path.rglob("*"))
    words = [{"FOLDER": str(folder), "RUNS": str(tmp_path)}.get(w, w) for w in command]
    # A file-size limit is what a full disk looks like to a process.
    line = f"ulimit -f 0; trap '' XFSZ; exec {shlex.join([sys.executable, str(ROOT / 'record.py'), *words])}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and re.fullmatch(r"error: \S+(html|md): File too large\.\n", done.stderr), done.stderr
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_strangers_words_move_no_cursor(tmp_path):
    folder = folder_of(tmp_path, "one", preset="a\x1b[2Jb", corpus="c\x07", reason="\x1b]0;title", status="crash")
    (folder / "verdict.json").write_text(json.dumps({"valid": False, "invalid": "\x1b[31mred", "checks": []}))
    for command in (["show", folder], ["list", "--runs", tmp_path]):
        done = run("record.py", *command)
        assert done.returncode == 0 and not re.search("[\x1b\x07]", done.stdout), done.stderr


def test_a_run_without_a_record_moves_no_cursor_either(tmp_path):
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "log.jsonl").write_text('{"event": "failed", "error": "\\u001b[31mred"}\n')
    done = run("record.py", "show", tmp_path / "lost")
    assert "[31mred" in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize("config", [{"track": []}, {"preset": {}}, {"run": {"max_steps": []}}])
def test_a_configuration_of_no_kind_is_read_and_compared(tmp_path, config):
    usual = json.loads(json.dumps(asdict(PRESETS["smoke"])))
    ours, theirs = (folder_of(tmp_path, name, config=usual | config) for name in ("one", "two"))
    assert run_list.sides([ours], [theirs], mixed=False) and run_list.others([ours])[0].folder == theirs


def test_what_the_referee_calls_invalid_is_never_ranked_or_compared(tmp_path):
    good, bad = folder_of(tmp_path, "good"), folder_of(tmp_path, "bad", val_bpb=0.9, seed=2)
    (bad / "verdict.json").write_text('{"valid": false, "invalid": "it looks ahead", "checks": []}')
    row = {r["run"]: r for r in json.loads(run("record.py", "list", "--runs", tmp_path, "--json").stdout)}["bad"]
    assert (row["status"], row["reason"], row["val_bpb"]) == ("invalid", "it looks ahead", None)
    board = run("record.py", "leaderboard", "--runs", tmp_path)
    assert "good" in board.stdout and "bad" not in board.stdout and "bad: invalid it looks ahead" in board.stderr
    done = run("record.py", "compare", good, "--against", bad)
    assert done.returncode == 2 and "no valid score (invalid: it looks ahead)" in done.stderr


def test_a_run_that_was_not_judged_is_told_how(tmp_path):
    ours = [folder_of(tmp_path, "none", val_bpb=None, val_loss=None)]
    theirs = [folder_of(tmp_path, "one", seed=2)]
    with pytest.raises(UsageError, match=r"not judged\), `python record.py judge \S+/none`"):
        run_list.sides(ours, theirs, mixed=False)
    for words, said in (((ours[0],), "no artifact"), ((tmp_path / "nothing",), "cannot be read")):
        done = run("record.py", "judge", *words)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_a_referee_called_invalid_stands_as_it_ended_when_it_no_longer_does():
    stopped = records.Record(name="x", status="interrupted", reason="asked to stop", val_bpb=1.0)
    twice = verdicts.called_invalid(verdicts.called_invalid(stopped, "too slow"), "too slow again")
    assert (twice.status, twice.reason, twice.val_bpb) == ("invalid", "too slow again", None)
    again = verdicts.as_it_ended(twice)
    assert (again.status, again.reason, again.extra) == ("interrupted", "asked to stop", {})
    for told in ([], ["crash", "x"], 3, ["interrupted", 4]):  # a stranger's
        odd = replace(twice, extra={"ended": told})
        assert verdicts.as_it_ended(odd).status == "complete"


def test_a_run_that_is_being_judged_is_running(tmp_path):
    folder = folder_of(tmp_path, "packed", val_bpb=None, val_loss=None)
    with open(folder / "log.jsonl", "a") as log:
        assert lock(log)
        assert run_list.one(folder).status == "running"
    assert run_list.one(folder).status == "complete"


def test_a_run_that_can_go_on_is_said_to_and_kept(tmp_path):
    (tmp_path / "lost" / "states").mkdir(parents=True)
    (tmp_path / "lost" / "log.jsonl").write_text('{"event": "step", "step": 7}\n')
    (tmp_path / "lost" / "states" / "000000005.safetensors").write_bytes(b"x")
    shown = run("record.py", "show", tmp_path / "lost").stdout
    assert "status: lost (the log ends at step 7)" in shown and "--run.resume" in shown
    assert json.loads(run("record.py", "show", tmp_path / "lost", "--json").stdout)["status"] == "lost"
    assert run_list.leftovers(tmp_path) == []


def test_a_run_folders_readme_has_the_command_that_makes_it(tmp_path):
    told = ["laptop", "--track", "unlimited", "--shape.loops", "2", "--shape.no-pass-scalars", "--run.seed", "7",
            "--run.data", "data/my texts", "--run.max-steps", "9"]  # fmt: skip
    config = parse_command_line([*told, "--run.name", "here", "--run.runs", "/somewhere"])
    folder = folder_of(tmp_path, "one", preset="laptop", config=json.loads(json.dumps(asdict(config))))
    line = re.search(r"`python train_gpt.py (.*?)`", (folder / "README.md").read_text())[1]
    again = parse_command_line(shlex.split(line))
    assert again == replace(config, run=replace(config.run, name="", runs="runs")) and "/somewhere" not in line


# == cleaning ======================================================================================================


def test_cleaning_takes_only_what_no_record_needs(tmp_path):
    kept = folder_of(tmp_path, "scored")
    for name in ("model.bin", "checkpoint.safetensors", ".model.bin.77.part"):
        (kept / name).write_bytes(b"x" * 100)
    unscored = folder_of(tmp_path, "unscored", val_bpb=None, val_loss=None)
    (unscored / "checkpoint.safetensors").write_bytes(b"x")
    for folder in (kept, unscored):
        (folder / "states").mkdir()
        (folder / "states" / ".3.safetensors.78.part").write_bytes(b"x")
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "log.jsonl").write_text("")
    stopped = folder_of(tmp_path, "stopped", status="interrupted")  # and judged: --run.resume still goes on with it
    (stopped / "states").mkdir()
    (stopped / "states" / "000000005.safetensors").write_bytes(b"x")
    packing = tmp_path / "packing"
    packing.mkdir()
    for name in ("log.jsonl", "checkpoint.safetensors"):  # the weights of a run that was killed while it was packed
        (packing / name).write_text("")
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "thesis").write_text("years of work")
    (lost / "link").symlink_to(outside)
    told = run("record.py", "clean", "--runs", tmp_path)
    assert "would be deleted with --yes" in told.stdout and lost.exists()
    rows = json.loads(run("record.py", "clean", "--runs", tmp_path, "--yes", "--json").stdout)
    assert {Path(r["path"]).name for r in rows} == {
        "checkpoint.safetensors", ".model.bin.77.part", "states", ".3.safetensors.78.part", "lost"}  # fmt: skip
    assert not lost.exists() and (kept / "model.bin").exists() and (unscored / "checkpoint.safetensors").exists()
    assert (outside / "thesis").exists() and (packing / "checkpoint.safetensors").exists()
