"""Runs of several seeds as one folder in the contest's form, ready for a pull request; and checking one. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from golf import folders, lint, records, run_list, stats, verdicts
from golf.bundle import ROOT
from golf.errors import UsageError
from golf.files import LARGE, open_plain, write_bytes
from golf.log_file import read_log
from golf.records import Record

LEAST_SEEDS = 3
TRACK_FOLDERS = {"contest": "track_10min_16mb"}
LOG_EVERY = 100  # steps between two lines of a log in the contest's form
REQUIREMENTS = ("torch", "numpy", "sentencepiece", "zstandard")
# Of the run whose artifact is in the folder; the rest of submission.json is of all seeds.
DECLARED = ("seed", "tokenizer", "tokenizer_sha256", "context", "stride", "chunk", "adapts", "precision",
            "content_shapes", "corpus", "corpus_fingerprint", "preset", "fingerprint", "val_tokens", "val_bytes", "cap",
            "train_seconds", "model_sha256", "config", "environment", "quantization_penalty")  # fmt: skip


@dataclass(frozen=True)
class About:
    """Who submits what."""

    name: str
    author: str
    github_id: str
    blurb: str = ""
    hardware: str = ""


def ready(runs: list[Path]) -> list[Record]:
    """The records of runs that may be submitted together. Raises UsageError naming the first reason why not."""
    if len(runs) < LEAST_SEEDS:
        raise UsageError(f"submit: {len(runs)} runs, give {LEAST_SEEDS} or more, each of another seed.")
    found = run_list.sides(runs, runs, mixed=False)[0]
    for folder, record in zip(runs, found, strict=True):
        told = verdicts.read(folder)
        if told is None:
            raise UsageError(f"{folder}: it has no verdict, run python eval_bpb.py {folder} first.")
        if told.get("folder_sha256") != folders.sha256_of(folder):
            raise UsageError(f"{folder}: its files are not those that were judged, run python eval_bpb.py {folder}.")
        if record.headroom < 0:
            raise UsageError(f"{folder}: it is {-record.headroom:,} bytes over the cap, leave it out.")
        if record.extra.get("resumed"):
            raise UsageError(f"{folder}: it was interrupted and resumed, which the track does not allow; leave it out.")
        if record.config.get("run", {}).get("pace") or record.config.get("run", {}).get("max_steps"):
            raise UsageError(f"{folder}: it was not trained under the clock (--run.max-steps or --run.pace).")
    return found


def submit(runs: list[Path], about: About, root: Path, against: list[Path]) -> Path:
    """Write ROOT/TRACK/DATE_Name/ from runs, and lint it; nothing is left when something is found. Returns the folder.

    The artifact is that of the run whose score is the median. Raises UsageError.
    """
    found = ready(runs)
    if not re.fullmatch(r"[\w .+-]{1,80}", about.name) or about.name.strip(". ") == "":
        raise UsageError(f"--name {about.name!r:.60}: give letters, digits, spaces, . + - and _.")
    for option in ("author", "github_id"):
        if not getattr(about, option).strip():
            raise UsageError(f"--{option.replace('_', '-')}: give it, the contest's records name it.")
    pairs = sorted(zip(runs, found, strict=True), key=lambda pair: pair[1].val_bpb)
    chosen = pairs[(len(pairs) - 1) // 2][0]
    comparison, own = None, True
    if against:
        ours, theirs = run_list.sides(runs, against, mixed=False)
        nats, their_nats, own = run_list.losses(ours, theirs)
        comparison = stats.compare(nats, [r.val_bpb for r in ours], their_nats, [r.val_bpb for r in theirs])
    track = found[0].track
    place = root / TRACK_FOLDERS.get(track, f"track_{track}")
    date = time.strftime("%Y-%m-%d")
    target = place / f"{date}_{''.join(w[:1].upper() + w[1:] for w in re.split(r'[ .]+', about.name))}"
    if target.exists():
        raise UsageError(f"{target} exists already, give another --name.")
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".submit-", dir=place) as aside:
        folder = Path(aside) / target.name
        folder.mkdir()
        folders.copy_counted(chosen, folder)
        for name in ("tokenizer.model", "source"):
            if (chosen / name).is_dir():
                shutil.copytree(chosen / name, folder / name)
            elif (chosen / name).exists():
                shutil.copyfile(chosen / name, folder / name)
        code = (folder / "train_gpt.py").stat().st_size
        for run, record in zip(runs, found, strict=True):
            write_bytes(folder / f"train_seed{record.seed}.log", contest_log(run, record, code).encode())
        environment = found[0].environment
        wanted = [f"{name}=={environment[name].split('+')[0]}\n" for name in REQUIREMENTS if name in environment]
        write_bytes(folder / "requirements.txt", "".join(wanted).encode())
        chosen_record = next(r for run, r in zip(runs, found, strict=True) if run == chosen)
        checked = said_checks([verdicts.read(run) for run in runs])
        values = submission(found, chosen_record, about, date, comparison)
        readable = "; `source/` holds the same code readable" if (folder / "source").is_dir() else ""
        told = readme(found, chosen_record, about, comparison, checked, own, readable)
        write_bytes(folder / "README.md", told.encode())
        values["files_sha256"] = {name: sha for name, sha in hashes(folder).items() if name != "submission.json"}
        write_bytes(folder / "submission.json", json.dumps(values, indent=1).encode() + b"\n")
        if findings := lint.lint(folder):
            raise UsageError(f"submit: the folder would not pass eval_bpb.py lint: {findings[0].text}.")
        folder.rename(target)
    return target


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every plain file by its path, but for what a referee writes. Raises UsageError for one too large."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.name == "verdict.json":
            continue
        with open_plain(path) as stream:
            if (size := os.fstat(stream.fileno()).st_size) > LARGE:
                raise UsageError(f"{path}: it holds {size:,} bytes, a submission's file {LARGE:,} at most.")
            found[str(path.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def submission(
    found: list[Record], chosen: Record, about: About, date: str, comparison: stats.Comparison | None
) -> dict:  # fmt: skip
    """submission.json: what public records share, results by seed, and what a referee must know of the artifact."""
    mean = lambda key: statistics.mean(getattr(r, key) for r in found)  # noqa: E731
    sd = lambda key: statistics.stdev(getattr(r, key) for r in found)  # noqa: E731
    cores = chosen.environment.get("cores", "")
    values = {
        "author": about.author, "github_id": about.github_id, "name": about.name, "blurb": about.blurb or chosen.blurb,
        "date": date, "track": "10min_16mb" if chosen.track == "contest" else chosen.track,
        "val_loss": mean("val_loss"), "val_bpb": mean("val_bpb"), "bytes_total": max(r.bytes_total for r in found),
        "bytes_code": chosen.bytes_code, "val_loss_std": sd("val_loss"), "val_bpb_std": sd("val_bpb"),
        "seeds": [r.seed for r in found],
        "seed_results": {
            str(r.seed): {
                "val_loss": r.val_loss, "val_bpb": r.val_bpb, "artifact_bytes": r.bytes_total, "steps": r.steps,
                "step_avg_ms": round(1e3 * r.train_seconds / max(1, r.steps), 2), "eval_time_s": r.eval_seconds,
                "train_seconds": r.train_seconds, "model_sha256": r.model_sha256,
            } for r in found
        },
        "hardware": about.hardware or f"{chosen.environment.get('processor', '')}, {cores} cores",
        "pytorch_version": str(chosen.environment.get("torch", "")), "technique_summary": about.blurb or chosen.blurb,
        "pre_quant_val_loss": mean("unpacked_val_loss"), "pre_quant_val_bpb": mean("unpacked_val_bpb"),
        "wallclock_seconds": max(r.train_seconds for r in found), "step_stop": round(mean("steps")),
        "train_steps_mean": mean("steps"), "eval_time_seconds": max(r.eval_seconds or 0.0 for r in found),
        "artifact_bytes_mean": mean("bytes_total"), "artifact_bytes_max": max(r.bytes_total for r in found),
        "compliance": {
            "training_under_the_clock": True, "artifact_under_the_cap": True, "score_before_update": True,
            "every_verdict_valid": True, "seeds_reported": "all that were given; others of the configuration are named",
        },
        **{key: getattr(chosen, key) for key in DECLARED},
    }  # fmt: skip
    if comparison:
        values |= {"improvement_nats": comparison.gain_nats, "p_value": comparison.p, "comparison": asdict(comparison)}
    return values


def contest_log(run: Path, record: Record, code: int) -> str:
    """A run's log as the contest's baseline writes one: options, steps, sizes, the final score."""
    rows = read_log(run / "log.jsonl")
    start = next((row for row in rows if row.get("event") == "start"), {})
    lines = ["Hyperparameters:"]
    for part in ("shape", "recipe", "pack", "scoring"):
        lines += [f"  {part}_{key}: {value}" for key, value in (record.config.get(part) or {}).items()]
    lines += [f"  seed: {record.seed}", "=" * 100, f"command: {' '.join(map(str, start.get('command', [])))}",
              f"environment: {json.dumps(record.environment)}"]  # fmt: skip
    steps = [row for row in rows if row.get("event") == "step"]
    for row in steps:
        if row["step"] % LOG_EVERY == 0 or row is steps[-1]:
            lines.append(step_line(row, record.steps))
    lines += [
        f"stopping_early: wallclock_cap train_time:{1e3 * record.train_seconds:.0f}ms "
        f"step:{record.steps}/{record.steps}",
        f"peak memory allocated: {record.peak_memory >> 20} MiB of memory" if record.peak_memory < 15 << 30 else "",
        f"pre-quantization val_loss: {record.unpacked_val_loss:.8f} val_bpb: {record.unpacked_val_bpb:.8f}",
        f"Serialized model: {record.bytes_model} bytes", f"Code size: {code} bytes",
        f"Total submission size: {record.bytes_total} bytes", f"val_tokens: {record.val_tokens}",
        f"final_roundtrip_exact val_loss: {record.val_loss:.8f} val_bpb: {record.val_bpb:.8f} "
        f"eval_time: {1e3 * (record.eval_seconds or 0.0):.0f}ms",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def step_line(row: dict, total: int) -> str:
    return (f"step:{row['step']}/{total} train_loss:{row['loss']:.4f} train_time:{1e3 * row['elapsed']:.0f}ms "
            f"step_avg:{1e3 * row['elapsed'] / row['step']:.2f}ms")  # fmt: skip


def said_checks(verdicts: list[dict]) -> str:
    """How many of the referee's checks passed in every run, and which did not run."""
    every = [{c["check"]: c["status"] for c in verdict["checks"]} for verdict in verdicts]
    left = [name for name in every[0] if any(checks.get(name) != "passed" for checks in every)]
    told = f"{len(every[0]) - len(left)} of {len(every[0])} checks passed in each"
    return f"{told}; not run: {', '.join(left)}" if left else told


def plain(text: str) -> str:
    """A person's words as Markdown that means nothing but them."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def readme(
    found: list[Record], chosen: Record, about: About, comparison: stats.Comparison | None, checked: str,
    own_nats: bool, readable: str,
) -> str:  # fmt: skip
    """The folder's README: method, command, seeds, significance. Without `own_nats` the comparison's nats are bits a
    byte at the other side's bytes a token."""
    rows = "\n".join(
        f"| {r.seed} | {r.val_bpb:.4f} | {r.val_loss:.4f} | {r.unpacked_val_bpb:.4f} | {r.bytes_total:,} | "
        f"{r.steps:,} | {r.train_seconds:.1f} | {r.eval_seconds or 0.0:.1f} |"
        for r in found
    )
    bpb, loss = ([getattr(r, key) for r in found] for key in ("val_bpb", "val_loss"))
    told = "\n".join(f"- {line}" for line in comparison.sentences()) if comparison else "- compared with no other runs"
    told += "" if own_nats else "\n- tokenizers differ: its nats are bits a byte, told at their bytes a token"
    settings = "\n".join(
        f"| {part}.{key} | {value} |"
        for part in ("shape", "recipe", "pack", "scoring")
        for key, value in (chosen.config.get(part) or {}).items()
    )
    return f"""# {plain(about.name)}

{plain(about.blurb or chosen.blurb)}

By {plain(about.author)} ({plain(about.github_id)}). Mean of {len(found)} seeds: \
**{statistics.mean(bpb):.4f} bits a byte** (sd {statistics.stdev(bpb):.4f}), \
{statistics.mean(loss):.4f} nats a token (sd {statistics.stdev(loss):.4f}); largest \
submission {max(r.bytes_total for r in found):,} of {chosen.cap:,} bytes.

| seed | val_bpb | val_loss | before packing, bpb | bytes | steps | training s | scoring s |
|---|---|---|---|---|---|---|---|
{rows}

{told}

## Run it

`train_gpt.py` trains, packs and scores{readable}. The artifact here, `model.bin`, is
seed {chosen.seed}'s, the median. With requirements.txt installed and the data prepared:

```
SEED={chosen.seed} DATA_PATH=data/{chosen.corpus} python train_gpt.py
```

Every run was judged by a referee that runs the scorer apart: {checked} (`verdict.json` of each run).

| option | value |
|---|---|
{settings}
"""


def verify(folder: Path, data: str, tell: Callable[[str], None]) -> dict:
    """Check a folder against its own hashes, lint it, and have the referee run its scorer apart. Raises UsageError."""
    record = records.read(folder)
    told = record.extra.get("files_sha256")
    faults = []
    if isinstance(told, dict):
        here = {name: sha for name, sha in hashes(folder).items() if name != "submission.json"}
        names = sorted({*told, *here})
        faults += [f"{name}: hash mismatch, it is not the file that was submitted" for name in names
                   if told.get(name) != here.get(name)]  # fmt: skip
        faults += [str(f) for f in lint.lint(folder)]
    elif record.model_sha256 and hashes(folder).get("model.bin") != record.model_sha256:
        faults.append("model.bin: hash mismatch, it is not the artifact that the record tells of")
    for fault in faults:
        tell(fault)
    tell("judging the folder's own scorer in a process apart")
    command = [sys.executable, str(ROOT / "eval_bpb.py"), str(folder), "--json", *(["--data", data] if data else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise UsageError(done.stderr.strip().splitlines()[-1].removeprefix("error: ").rstrip("."))
    try:
        verdict = json.loads(done.stdout)
    except ValueError as error:
        why = f"{folder}: the referee ended ({done.returncode}) and gave no verdict, verify it again."
        raise UsageError(why) from error
    if not verdict["valid"]:
        faults.append(f"the referee: {verdict['invalid']}")
        tell(faults[-1])
    return {"folder": str(folder), "faults": faults, "val_bpb": verdict.get("val_bpb"), "claimed": record.claimed_bpb,
            "holds": not faults}  # fmt: skip
