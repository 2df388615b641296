"""The whole line on real text: train, pack, judge, record; equal over ranks; whole after every mishap."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, run

import artifact
import record
import train_gpt
from golf import prepare, records, run_list, sources
from golf.console import run_script
from golf.errors import UsageError
from golf.guard import Interrupt
from golf.pace import step_flops


def rows(folder: Path, event: str | None = None) -> list[dict]:
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    return [r for r in log if event in (None, r["event"])]


def only(folder: Path) -> Path:
    """The one run folder."""
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    runs = tmp_path_factory.mktemp("runs")
    done = run("train_gpt.py", "smoke", *TINY, "--run.max-steps", 30, "--run.data", corpus, "--run.runs", runs)
    assert done.returncode == 0, done.stderr + done.stdout
    return only(runs), done


@pytest.mark.slow
def test_a_run_without_a_score_is_judged_later(trained, corpus, tmp_path):
    folder = tmp_path / "later"
    shutil.copytree(trained[0], folder)
    told = json.loads((folder / "submission.json").read_text())
    (folder / "submission.json").write_text(json.dumps(told | {"val_bpb": None, "val_loss": None}))
    done = run("record.py", "judge", folder, "--data", corpus)
    assert done.returncode == 0 and "verdict: valid" in done.stdout, done.stderr
    assert json.loads((folder / "submission.json").read_text())["val_bpb"] == pytest.approx(told["val_bpb"], abs=1e-12)


def test_the_closing_block_is_the_record(trained):
    folder, done = trained
    record = json.loads((folder / "submission.json").read_text())
    block = dict(line.split(": ", 1) for line in done.stdout.splitlines()[-14:])
    assert block["verdict"].startswith("valid (")
    keys = (
        "val_bpb val_loss bytes_code bytes_model bytes_total cap headroom steps tokens tokens_per_second train_seconds"
    )
    for key in [*keys.split(), "eval_seconds"]:
        assert block[key] == str(record[key]), key
    assert Path(block["record"]) == folder
    assert record["steps"] == 30 and record["tokens"] == 30 * 512
    config = records.config_of(records.read(folder))
    late = round(30 * (1 - config.recipe.loops_from))
    assert record["training_flops"] == (30 - late) * step_flops(config, 1) + late * step_flops(config)
    assert record["cap"] == 400_000 and record["headroom"] == 400_000 - record["bytes_total"] > 0
    assert record["val_bpb"] < record["unpacked_val_bpb"] * 1.02
    for key in (
        "author",
        "github_id",
        "name",
        "blurb",
        "date",
        "track",
        "val_loss",
        "val_bpb",
        "bytes_total",
        "bytes_code",
    ):
        assert key in record
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "log.jsonl", "model.bin", "report.html", "source", "submission.json", "tokenizer.model",
        "train_gpt.py", "verdict.json",
    ]  # fmt: skip
    text = (folder / "README.md").read_text()
    assert str(record["val_bpb"]) in text and f"{record['bytes_total']}" in text


def test_the_log_has_everything(trained):
    folder, _ = trained
    log = rows(folder)
    start = log[0]
    assert start["event"] == "start"
    assert {"python", "torch", "processor", "cores"} <= set(start["environment"])
    if (ROOT / ".git").exists():
        assert len(start["environment"]["commit"]) == 40 and "dirty" in start["environment"]
    assert start["fingerprint"] == json.loads((folder / "submission.json").read_text())["fingerprint"]
    assert start["corpus"]["fingerprint"]
    steps = rows(folder, "step")
    assert [r["step"] for r in steps] == list(range(1, 31))
    assert [r["loops"] for r in steps] == [1] * 18 + [3] * 12  # from 0.6 of the steps on
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert log[-1]["event"] == "record"


def test_the_folder_counts_what_is_on_disk(trained):
    folder, _ = trained
    done = run("artifact.py", "check", folder, "--json")
    result = json.loads(done.stdout)
    counted = {n: (folder / n).stat().st_size for n in ("train_gpt.py", "model.bin")}
    assert done.returncode == 0
    assert result["code"] == counted["train_gpt.py"]
    assert result["weights"] == counted["model.bin"] and result["other"] == 0
    assert result["total"] == sum(counted.values()) and result["headroom"] == 400_000 - result["total"]
    assert run("artifact.py", "check", folder, "--cap", 1000).returncode == 1
    for wrong in (["/nowhere"], [folder, "--cap", -1], []):
        refused = run("artifact.py", "check", *wrong)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr


def test_unpack_and_pack(trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    weights, again = tmp_path / "w.safetensors", tmp_path / "model.bin"
    assert run("artifact.py", "unpack", folder / "model.bin", weights).returncode == 0
    done = run("artifact.py", "pack", weights, again, "--target-bytes", 20_000, "--json")
    assert done.returncode == 0, done.stderr
    assert 19_950 <= json.loads(done.stdout)["bytes"] == again.stat().st_size <= 20_000
    before = again.read_bytes()
    nowhere = tmp_path / "no" / "such" / "w.safetensors"
    for words in (
        ["unpack", folder / "model.bin", nowhere],
        ["pack", folder / "model.bin", again],
        ["unpack", weights, again],
        ["pack", weights, again, "--matrix-step", 9],
        ["pack", weights, again, "--matrix-step", 0.3],
        ["pack", weights, again, "--target-bytes", 100],
        ["pack", weights, again, "--hessians", weights],
        ["pack", weights, again, "--track", "moon"],
    ):
        monkeypatch.setattr(sys, "argv", ["artifact.py", *map(str, words)])
        assert run_script(artifact.main) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
    assert again.read_bytes() == before


@pytest.mark.slow
def test_the_referee_gives_the_recorded_score_again(trained, corpus):
    folder, _ = trained
    done = run("eval_bpb.py", folder, "--data", corpus, "--json")
    verdict, record = json.loads(done.stdout), json.loads((folder / "submission.json").read_text())
    assert done.returncode == 0
    assert verdict["val_bpb"] == pytest.approx(record["val_bpb"], rel=1e-6)
    assert verdict["val_bytes"] == record["val_bytes"]
    official = json.loads(run("eval_bpb.py", folder, "--data", corpus, "--json", "--official").stdout)
    assert official["val_tokens"] == record["val_tokens"] // 64 * 64


def test_the_model_writes(trained, monkeypatch, capsys):
    folder, _ = trained
    words = ["record.py", "sample", folder, "--prompt", "def main", "--tokens", 12, "--seed", 3]
    first = run(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def main") and len(first.stdout) > 12
    assert "Loops to predict each token, 3.00 of 3 on average" in first.stdout and "\u00b3" in first.stdout

    def again(code: int, *more: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*words, *more)])
        assert run_script(record.main) == code
        return "".join(capsys.readouterr())

    assert again(0) == first.stdout
    told = json.loads(again(0, "--temperature", 0, "--exit", "fixed", "--threshold", 1, "--json"))
    assert told["text"].startswith("def main") and {t["loops"] for t in told["tokens"]} == {1}
    for wrong in ("--temperature -1", "--exit gate"):
        assert again(2, *wrong.split()).count("\n") == 1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_artifact(trained, corpus, tmp_path):
    folder, _ = trained
    done = run("train_gpt.py", "smoke", *TINY, "--run.max-steps", 30, "--run.data", corpus, "--run.runs", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (only(tmp_path) / "model.bin").read_bytes() == (folder / "model.bin").read_bytes()
    assert [r["loss"] for r in rows(only(tmp_path), "step")] == [r["loss"] for r in rows(folder, "step")]


@pytest.mark.slow
def test_a_model_of_transformed_capitals_is_judged_on_the_original_bytes(library_texts, tmp_path):
    source = sources.Source("cased", lambda: iter(library_texts), {"source": "cased"}, [])
    manifest = prepare.prepare(source, tmp_path / "data", prepare.Options(vocab_size=512, transform="case"))
    flags = [*TINY, "--run.max-steps", 3, "--run.data", tmp_path / "data", "--run.runs", tmp_path / "runs"]
    done = run("train_gpt.py", "smoke", *flags)
    assert done.returncode == 0, done.stderr
    verdict = json.loads((only(tmp_path / "runs") / "verdict.json").read_text())
    assert verdict["valid"] and verdict["val_bytes"] == manifest["splits"]["val"]["counted_bytes"], verdict
    said = run("record.py", "sample", only(tmp_path / "runs"), "--prompt", "Return None", "--tokens", 60)
    assert said.returncode == 0 and not set("\ue000\ue001\ue002") & set(said.stdout), said.stderr
    map_ = run("depth_map.py", "map", only(tmp_path / "runs"), "--text", __file__, "--exit", "fixed", "--threshold", 1)
    assert map_.returncode == 2 and "--transform case" in map_.stderr, map_.stderr


@pytest.mark.slow
def test_a_model_whose_tokens_stop_by_themselves_is_judged(corpus, tmp_path):
    flags = [*TINY, "--shape.no-skips", "--recipe.depth-loss", "each", "--recipe.loops-from", 0, "--run.max-steps", 30]
    stops = ["--scoring.exit", "difference", "--scoring.exit-threshold", 0.3]
    done = run("train_gpt.py", "smoke", *flags, *stops, "--run.data", corpus, "--run.runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    folder = only(tmp_path / "runs")
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["valid"] and records.read(folder).content_shapes, verdict
    again = run("artifact.py", "rescore", folder, tmp_path / "other", "--exit", "fixed", "--exit-threshold", 9)
    assert again.returncode == 2 and "exit-threshold 9" in again.stderr, again.stderr


def launch(ranks: int, *words: object) -> subprocess.CompletedProcess:
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train_gpt.py", *words)


@pytest.mark.slow
def test_two_ranks_stop_together_at_the_cap_and_rank_zero_finishes(corpus, tmp_path):
    done = launch(2, "smoke", *TINY, "--run.cap", 4, "--run.data", corpus, "--run.runs", tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((only(tmp_path) / "submission.json").read_text())
    assert record["status"] == "complete" and 2.5 < record["train_seconds"] <= 4.0 and record["val_bpb"] > 0


@pytest.mark.slow
def test_two_ranks_crash_together_and_rank_zero_writes_the_record(corpus, tmp_path):
    flags = ["--run.max-steps", 50, "--recipe.embed-rate", "1e25", "--recipe.clip-norm", 0, "--run.data", corpus]
    done = launch(2, "smoke", *TINY, *flags, "--run.runs", tmp_path)
    assert done.returncode == 1
    assert json.loads((only(tmp_path) / "submission.json").read_text())["status"] == "crash"


def test_warm_up_restores_everything(corpus):
    import torch

    from golf.machine import Machine, accumulate, warm_up
    from golf.model import RecurrentGPT
    from golf.muon import Optimizers
    from golf.objective import Objective
    from golf.presets import PRESETS
    from golf.recipe import Recipe

    shape = replace(PRESETS["smoke"].shape, vocab_size=64, width=16, heads=2, kv_heads=1)
    config = replace(PRESETS["smoke"], shape=shape, recipe=Recipe(sequence_length=8, batch_tokens=32, loops_from=0.5))
    machine = Machine(torch.device("cpu"), torch.float32, "none")
    tokens = torch.arange(40).numpy() % 64
    after = []
    for warm in (False, True):
        model = RecurrentGPT(shape).initialize(config.recipe, 3)
        optimizers = Optimizers(model, config.recipe)
        if warm:
            assert warm_up(model, optimizers, config, machine, 4)
        for _ in range(3):
            optimizers.zero_grad()
            accumulate(model, [(tokens[:32].reshape(4, 8), tokens[1:33].reshape(4, 8))], machine, 3,
                       Objective(config))  # fmt: skip
            optimizers.step(0.1)
        after.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_a_clocked_run_stops_before_its_cap_and_leaves_validation_out(corpus, tmp_path):
    flags = ["--run.cap", 4, "--run.validate-every", 10, "--run.data", corpus, "--run.no-judge",
             "--pack.calibration-batches", 4]  # fmt: skip
    done = run("train_gpt.py", "smoke", *TINY, *flags, "--run.runs", tmp_path)
    assert done.returncode == 0, done.stderr
    trained = rows(only(tmp_path), "trained")[0]
    assert 2.0 < trained["train_seconds"] <= 4.0
    assert rows(only(tmp_path), "validation") and trained["left_out"] > 0
    (calibrated,) = rows(only(tmp_path), "calibrated")
    assert (
        calibrated["batches"] <= 4
        and json.loads((only(tmp_path) / "submission.json").read_text())["train_seconds"] <= 4
    )


def test_a_crash_keeps_the_last_good_weights(corpus, tmp_path):
    flags = ["--run.max-steps", 50, "--recipe.embed-rate", "1e25", "--recipe.clip-norm", 0, "--run.data", corpus]
    done = run("train_gpt.py", "smoke", *TINY, *flags, "--run.runs", tmp_path)
    folder = only(tmp_path)
    record = json.loads((folder / "submission.json").read_text())
    assert done.returncode == 1 and record["status"] == "crash" and "nan" in record["reason"]
    assert "training crash" in done.stdout
    assert (folder / "model.bin").exists()
    from golf import codec

    assert codec.load_artifact(folder / "model.bin")[1]["embedding"].max() < 1e3


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_packs_and_judges_what_there_is(corpus, tmp_path, how):
    words = ["train_gpt.py", "smoke", *TINY, "--run.data", str(corpus), "--run.runs", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-u", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    for line in process.stdout:
        if line.startswith("step     20"):
            process.send_signal(how)
            break
    out, err = process.communicate(timeout=120)
    record = json.loads((only(tmp_path) / "submission.json").read_text())
    assert process.returncode == 130, err
    assert record["status"] == "interrupted" and record["steps"] >= 20 and record["val_bpb"] > 0
    assert "status: interrupted" in out


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once_unless_it_is_an_echo(how):
    interrupt, before = Interrupt(), signal.getsignal(signal.SIGINT)
    with interrupt.watched():
        assert not interrupt.asked
        for _ in range(3):
            os.kill(os.getpid(), how)
        assert interrupt.asked
        interrupt.asked_at -= Interrupt.ECHO_SECONDS + 0.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), how)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_once(corpus, tmp_path):
    flags = ["--run.max-steps", 1, "--recipe.batch-tokens", 64 * 2048, "--recipe.loops-from", 0, "--run.data", corpus,
             "--run.no-judge", "--pack.calibration-batches", 0]  # fmt: skip
    command = [sys.executable, "train_gpt.py", "smoke", *TINY, *map(str, flags), "--run.runs", str(tmp_path)]

    def limited(gigabytes: float) -> subprocess.CompletedProcess:
        shutil.rmtree(tmp_path, ignore_errors=True)
        limit = int(gigabytes * 2**30)
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )  # fmt: skip

    halved = False
    for gigabytes in (3.2, 2.9, 2.7, 2.5, 2.3, 2.1, 1.9, 1.7):
        done = limited(gigabytes)
        if "rows at a time do not fit" in done.stdout and done.returncode == 0:
            halved = True
            break
        assert done.returncode in (0, 2) and (done.returncode == 0 or "--run.micro-rows" in done.stderr), done.stderr
    assert halved, done.stdout + done.stderr


BAD_FLAGS = {
    "--shape.width 33": "--shape.width 33",
    "--shape.widht 32": "--shape.width",
    "--shape.width many": "--shape.width",
    "--shape.vocab-size 1024": "--shape.vocab-size 1024",
    "--recipe.sequence-length 99999968 --recipe.batch-tokens 99999968": "--recipe.sequence-length",
    "--run.data /nowhere": "--run.data /nowhere",
    "--run.runs /proc/runs": "--run.runs",
    "--run.name a/b": "--run.name a/b",
    "--shape.width 1024": "--shape.width 1024",
    "--run.cap 1000": "--run.cap 1000",
    "--run.device tpu": "--run.device",
    "--recipe.warmdown 3": "--recipe.warmdown 3",
    "--shape.mlp-ratio nan": "--shape.mlp-ratio nan",
    "--recipe.adam-beta1 2": "--recipe.adam-beta1 2",
    "--shape.loops 100000": "--shape.loops",
}


def refusal(monkeypatch, capsys, data: Path, runs: Path, *flags: str) -> str:
    """What the training command says when it refuses to start: one sentence, exit 2."""
    monkeypatch.setattr(
        sys, "argv", ["train_gpt.py", "smoke", *TINY, "--run.data", str(data), "--run.runs", str(runs), *flags]
    )
    assert run_script(train_gpt.main) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_mistakes_are_one_sentence_before_any_time_is_spent(corpus, tmp_path, flags, monkeypatch, capsys):
    words = ["train_gpt.py", "smoke", *TINY, "--run.data", str(corpus), "--run.runs", str(tmp_path), *flags.split()]
    monkeypatch.setattr(sys, "argv", words)
    assert run_script(train_gpt.main) == 2
    said = capsys.readouterr().err
    assert BAD_FLAGS[flags] in said and said.count("\n") == 1, said
    assert not list(tmp_path.iterdir())


def test_without_a_cpp_compiler_nothing_is_compiled_and_it_is_said(corpus, tmp_path, monkeypatch, capsys):
    from golf.machine import set_up
    from golf.presets import PRESETS

    monkeypatch.setenv("CXX", "no-such-compiler")
    auto = replace(PRESETS["smoke"], run=replace(PRESETS["smoke"].run, device="cpu", dtype="float32"))
    machine = set_up(auto)
    assert machine.compile == "none" and any("C++ compiler" in note for note in machine.notes)
    with pytest.raises(UsageError, match="--run.compile block"):
        set_up(replace(auto, run=replace(auto.run, compile="block")))


def test_a_cuda_request_without_cuda_is_refused(corpus, tmp_path, monkeypatch, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "--run.device cuda" in refusal(monkeypatch, capsys, corpus, tmp_path, "--run.device", "cuda")


def test_a_tokenizer_that_is_not_the_shards_is_refused(corpus, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    (copy / "tokenizer.model").write_bytes((copy / "tokenizer.model").read_bytes() + b"x")
    monkeypatch.setattr(
        sys, "argv", ["train_gpt.py", "smoke", *TINY, "--run.data", str(copy), "--run.runs", str(tmp_path)]
    )
    assert run_script(train_gpt.main) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_a_world_size_that_does_not_divide_the_batch_is_refused(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(
        sys, "argv", ["train_gpt.py", "smoke", *TINY, "--run.data", str(corpus), "--run.runs", str(tmp_path)]
    )
    assert run_script(train_gpt.main) == 2
    assert "3 ranks" in capsys.readouterr().err


def test_an_existing_run_folder_is_refused(corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / f"{time.strftime('%Y-%m-%d')}-mine"
    folder.mkdir()
    (folder / "keep").write_text("mine")
    assert "exists already" in refusal(monkeypatch, capsys, corpus, tmp_path, "--run.name", "mine")
    assert [p.name for p in folder.iterdir()] == ["keep"]


@pytest.mark.slow
def test_environment_gives_seed_and_data(corpus, tmp_path):
    flags = ["smoke", *TINY, "--run.max-steps", 1, "--run.no-judge", "--run.runs", tmp_path]
    done = run("train_gpt.py", *flags, SEED="7", DATA_PATH=str(corpus))
    assert done.returncode == 0, done.stderr
    start = rows(only(tmp_path))[0]
    assert start["config"]["run"]["seed"] == 7 and start["config"]["run"]["data"] == str(corpus)
    for words in (flags, ["--help"]):
        refused = run("train_gpt.py", *words, SEED="seven", DATA_PATH=str(corpus))
        assert refused.returncode == 2 and "SEED" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_full_disk_at_the_artifact_is_one_sentence_and_keeps_the_log(corpus, tmp_path):
    """A limit on what a file may hold stands for it, set when the room for the artifact is held already."""
    words = ["train_gpt.py", "smoke", *TINY, "--run.max-steps", "30", "--run.log-every", "1", "--run.data", str(corpus),
             "--pack.calibration-batches", "0", "--run.runs", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-u", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    for line in process.stdout:
        if line.startswith("step      2"):
            psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))
            break
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and error.count("\n") == 1 and "model.bin: File too large" in error, error
    assert len(rows(only(tmp_path), "step")) == 30 and rows(only(tmp_path), "failed")
    assert not [p for p in only(tmp_path).iterdir() if p.name.endswith(".part") or p.name == "model.bin"]
    assert [r.status for r in run_list.started(tmp_path)] == ["crash"]


def test_a_disk_without_room_for_what_a_run_leaves_is_refused_at_once(corpus, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    command = [sys.executable, "train_gpt.py", "smoke", *TINY, "--run.data", str(corpus), "--run.runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no room for the" in done.stderr, done.stderr
    assert not rows(only(tmp_path), "step") and [p.name for p in only(tmp_path).iterdir()] == ["log.jsonl"]


def test_strangers_keys_are_kept(trained, tmp_path):
    folder, _ = trained
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    values = json.loads((copy / "submission.json").read_text())
    (copy / "submission.json").write_text(json.dumps({**values, "lr_schedule": {"kind": "odd"}}))
    record = records.read(copy)
    records.write(copy, record)
    assert json.loads((copy / "submission.json").read_text())["lr_schedule"] == {"kind": "odd"}


def test_the_leaderboard_never_mixes_corpora_or_tracks(trained, tmp_path):
    folder, _ = trained
    values = json.loads((folder / "submission.json").read_text())
    for n, change in enumerate([{}, {"val_bpb": 1.5}, {"corpus_fingerprint": "other"}, {"track": "laptop"}]):
        (tmp_path / f"run{n}").mkdir()
        (tmp_path / f"run{n}" / "submission.json").write_text(json.dumps({**values, **change}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "submission.json").write_text("{")
    done = run("record.py", "leaderboard", "--runs", tmp_path)
    assert done.returncode == 0, done.stderr
    board = (tmp_path / "LEADERBOARD.md").read_text()
    assert board.count("## ") == 3
    assert board.index("run1") < board.index("run0")
    assert "broken" in done.stderr
    assert run("record.py", "leaderboard", "--runs", tmp_path / "none").returncode == 2


def test_wrong_types_are_refused_on_write(tmp_path):
    with pytest.raises(UsageError, match="val_bpb"):
        records.write(tmp_path, records.Record(val_bpb="1.2"))
