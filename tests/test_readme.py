"""Every command that README and docs show: its options exist, and what is cheap is run as it stands."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro

import depth_map
import eval_bpb
import record
from golf import ablate, prepare
from golf.console import parse
from golf.presets import PRESETS, parse_command_line
from tests.conftest import ROOT, TINY, run

ONE_RUN = ("show", "list", "report", "watch", "sample", "clean", "leaderboard")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Lines of code blocks that begin a command, without the remarks behind them; a line's end may be escaped."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s{2,}# .*", "", line).strip()
                if re.match(r"(\w+=\S+ )*(python|torchrun|make)\b", line):
                    found.append(line)
    return sorted(set(found))


def script_of(command: str) -> tuple[str, list[str]]:
    """The script or module of a command, and its words."""
    words = [w for w in shlex.split(command) if not re.match(r"[A-Z_]+=", w)]
    if words[0] == "torchrun":
        return "train_gpt.py", words[words.index("train_gpt.py") + 1 :]
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1], words[2:]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> dict[str, Path]:
    """What stands in runs/ where the pages' commands are tried: runs of a looped model whose tokens may stop, and some
    that the project keeps."""
    place = tmp_path_factory.mktemp("readme")
    done = run("train_gpt.py", "smoke", *TINY, "--run.data", corpus, "--run.runs", place, "--run.max-steps", 10,
               "--shape.no-skips", "--recipe.depth-loss", "each", "--pack.calibration-batches", 0)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = place.iterdir()
    for command in (("depth_map.py", "gate", folder, place / "gated", "--data", corpus, "--steps", 4),
                    ("artifact.py", "rescore", folder, place / "stops", "--exit", "entropy")):  # fmt: skip
        done = run(*command)
        assert done.returncode == 0, done.stderr
    kept = {"yardstick": ROOT / "runs" / "yardstick"}
    return {"FOLDER": folder, "OTHER": folder, "gated": place / "gated", "stops": place / "stops"} | kept


def test_the_pages_show_commands_of_every_script():
    shown = {script_of(c)[0] for c in commands() if not c.startswith("make")}
    assert shown >= {"train_gpt.py", "artifact.py", "budget.py", "eval_bpb.py", "record.py", "depth_map.py",
                     "golf.prepare", "golf.ablate"}  # fmt: skip


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_is_one_that_is_understood(command):
    if command.startswith("make"):
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
        assert next(word for word in command.split()[1:] if "=" not in word) in targets
        return
    script, words = script_of(command)
    if script == "train_gpt.py":
        parse_command_line(words).check()
    elif script == "golf.prepare":
        parse(tyro.cli, prepare.Arguments, args=words)
    elif script == "golf.ablate":
        parse(tyro.cli, ablate.Arguments, args=words)
    elif script == "budget.py":
        assert words[0] in PRESETS or words[0] in ("table", "measure", "fit")
    elif script == "eval_bpb.py":
        kinds = {"prove": eval_bpb.ProveArguments, "lint": None}
        if words[0] != "lint":
            parse(tyro.cli, kinds.get(words[0], eval_bpb.JudgeArguments), args=words[words[0] in kinds :])
    elif script in ("record.py", "depth_map.py"):
        module = {"record.py": record, "depth_map.py": depth_map}[script]
        assert words[0] in module.COMMANDS, words[0]
        target = module.COMMANDS[words[0]]
        if isinstance(target, type):
            parse(tyro.cli, target, args=words[1:])
    else:
        assert (ROOT / script).exists(), script


@pytest.mark.slow
def test_what_is_cheap_runs_as_it_stands(finished, corpus, tmp_path):
    """Of record.py, budget.py, eval_bpb.py and artifact.py, with a run's folder in place of FOLDER."""
    ran = 0
    for command in commands():
        script, words = ("", []) if command.startswith("make") else script_of(command)
        cheap = (
            (script == "record.py" and words[0] in ONE_RUN)
            or (script == "budget.py" and words[0] in (*PRESETS, "table", "fit"))
            or (script == "eval_bpb.py" and "--retrain" not in words and words[0].startswith("runs/"))
        )
        if not cheap:
            continue
        place = tmp_path / str(ran)
        for name, folder in finished.items():
            shutil.copytree(folder, place / "runs" / name)
        shutil.copytree(corpus, place / "data" / "tiny")
        done = run(ROOT / script, *words, cwd=place, DATA_PATH=str(place / "data" / "tiny"))
        assert done.returncode == 0, (command, done.stderr)
        ran += 1
    assert ran >= 8
