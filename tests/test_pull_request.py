"""Three judged runs become a folder in the contest's form that lints, and whose scorer runs apart."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from golf import lint, pull_request, records
from golf.errors import UsageError
from tests.conftest import TINY, run

ABOUT = pull_request.About("Looped blocks", "Ada Lovelace", "ada", "Three blocks, run often.")


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> list[Path]:
    """Three seeds of a tiny model, trained under the clock and judged."""
    place = tmp_path_factory.mktemp("three")
    for seed in (1, 2, 3):
        done = run("train_gpt.py", "smoke", *TINY, "--run.cap", 3, "--run.data", corpus, "--run.runs", place,
                   "--run.seed", seed, "--run.name", f"s{seed}", "--pack.calibration-batches", 0)  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
    return sorted(place.iterdir())


@pytest.fixture(scope="module")
def submitted(runs, corpus, tmp_path_factory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("records")
    done = run("record.py", "submit", *runs, "--name", ABOUT.name, "--author", ABOUT.author, "--github-id", "ada",
               "--blurb", ABOUT.blurb, "--root", root, "--data", corpus)  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    (folder,) = (root / "track_smoke").iterdir()
    return folder, done.stdout


@pytest.mark.slow
def test_the_folder_lints_and_its_scorer_gives_the_score_apart(submitted, runs):
    folder, said = submitted
    assert lint.lint(folder) == [] and folder.name.endswith("_LoopedBlocks") and "holds" in said
    values = json.loads((folder / "submission.json").read_text())
    scores = [records.read(r).val_bpb for r in runs]
    assert values["val_bpb"] == pytest.approx(sum(scores) / 3) and values["seeds"] == [1, 2, 3]
    median = sorted(scores)[1]
    assert values["seed_results"][str(values["seed"])]["val_bpb"] == median
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["valid"] and verdict["val_bpb"] == pytest.approx(median, rel=1e-5)
    assert {p.name for p in folder.iterdir()} >= {
        "README.md", "submission.json", "train_gpt.py", "model.bin", "requirements.txt", "tokenizer.model",
        "train_seed1.log", "train_seed2.log", "train_seed3.log", "source",
    }  # fmt: skip
    assert "Ada Lovelace (ada)" in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_gpt.py", "train_seed2.log", "model.bin", "README.md"])
def test_a_hand_that_edits_is_seen(submitted, corpus, tmp_path, name):
    copy = tmp_path / submitted[0].name
    shutil.copytree(submitted[0], copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = run("record.py", "verify", copy, "--data", corpus)
    assert done.returncode in (1, 2) and f"{name}: hash mismatch" in done.stderr, done.stderr


@pytest.mark.slow
def test_what_is_not_ready_is_refused_and_nothing_is_left(runs, tmp_path):
    copies = [tmp_path / "runs" / r.name for r in runs]
    for source, copy in zip(runs, copies, strict=True):
        shutil.copytree(source, copy)
    root = tmp_path / "records"

    def refused(said: str, folders: list[Path] = copies, about: pull_request.About = ABOUT) -> None:
        with pytest.raises(UsageError, match=said):
            pull_request.submit(folders, about, root, [])
        assert not list(root.rglob("*.json"))

    refused("2 runs, give 3", copies[:2])
    refused("seed 1 stands twice", [copies[0], copies[0], copies[1]])
    refused("--name", about=pull_request.About("../../etc", "a", "b"))
    refused("--author", about=pull_request.About("n", " ", "b"))
    with open(copies[2] / "model.bin", "ab") as file:
        file.write(b"x")
    refused("not those that were judged")
    (copies[2] / "verdict.json").unlink()
    refused("no verdict")
    shutil.copyfile(runs[2] / "model.bin", copies[2] / "model.bin")
    told = json.loads((runs[2] / "verdict.json").read_text()) | {"valid": False, "invalid": "it cheats"}
    (copies[2] / "verdict.json").write_text(json.dumps(told))
    refused("invalid: it cheats")
    shutil.copyfile(runs[2] / "verdict.json", copies[2] / "verdict.json")
    record = json.loads((copies[2] / "submission.json").read_text())
    for change, said in (({"resumed": True}, "resumed"), ({"fingerprint": "other"}, "2 configurations"),
                         ({"headroom": -5}, "5 bytes over")):  # fmt: skip
        (copies[2] / "submission.json").write_text(json.dumps(record | change))
        refused(said)
    (copies[2] / "submission.json").write_text(json.dumps(record))
    assert pull_request.submit(copies, ABOUT, root, []).is_dir()
    with pytest.raises(UsageError, match="exists already"):
        pull_request.submit(copies, ABOUT, root, [])


@pytest.mark.parametrize("said", ["<script>x</script>", "a | b", "[x](http://y)", "*x* _y_ `z`", "two\nlines", "# x"])
def test_what_people_write_stays_words_in_markdown(said):
    shown = pull_request.plain(said)
    assert re.sub(r"\\(.)", r"\1", shown) == " ".join(said.split())
    assert not re.search(r"(?<!\\)[<>|`*_\[\]#]", shown) and "\n" not in shown


def test_contest_names_of_a_track_are_ours(tmp_path):
    values = {"name": "x", "track": "10min_16mb", "val_bpb": 1.2, "seed": 2,
              "seed_results": {"2": {"val_bpb": 1.25}, "3": {"val_bpb": 1.15}}}  # fmt: skip
    record = records.from_dict(values, "x")
    assert record.track == "contest" and record.claimed_bpb == 1.25
    assert records.from_dict(values | {"seed_results": "none"}, "x").claimed_bpb == 1.2
    assert set(record.seed_results()) == {"2", "3"}
