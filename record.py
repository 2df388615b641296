#!/usr/bin/env python3
"""Run folders: what was run, how runs compare, and what a packed model writes.

    python record.py list [--runs DIR] [--json]                 every started run, crashes too
    python record.py show FOLDER [--json]
    python record.py compare RUN... --against RUN... [--planned N] [--json]
    python record.py report FOLDER [--against RUN] [--output PAGE.html]
    python record.py submit RUN RUN RUN... --name NAME --author WHO --github-id ID
    python record.py verify FOLDER [--data DIR]
    python record.py judge FOLDER [--data DIR]                  a run that was not, or not to its end
    python record.py watch FOLDER                               follow a run from another terminal
    python record.py leaderboard [--runs DIR]
    python record.py clean [--runs DIR] [--yes]
    python record.py sample FOLDER --prompt TEXT [--exit RULE --threshold X]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from golf import records, run_list, verdicts
from golf.console import parse, printable, run_script
from golf.data import Corpus
from golf.errors import UsageError
from golf.files import write_bytes

dumps = json.dumps  # commands have an option called json


def runs_folder(runs: str) -> Path:
    """--runs as a folder. Raises UsageError."""
    if not Path(runs).is_dir():
        raise UsageError(f"--runs {runs}: there is no such folder, name one that holds run folders.")
    return Path(runs)


def table(rows: list[dict], columns: tuple[str, ...]) -> None:
    """Rows in aligned columns; numbers to the right."""

    def text(value: object) -> str:
        if value is None or value == "":
            return "-"
        if isinstance(value, float):
            return f"{value:.4f}"
        return f"{value:,}" if isinstance(value, int) else printable(str(value))

    cells = [list(columns), *([text(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [bool(rows) and all(isinstance(r[c], (int, float, type(None))) for r in rows) for c in columns]
    for line in cells:
        pads = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        print("  ".join(pads).rstrip())


def list_runs(runs: str = "runs", json: bool = False) -> int:
    """Every started run, the best score of each track and corpus first; those without one at the end, and why.

    Args:
        runs: Folder that holds the run folders.
        json: Print one JSON array.
    """
    rows = [run.row() for run in run_list.started(runs_folder(runs))]
    rows.sort(key=lambda r: (r["val_bpb"] is None, r["track"], r["corpus"], r["val_bpb"] or 0.0, r["run"]))
    if json:
        print(dumps(rows))
        return 0
    table(rows, ("run", "status", "val_bpb", "preset", "seed", "track", "corpus", "bytes_total", "steps", "reason"))
    print(f"{len(rows)} runs, {sum(r['val_bpb'] is not None for r in rows)} with a score")
    return 0


def show(folder: Positional[str], json: bool = False) -> int:
    """What one run left: its closing block, what packing cost, its verdict.

    Args:
        folder: A run folder.
        json: Print the whole record as one JSON object.
    """
    if not (Path(folder) / "submission.json").exists() and (Path(folder) / "log.jsonl").exists():
        return show_unfinished(run_list.one(Path(folder)), json)
    record, verdict = records.read(Path(folder)), verdicts.read(Path(folder))
    if json:
        print(dumps(record.as_dict() | {"verdict": verdict}))
        return 0
    values = {"name": record.name, "status": record.status, "preset": record.preset, "seed": record.seed,
              "track": record.track, "corpus": record.corpus, **record.closing(),
              "training_flops": record.training_flops or "not counted"}  # fmt: skip
    for loops, bpb in record.quantization_penalty.items():
        values[f"packing costs at {loops} loops"] = f"{bpb:+.5f} bpb" if isinstance(bpb, float) else bpb
    if results := record.seed_results():  # a submission tells less of its artifact than a run
        values = {key: value for key, value in values.items() if value}
    for key, value in values.items():
        print(f"{key}: {value:,}" if type(value) is int else printable(f"{key}: {value}"))
    for seed, told in results.items():
        print(printable(f"seed {seed}: {told}"))
    print(printable(f"verdict: {verdicts.said(verdict)}"))
    return 0


def show_unfinished(run: run_list.Started, json: bool) -> int:
    """A run that left no record: how far it came, and whether it can go on."""
    if json:
        print(dumps(run.row()))
        return 0
    print(printable(f"name: {run.folder.name}"))
    print(printable(f"status: {run.status}" + (f" ({run.reason})" if run.reason else "")))
    if run.status != "running" and run_list.resumable(run.folder):
        print(f"go on: the command that it was begun with, and --run.resume {run.folder}")
    return 0


def compare(
    folders: Positional[tuple[str, ...]], against: tuple[str, ...], planned: int = 0, mixed: bool = False,
    json: bool = False,
) -> int:  # fmt: skip
    """Whether runs of one configuration are better than runs of another, each run a seed.

    Args:
        folders: Run folders of one side.
        against: Run folders of the other side.
        planned: Seeds a side that were planned before the first run; each seed beyond them counts as one look more.
        mixed: Compare runs of different corpora, caps or amounts of training all the same.
        json: Print one JSON object.
    """
    from golf import stats

    if not folders or not against:
        raise UsageError("compare: give run folders, and others after --against.")
    if not 0 <= planned <= 1000:
        raise UsageError(f"--planned {planned}: give 0 to 1,000.")
    if both := {Path(f).resolve() for f in folders} & {Path(f).resolve() for f in against}:
        raise UsageError(f"compare: {min(both).name} stands on both sides, give it once.")
    ours, theirs = run_list.sides([Path(f) for f in folders], [Path(f) for f in against], mixed)
    nats, their_nats, own = run_list.losses(ours, theirs)
    found = stats.compare(nats, [r.val_bpb for r in ours], their_nats, [r.val_bpb for r in theirs], planned)
    left_out = run_list.others([Path(f) for f in (*folders, *against)])
    if json:
        told = asdict(found) | {"meets_rule": found.meets_rule, "meets_practice": found.meets_practice}
        print(dumps(told | {"left_out": [run.row() for run in left_out]}))
        return 0

    for name, side, loss, bpb, sd in (
        (ours[0].name, ours, found.mean_loss, found.mean_bpb, found.sd_bpb),
        (theirs[0].name, theirs, found.their_loss, found.their_bpb, found.their_sd_bpb),
    ):
        told = "" if sd is None else f" (sd {sd:.4f})"
        print(f"{name}: {bpb:.4f} bpb{told}, {loss:.4f} nats a token; seeds {[r.seed for r in side]}")
    print("\n".join(found.sentences()))
    if not own:
        print("tokenizers differ: nats a token are bits a byte, told at the other side's bytes a token")
    for run in left_out:
        print(f"left out, of the same configurations: {run.folder.name} ({run.status})", file=sys.stderr)
    return 0


def report(folder: Positional[str], against: str = "", output: str = "") -> int:
    """Write the run's page: score, curves, bytes, verdict; with another run's curves beside its own.

    Args:
        folder: A run folder, finished or not.
        against: Another run folder.
        output: Page to write; FOLDER/report.html when empty.
    """
    from golf import report as pages

    path = pages.write(Path(folder), Path(against) if against else None, Path(output) if output else None)
    print(f"written: {path}")
    return 0


def watch(folder: Positional[str]) -> int:
    """Follow a run until it ends. Exit 0 when it leaves a record, 1 when its writer is gone without one.

    Args:
        folder: A run folder.
    """
    from golf import live

    return live.watch(Path(folder))


def judge(folder: Positional[str], data: str = "") -> int:
    """Have the referee score a finished run that has no score yet, as after --run.no-judge or an interruption. Exit 1
    where it is invalid.

    Args:
        folder: A run folder.
        data: Prepared data; what the run trained on when empty.
    """
    from golf import report as pages

    place = Path(folder)
    record = run_list.recorded(place).record
    if record.status not in ("complete", "interrupted", "invalid") or not (place / "model.bin").exists():
        raise UsageError(f"{folder}: the run is {record.status}, or has no artifact; name one that was packed.")
    text = data or record.config.get("run", {}).get("data", "")
    Corpus(text, "--data")
    record = verdicts.judged(place, record, Path(text))
    pages.write(place)
    print("\n".join(printable(f"{key}: {value}") for key, value in record.closing().items()))
    print(printable(f"verdict: {verdicts.said(verdicts.read(place))}"))
    return 1 if record.status == "invalid" else 0


def leaderboard(runs: str = "runs") -> int:
    """Write RUNS/LEADERBOARD.md from every scored run; corpora and tracks are never mixed.

    Args:
        runs: Folder that holds the run folders.
    """
    folder = runs_folder(runs)
    text = run_list.leaderboard(folder)
    write_bytes(folder / "LEADERBOARD.md", text.encode())
    print("\n".join(map(printable, text.split("\n"))), end="")
    for run in run_list.started(folder):
        if run.record is None or run.status == "invalid":
            print(printable(f"left out: {run.folder.name}: {run.status} {run.reason}".rstrip()), file=sys.stderr)
    return 0


def submit(
    folders: Positional[tuple[str, ...]], name: str = "", author: str = "", github_id: str = "", blurb: str = "",
    hardware: str = "", against: tuple[str, ...] = (), root: str = "records", verify: bool = True, data: str = "",
) -> int:  # fmt: skip
    """Write the contest's folder, records/TRACK/DATE_Name/, from three or more judged runs, and verify it.

    Example: record.py submit runs/A runs/B runs/C --name "Looped Blocks" --author "Ada" --github-id ada

    Args:
        folders: Run folders, each another seed of one configuration.
        name: Name of the record.
        author: Who made it.
        github_id: Their GitHub name.
        blurb: A sentence on the method; the runs' own when empty.
        hardware: What it ran on; the processor of the first run when empty.
        against: Run folders of the record to be beaten, for the table of significance.
        root: Folder to write to.
        verify: Have the referee run the folder's scorer apart.
        data: Prepared data for that; data/CORPUS of the runs when empty.
    """
    from golf import pull_request

    about = pull_request.About(name, author, github_id, blurb, hardware)
    target = pull_request.submit([Path(f) for f in folders], about, Path(root), [Path(f) for f in against])
    print(f"written: {target}")
    for run in run_list.others([Path(f) for f in folders]):
        print(f"left out, of the same configuration: {run.folder.name} ({run.status})", file=sys.stderr)
    return verified(target, data, False) if verify else 0


def verify(folder: Positional[str], data: str = "", json: bool = False) -> int:
    """Check a submission or run folder: its files' hashes, lint, the referee's verdict. Exit 1 where it does not hold.

    Args:
        folder: A folder that submit wrote, or a run folder.
        data: Prepared data; data/CORPUS of the record when empty.
        json: Print one JSON object.
    """
    return verified(Path(folder), data, json)


def verified(folder: Path, data: str, as_json: bool) -> int:
    from golf import pull_request

    found = pull_request.verify(folder, data, lambda line: print(printable(line), file=sys.stderr))
    if as_json:
        print(dumps(found))
    else:
        score = "no score" if found["val_bpb"] is None else f"{found['val_bpb']:.5f} bpb"
        print(f"verified: {score}, {'holds' if found['holds'] else str(len(found['faults'])) + ' faults'}")
    return 0 if found["holds"] else 1


def clean(runs: str = "runs", yes: bool = False, json: bool = False) -> int:
    """Say what unfinished and scored runs have left that nothing needs; delete it with --yes.

    Args:
        runs: Folder that holds the run folders.
        yes: Delete it.
        json: Print one JSON array.
    """
    found = [(path, run_list.size_of(path)) for path in run_list.leftovers(runs_folder(runs))]
    if yes:
        for path, _ in found:
            run_list.remove(path)
    if json:
        print(dumps([{"path": str(path), "bytes": size, "deleted": yes} for path, size in found]))
        return 0
    for path, size in found:
        print(f"{size:>15,}  {path}")
    said = "deleted" if yes else "would be deleted with --yes" if found else "nothing to delete"
    print(f"{sum(size for _, size in found):>15,}  bytes {said}")
    return 0


Exit = Literal["stored", "none", "entropy", "margin", "divergence", "difference", "gate", "random", "fixed"]
RAISED = str.maketrans("0123456789", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


@dataclass(frozen=True)
class SampleArguments:
    """Continue a text with a packed model, each token followed by the loops that were spent to predict it.

    Without --exit it scores as it was judged; depth_map.py map, which compares depths, asks for a rule instead.
    """

    folder: tyro.conf.Positional[str]
    """A run folder."""
    prompt: str = ""
    """Text to continue."""
    tokens: int = 100
    """Tokens to write."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    seed: int = 1
    exit: Exit = "stored"
    """Rule by which tokens stop; what the artifact says of its scoring, or none."""
    threshold: float = 0.0
    """That rule's threshold."""
    json: bool = False
    """Print one JSON object."""


def sample(arguments: SampleArguments) -> int:
    """Write the prompt and its continuation. Raises UsageError."""
    folder = Path(arguments.folder)
    for name in ("tokens", "temperature", "seed"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise UsageError(f"--{name} {value}: give 0 or more.")
    record = records.read(folder)
    from golf import casing, decode

    model, table, rule = decode.load(folder, arguments.exit, arguments.threshold)
    decoder = decode.Decoder(model, max(2, record.context), rule)
    cased = record.tokenizer.get("transform") == "case"
    prompt = [table.bos, *table.encode(casing.lower(arguments.prompt) if cased else arguments.prompt)]
    found = list(decode.write(decoder, prompt, arguments.tokens, arguments.temperature, arguments.seed))
    text = table.decode([w.token for w in found]).decode(errors="replace")
    text = casing.restore(text) if cased else text
    loops = [w.loops for w in found]
    mean = sum(loops) / max(1, len(loops))
    if arguments.json:
        tokens = [asdict(w) | {"text": table.text[w.token].decode(errors="replace")} for w in found]
        print(json.dumps({"text": text, "prompt_tokens": len(prompt) - 1, "mean_loops": mean, "tokens": tokens}))
        return 0
    print(text)
    if model.shape.loops > 1:
        pieces = "".join(
            f"{table.text[w.token].decode(errors='replace')}{str(w.loops).translate(RAISED)}" for w in found
        )
        pieces = pieces.translate(casing.SHOWN) if cased else pieces
        print(f"\nLoops to predict each token, {mean:.2f} of {model.shape.loops} on average:\n{pieces}")
    return 0


COMMANDS = {
    "list": list_runs, "show": show, "compare": compare, "report": report, "submit": submit, "verify": verify,
    "judge": judge, "watch": watch, "leaderboard": leaderboard, "clean": clean, "sample": SampleArguments,
}  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["sample"]:
        return sample(parse(tyro.cli, SampleArguments, prog="record.py sample", args=sys.argv[2:]))
    return parse(tyro.extras.subcommand_cli_from_dict, COMMANDS, prog="record.py")


if __name__ == "__main__":
    sys.exit(run_script(main))
