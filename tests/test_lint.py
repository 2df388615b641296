"""The linter on constructed folders of both log families: each fault is found, at its line, and nothing else is."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest
from conftest import run

from golf import lint

CODE = "print('train')\n" * 50
TOKENS = 62_021_632
LOSS, BPB = 1.99, 1.99 / math.log(2) / (lint.VALIDATION_BYTES / TOKENS)


def first_family(loss: float = LOSS, bpb: float = BPB, ms: float = 599_900, total: int = 15_900_000,
                 tokens: int = TOKENS) -> str:  # fmt: skip
    return (
        f"{CODE}{'=' * 100}\nRunning Python 3.12\nval_loader:shards pattern=fineweb_val_*.bin tokens:{tokens}\n"
        f"model_params:17059912\nstep:1/20000 train_loss:6.9 train_time:44ms step_avg:44.00ms\n"
        f"step:13780/20000 train_loss:2.0 train_time:{ms:.0f}ms step_avg:43.54ms\n"
        f"stopping_early: wallclock_cap train_time:{ms:.0f}ms step:13780/20000\n"
        f"Serialized model int8+zlib: {total - len(CODE)} bytes\nTotal submission size int8+zlib: {total} bytes\n"
        f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n"
    )


def second_family(loss: float = LOSS, bpb: float = BPB, minutes: float = 9.9, total: int = 15_990_000,
                  evaluation: float = 450.0, seed: int = 42, width: int = 512) -> str:  # fmt: skip
    return (
        f"Hyperparameters:\n  seed: {seed}\n  model_dim: {width}\n  vocab_size: 1024\n\nval_tokens: {TOKENS}\n"
        f"4000/5000 train_loss: 2.1000 train_time: {minutes}m tok/s: 5500000\n"
        f"pre-quantization post-ema val_loss: {loss - 0.01:.8f} val_bpb: {bpb - 0.005:.8f} eval_time: 7000ms\n"
        f"Total submission size quantized+brotli: {total} bytes\n"
        f"quantized val_loss: {loss:.8f} val_bpb: {bpb:.8f} eval_time: 9000ms\n"
        f"quantized_ttt_phased val_loss: {loss:.8f} val_bpb: {bpb:.8f} eval_time: {evaluation * 1e3:.0f}ms\n"
        f"total_eval_time: {evaluation}s\n"
    )


def folder(place: Path, logs: dict[str, str] | None = None, code: str = CODE, **keys: object) -> Path:
    """A folder without fault, but for what is given."""
    here = place / "2026-01-01_Name"
    here.mkdir()
    (here / "README.md").write_text("# Name\n")
    (here / "train_gpt.py").write_text(code)
    about = {
        "author": "A", "github_id": "a", "name": "N", "blurb": "B", "date": "2026-01-01", "track": "10min_16mb",
        "val_loss": LOSS, "val_bpb": BPB, "bytes_total": 15_900_000, "bytes_code": len(code), **keys,
    }  # fmt: skip
    about = {k: v for k, v in about.items() if v is not ...}
    (here / "submission.json").write_text(json.dumps(about, indent=1))
    for name, text in (logs or {f"train_seed{n}.log": first_family() for n in (1, 2, 3)}).items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text)
    return here


def said(found: list[lint.Finding]) -> str:
    return "\n".join(map(str, found))


@pytest.mark.parametrize("family", [first_family, second_family])
def test_a_folder_without_fault_has_no_finding(tmp_path, family):
    logs = {f"train_seed{n}.log": family() for n in (1, 2, 3)}
    assert said(lint.lint(folder(tmp_path, logs))) == ""


FAULTS = {
    "over the cap": ({"total": 16_300_000}, "exceed 16,000,000, but fit 16 MiB"),
    "far over the cap": ({"total": 17_000_000}, "17,000,000 bytes in all exceed 16,000,000"),
    "too long": ({"ms": 600_400}, "600,400 ms of training"),
    "wrong tokens": ({"tokens": 9_662_464}, "9,662,464 validation tokens"),
    "impossible bytes": ({"bpb": BPB / 1.167}, "bytes a token"),
}
LATE_FAULTS = {
    "long evaluation": ({"evaluation": 650.0}, "650.0 s of evaluation"),
    "long training": ({"minutes": 10.2}, "612,000 ms of training"),
}


@pytest.mark.parametrize("name", [*FAULTS, *LATE_FAULTS])
def test_a_fault_in_a_log_is_found_at_its_line(tmp_path, name):
    values, words = {**FAULTS, **LATE_FAULTS}[name]
    text = (first_family if name in FAULTS else second_family)(**values)
    here = folder(tmp_path, {f"train_seed{n}.log": text for n in (1, 2, 3)})
    found = [f for f in lint.lint(here) if words in f.text]
    assert len(found) >= 3 and all(f.level == "error" for f in found), said(lint.lint(here))
    lines = (here / "train_seed1.log").read_text().splitlines()
    told = next(f for f in found if f.file.endswith("train_seed1.log"))
    number = words.split()[0].replace(",", "").split(".")[0]
    assert any(part in lines[told.line - 1] for part in (number, "train_time", "val_bpb", "Total")), lines[
        told.line - 1
    ]


@pytest.mark.parametrize(("keys", "level", "words"), [
    ({"github_id": ...}, "error", "github_id is missing"), ({"track": ...}, "warning", "track is missing"),
    ({"bytes_code": ...}, "warning", "bytes_code is missing"),
    ({"bytes_total": 16_000_001}, "error", "16,000,001 bytes"),
    ({"val_bpb": 1.01}, "error", "in no log"), ({"bytes_code": 10}, "error", "10 bytes of code are counted"),
    ({"p_value": 0.06}, "warning", "p is 0.06"), ({"improvement_nats": 0.001}, "warning", "0.001 nats better"),
])  # fmt: skip
def test_a_fault_in_the_record_is_found(tmp_path, keys, level, words):
    found = lint.lint(folder(tmp_path, **keys))
    assert any(f.level == level and words in f.text for f in found), said(found)


def test_aliases_are_known(tmp_path):
    here = folder(tmp_path, github_id=..., github="a", val_bpb=..., mean_val_bpb=BPB, bytes_total=..., artifact_bytes=9)
    assert said(lint.lint(here)) == ""


@pytest.mark.parametrize(
    ("code", "words"), [("", "is empty"), ("def broken(:\n", "does not compile"), ("\0", "does not")]
)
def test_scripts_are_parsed(tmp_path, code, words):
    assert words in said(lint.lint(folder(tmp_path, code=code)))


def test_scripts_are_never_run(tmp_path):
    mark = tmp_path / "ran"
    lint.lint(folder(tmp_path, code=f"open({str(mark)!r}, 'w')\n"))
    assert not mark.exists()


def test_what_is_missing_is_named(tmp_path):
    here = folder(tmp_path)
    for name in ("README.md", "train_gpt.py", "train_seed1.log", "train_seed2.log", "train_seed3.log"):
        (here / name).unlink()
    (here / "submission.json").write_text("[" * 100_000)
    text = said(lint.lint(here))
    for words in ("README.md: error", "train_gpt.py: error", "there is no log", "is not JSON"):
        assert words in text


def test_seeds_of_different_configurations_and_crashed_logs(tmp_path):
    logs = {f"train_seed{n}.log": second_family(seed=n, width=512 if n < 3 else 640) for n in (1, 2, 3)}
    logs["train_seed4.log"] = first_family().split("final_int8")[0]
    text = said(lint.lint(folder(tmp_path, logs)))
    assert "model_dim is 640" in text and "no final val_loss" in text


def test_one_seed_is_a_warning_and_mebibytes_an_error(tmp_path):
    text = said(lint.lint(folder(tmp_path, {"logs/a.txt": second_family() + "artifact: 15.59 MiB\n"})))
    assert "logs of 1 seeds" in text and "15.59 MiB are 16,347,300 bytes" in text


def test_a_comparison_prints_the_rule_and_the_practice(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    new = folder(tmp_path / "a", {f"train_seed{n}.log": first_family(LOSS + 0.0003 * n, BPB) for n in (1, 2, 3)})
    old = folder(tmp_path / "b", {f"train_seed{n}.log": first_family(LOSS + 0.01 + 0.0003 * n, BPB) for n in (1, 2, 3)})
    better, worse = lint.significance(new, old), lint.significance(old, new)
    assert better.level == "note" and "+0.0100 nats" in better.text and "0.25" in better.text
    assert worse.level == "warning"


def test_a_log_of_ten_megabytes_is_read_line_by_line(tmp_path):
    step = "step:{}/20000 train_loss:2.1234 train_time:599000ms step_avg:43.54ms\n"
    text = first_family().replace("stopping_early", "".join(step.format(n) for n in range(150_000)) + "stopping_early")
    here = folder(tmp_path, {"train_seed1.log": text})
    assert (here / "train_seed1.log").stat().st_size > 10e6
    began = time.process_time()
    lint.lint(here)
    assert time.process_time() - began < 20  # 2.6 s were seen on a slow processor


def test_a_line_without_end_is_cut(tmp_path):
    here = folder(tmp_path)
    (here / "train_seed1.log").write_bytes(b"x" * (8 << 20) + b"\nTotal submission size int8+zlib: 17000000 bytes\n")
    found = [f for f in lint.lint(here) if "17,000,000" in f.text]
    assert found and found[0].line == 2


def test_links_and_pipes_are_not_followed(tmp_path):
    here = folder(tmp_path)
    (here / "x.py").symlink_to("/dev/zero")
    os.mkfifo(here / "y.py")
    (here / "more.log").symlink_to("/dev/zero")
    (here / "z.py").symlink_to("nowhere")
    assert said(lint.lint(here)).count("it is no plain file") == 3


def test_a_line_of_one_word_takes_no_square_of_its_length(tmp_path):
    here = folder(tmp_path)
    line = b"seed " + b"1" * 30_000 + b" " + b"val_loader" * 3_000
    (here / "train_seed1.log").write_bytes((b"final" * 13_000 + b" val_bpb\n" + line + b"\n") * 20)
    began = time.process_time()
    lint.lint(here)
    assert time.process_time() - began < 5  # 0.1 s here, minutes before


def test_the_command(tmp_path):
    here = folder(tmp_path)
    assert run("eval_bpb.py", "lint", here).returncode == 0
    (here / "README.md").unlink()
    done = run("eval_bpb.py", "lint", here, "--json")
    assert done.returncode == 1 and json.loads(done.stdout)[str(here)][0]["level"] == "error"
    for words in (
        ["lint"],
        ["lint", tmp_path / "none"],
        ["lint", here, "--agianst", here],
        ["lint", here, "--against"],
    ):
        done = run("eval_bpb.py", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
