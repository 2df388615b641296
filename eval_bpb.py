#!/usr/bin/env python3
"""The referee: a submission folder to bits per byte on the whole validation split, and whether the number holds.

    python eval_bpb.py FOLDER [--data DIR] [--official] [--json] [--retrain]
    python eval_bpb.py FOLDER --exit RULE --threshold X
    python eval_bpb.py prove FOLDER [--documents N] [--tokens T]
    python eval_bpb.py lint FOLDER...

The scorer runs in a process that is given only the counted files and the tokenizer. The loop, the tokens, the byte
count, the clock, the ledger and the probes are the referee's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from golf import evidence, folders, prove, records, rescore, submission, validation
from golf.bpb import Score
from golf.config import TRACKS
from golf.console import parse, printable, run_script
from golf.contender import MOST_NUMBERS, Contender, Invalid, Limits
from golf.data import Corpus
from golf.errors import UsageError
from golf.files import read_plain, write_bytes
from golf.judging import Referee, stock_tokens, tell_progress
from golf.kept_scores import KeptScores
from golf.recheck import fresh_process
from golf.sheet import CHECKS, Sheet

ROOT = Path(__file__).resolve().parent
FAR_OVER = 16  # times the cap, beyond which a submission is not looked at


def data_folder(record: records.Record, given: str) -> Path:
    """The data asked for, or data/NAME where the record gives a plain name. Raises UsageError."""
    name = record.corpus
    plain = Path(name).name == name and not name.startswith(".") and name.isprintable()
    if not (given or os.environ.get("DATA_PATH") or plain):  # else it would choose its own text
        raise UsageError(f"The record's corpus {record.corpus!r:.60} is not a plain name, give --data.")
    return Path(given or os.environ.get("DATA_PATH") or f"data/{record.corpus}")


def require_its_text(record: records.Record, data: Path) -> None:
    """Raise UsageError where prepared data are another text than the one that a record is of."""
    if data.is_dir() and record.corpus_fingerprint:
        given = Corpus(data, "--data")
        if given.fingerprint != record.corpus_fingerprint:
            raise UsageError(
                f"--data {data}: the record is of {record.corpus} ({record.corpus_fingerprint}), this is {given.name} "
                f"({given.fingerprint}), give that text."
            )


def judge(
    folder: Path, data: Path, official: bool = False, off: frozenset[int] = frozenset(), claims: bool = True,
    limits: Limits | None = None, keep: tuple[Path, int] | None = None,
) -> dict:  # fmt: skip
    """A submission's verdict: its score, and every check with its evidence; "invalid" says why where it is.

    `off` leaves checks out, to show what each is for. `claims` compares the record's own score with the measured one.
    Raises UsageError for the user's faults.
    """
    entry = submission.read(folder)
    sheet, limits = Sheet(off), limits or Limits(entry.limits.eval_seconds)
    verdict = {
        "folder": str(folder), "track": entry.record.track, "official_truncation": official,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}",
    }  # fmt: skip
    try:
        require_small(entry)
        verdict["folder_sha256"] = folders.sha256_of(folder)
        text = validation.load(data, entry)
        if text.tokens.size - 1 < entry.context and official:
            raise UsageError(f"--data {data}: it is shorter than one row of {entry.context} tokens, give more text.")
        verdict |= score_text(entry, text, data, sheet, limits, official, claims, keep)
    except Invalid as fault:
        verdict["invalid"] = str(fault)
        if fault.check:
            sheet.see(fault.check, False, str(fault))
    verdict["checks"] = [
        {"number": n, "check": CHECKS[n], "status": c.status, "evidence": c.evidence()} for n, c in sheet.checks.items()
    ]
    if sheet.faults() and "invalid" not in verdict:
        verdict["invalid"] = sheet.faults()[0]
    verdict["valid"] = "invalid" not in verdict
    verdict["retrained"] = "not run: whether the weights were trained on validation text is not known"
    return verdict


def score_text(
    entry: submission.Submission, text: validation.Validation, data: Path, sheet: Sheet, limits: Limits,
    official: bool, claims: bool, keep: tuple[Path, int] | None = None,
) -> dict:  # fmt: skip
    """Score the whole text; all checks that can be made. Raises Invalid."""
    corpus = Corpus(data, "--data") if data.is_dir() else None
    evidence.claims(entry, text, sheet, official)
    shut_in = 11 not in sheet.off
    kept = None
    if keep:
        whose = {"folder": folders.sha256_of(entry.folder), "text": text.sha256, "official": official,
                 "asked": [entry.context, entry.stride, entry.chunk]}  # fmt: skip
        kept = KeptScores(keep[0], whose | {"every": keep[1]}, keep[1])
    with Contender(entry.folder, text.tokenizer.shown, limits, data, shut_in=shut_in) as contender:
        require_offers(contender, entry, text)
        tell = tell_progress(text.tokens.size - 1, limits)
        referee = Referee(entry, text, contender, sheet, stock_tokens(text), official, tell)
        referee.run(kept)
        evidence.shut_in(contender, text, sheet)
    over = max(0.0, limits.beyond - limits.grace)
    probed = f", {over:.1f} s of it in probes that took longer than scoring does" if over else ""
    if math.isfinite(limits.seconds):
        sheet.see(10, limits.scoring <= limits.seconds, f"it took {limits.scoring:.0f} s of {limits.seconds:g}")
        sheet.note(10, f"{limits.scoring:.1f} of {limits.seconds:g} s for loading and scoring{probed}")
    else:
        sheet.note(10, f"the cap on evaluation was lifted: {limits.scoring:.1f} s for loading and scoring{probed}")
    if kept:
        times = kept.state["interruptions"]
        sheet.note(6, f"kept in parts, interrupted {times} times, seconds summed, nothing scored twice")
    score = Score(referee.ledger.nats, referee.ledger.count, text.bytes_of(referee.ledger.count))
    moved = "not run"
    if not {14, 15, 16} <= sheet.off:
        moved = fresh_process(referee, entry.folder, limits, data)
    claimed = entry.record.claimed_bpb
    if claims and claimed is not None and not official:
        off = abs(claimed / score.bpb - 1)
        sheet.see(16, off <= evidence.CLAIM, f"it claims {claimed} bits a byte, its scorer gives {score.bpb:.5f}")
    if corpus is not None:
        evidence.disjoint(corpus, sheet)
    else:
        sheet.note(12, "no training shards were given")
    evidence.stored_text(entry, text, corpus, sheet)
    evidence.certain_runs(referee.ledger.scores, text.tokens, corpus, sheet)
    artifact = entry.folder / "model.bin"
    measured = folders.sizes(entry.folder)
    return {
        "val_loss": score.loss, "val_bpb": score.bpb, "val_tokens": score.tokens, "val_bytes": score.bytes,
        "eval_seconds": round(limits.scoring, 3), "probe_seconds": round(limits.probing, 3), "corpus": text.corpus,
        "corpus_fingerprint": text.corpus_fingerprint, "validation_sha256": text.sha256,
        "tokenizer_sha256": hashlib.sha256(text.tokenizer.model).hexdigest(),
        "another_document_before": moved, "ledger_sha256": referee.ledger.digest.hexdigest(),
        "isolation": contender.isolation,
        "bytes_total": measured.total, "cap": entry.limits.bytes_cap,
        "fits": measured.total <= entry.limits.bytes_cap,
        "model_sha256": hashlib.sha256(artifact.read_bytes()).hexdigest() if artifact.is_file() else "",
    }  # fmt: skip


def require_small(entry: submission.Submission) -> None:
    """Raise Invalid for a folder so large that it is not even read."""
    size = folders.sizes(entry.folder).total
    if size > FAR_OVER * entry.limits.bytes_cap:
        raise Invalid(f"{size:,} bytes, {entry.limits.bytes_cap:,} allowed (decimal)", 9)


def require_offers(contender: Contender, entry: submission.Submission, text: validation.Validation) -> None:
    """Raise Invalid where a scorer is not what the submission and its tokenizer say."""
    if contender.vocab != text.tokenizer.vocab_size:
        raise Invalid(f"the scorer's vocabulary is {contender.vocab}, the tokenizer's {text.tokenizer.vocab_size}", 8)
    if entry.context * contender.vocab > MOST_NUMBERS:
        raise Invalid(f"rows of {entry.context:,} tokens have {entry.context * contender.vocab:,} log-probabilities, "
                      f"{MOST_NUMBERS:,} are allowed")  # fmt: skip
    if entry.adapts and not {"adapt", "reset"} <= contender.offers:
        raise Invalid("it is said to adapt, but its scorer has no adapt() and reset()", 5)


def prove_folder(folder: Path, data: Path, documents: int, tokens: int) -> dict:
    """Compress a sample with the scorer, have a fresh process read it back, and compare size and score."""
    entry = submission.read(folder)
    require_small(entry)
    text = validation.load(data, entry)
    limits = Limits(entry.limits.eval_seconds)
    began = time.monotonic()
    sample = prove.choose(text, entry.context, documents, tokens, np.random.default_rng())
    bos = text.tokenizer.bos
    with Contender(folder, text.tokenizer.shown, limits, data) as scorer:
        require_offers(scorer, entry, text)
        if entry.adapts:
            scorer.reset()
        nats = prove.usual_score(scorer, sample, entry.chunk)
        if entry.adapts:
            scorer.reset()
        packed = prove.compress(scorer, sample, bos, entry.chunk)
    with tempfile.TemporaryDirectory(prefix="golf-") as place:
        path = Path(place) / "proof"
        path.write_bytes(packed)
        command = [sys.executable, str(ROOT / "eval_bpb.py"), "decode", str(folder), str(path), "--bos", str(bos),
                   "--vocab", str(text.tokenizer.vocab_size)]  # fmt: skip
        if text.tokenizer.shown:
            (Path(place) / "tokenizer.model").write_bytes(text.tokenizer.shown)
            command += ["--tokenizer", str(Path(place) / "tokenizer.model")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise UsageError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    same = done.returncode == 0 and done.stdout.strip() == prove.digest(sample.rows)
    seen = sum(len(text.tokenizer.decode(r)) for r in sample.rows)
    result = prove.report(sample, seen, len(packed), nats, same, time.monotonic() - began)
    write_verdict(folder, {"folder_sha256": folders.sha256_of(folder), "proof": result})
    return result


def write_verdict(folder: Path, values: dict) -> None:
    """verdict.json, what stands in it already kept; a folder that cannot be written keeps none, and that is said."""
    path = folder / "verdict.json"
    old = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        old = json.loads(read_plain(path))
    same = isinstance(old, dict) and old.get("folder_sha256") == values.get("folder_sha256")  # not of other files
    kept = old if same and "proof" in values else {"proof": old["proof"]} if same and "proof" in old else {}
    try:
        write_bytes(path, json.dumps({**kept, **values}, indent=1).encode() + b"\n")
    except OSError as error:
        print(f"{folder} cannot be written ({error.strerror}): no verdict.json.", file=sys.stderr)


@dataclass(frozen=True)
class JudgeArguments:
    """Score a submission folder in bits per byte and check it. Exit 0 valid, 1 invalid, 2 misuse."""

    folder: tyro.conf.Positional[str]
    """A run folder, or any folder with a scorer and submission.json."""
    data: str = ""
    """Prepared data, or documents as JSON lines; DATA_PATH or data/CORPUS of the record when empty."""
    official: bool = False
    """Leave out the partial last row, as the contest's trainer does."""
    retrain: bool = False
    """Also train again, from the folder's own code, where no validation text exists."""
    exit: str = ""
    """Judge a copy in whose artifact this exit rule is stored: a point of the frontier of score against depth."""
    threshold: float = 0.0
    """That rule's threshold."""
    keep: str = ""
    """File that a long scoring is kept in, part by part: the same command goes on from it after an interruption."""
    keep_every: int = 1_000_000
    """Targets between two writings of it."""
    lift_cap: bool = False
    """Let scoring take as long as it takes; the verdict says so."""
    memory: float = 0.0
    """Gigabytes that the scorer may take; 0 is three quarters of the machine's."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ProveArguments:
    """Compress a sample of the validation text with the scorer and decode it in a fresh process."""

    folder: tyro.conf.Positional[str]
    """A run folder."""
    documents: int = 16
    """Documents, chosen anew each time."""
    tokens: int = 96
    """Tokens of each."""
    data: str = ""
    """Prepared data; DATA_PATH or data/CORPUS of the record when empty."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class DecodeArguments:
    """Read a proof back; prints the sha256 of its tokens."""

    folder: tyro.conf.Positional[str]
    file: tyro.conf.Positional[str]
    vocab: int
    """Pieces that the scorer must have."""
    bos: int = 1
    tokenizer: str = ""


def decode(arguments: DecodeArguments) -> str:
    """The sha256 of a proof's tokens, decoded by a scorer that has seen nothing else."""
    folder = Path(arguments.folder)
    entry = submission.read(folder)
    try:
        data = Path(arguments.file).read_bytes()
        model = Path(arguments.tokenizer).read_bytes() if arguments.tokenizer else b""
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}).") from error
    prove.take_apart(data)
    with Contender(folder, model, Limits(entry.limits.eval_seconds)) as scorer:
        if scorer.vocab != arguments.vocab:
            raise Invalid(f"the scorer's vocabulary is {scorer.vocab}, not {arguments.vocab}", 8)
        if entry.adapts:
            scorer.reset()
        return prove.digest(prove.decompress(scorer, data, arguments.bos, entry.chunk))


def show(verdict: dict) -> None:
    """The verdict for people."""
    for row in verdict["checks"]:
        print(printable(f"{row['number']:>3}  {row['check']:<30}{row['status']:<9}{row['evidence']}"))
    skipped = ("checks", "valid", "invalid", "retrained")
    for key, value in verdict.items():
        if key not in skipped:
            print(printable(f"{key}: {value}"))
    print(printable(f"retrained: {verdict['retrained']}"))
    ran = sum(row["status"] != "not run" for row in verdict["checks"])
    found = "valid" if verdict["valid"] else "INVALID, " + verdict["invalid"]
    print(printable(f"verdict: {found}") + f" ({ran} of {len(CHECKS)} checks run)")


def main() -> int:
    words = sys.argv[1:]
    if words[:1] == ["decode"]:
        print(decode(parse(tyro.cli, DecodeArguments, prog="eval_bpb.py decode", args=words[1:])))
        return 0
    if words[:1] == ["lint"]:
        from golf import lint

        return lint.main(words[1:])
    if words[:1] == ["prove"]:
        asked = parse(tyro.cli, ProveArguments, prog="eval_bpb.py prove", args=words[1:])
        for name in ("documents", "tokens"):
            if not 1 <= getattr(asked, name) <= 65_535:
                raise UsageError(f"--{name} {getattr(asked, name)}: give 1 to 65,535.")
        folder = Path(asked.folder)
        result = prove_folder(folder, data_folder(records.read(folder), asked.data), asked.documents, asked.tokens)
        print(json.dumps(result) if asked.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
        return 0 if result["holds"] else 1
    arguments = parse(tyro.cli, JudgeArguments, prog="eval_bpb.py", args=words)
    with contextlib.ExitStack() as stack:
        if arguments.exit:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="golf-exit-")))
            copy = rescore.with_exit(Path(arguments.folder), place, arguments.exit, arguments.threshold)
            arguments = replace(arguments, folder=str(copy))
        elif arguments.threshold:
            raise UsageError(f"--threshold {arguments.threshold:g}: name a rule with --exit.")
        return judge_folder(arguments)


def judge_folder(arguments: JudgeArguments) -> int:
    """The verdict on one folder: printed, and written beside it."""
    folder = Path(arguments.folder)
    record = records.read(folder)
    if record.track not in TRACKS:
        raise UsageError(f"{folder}/submission.json: track {record.track!r:.60} is none of {', '.join(TRACKS)}.")
    data = data_folder(record, arguments.data)
    require_its_text(record, data)
    seconds = math.inf if arguments.lift_cap else TRACKS[record.track].eval_seconds
    probing = {"probe_seconds": math.inf} if arguments.lift_cap else {}
    if not 0 <= arguments.memory < math.inf:
        raise UsageError(f"--memory {arguments.memory:g}: give gigabytes, or 0 for three quarters of the machine's.")
    limits = Limits(seconds, **probing, memory=int(arguments.memory * 1e9))
    if arguments.keep_every < 1:
        raise UsageError(f"--keep-every {arguments.keep_every}: give 1 or more.")
    if arguments.keep and Path(arguments.keep).resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"--keep {arguments.keep}: it lies in the submission's own folder, name a file elsewhere.")
    keep = (Path(arguments.keep), arguments.keep_every) if arguments.keep else None
    if arguments.retrain:
        from golf import retrain

        retrain.require(folder, data)  # before any time is spent
    verdict = judge(folder, data, arguments.official, limits=limits, keep=keep)
    if arguments.retrain:
        verdict["retrained"] = told = retrain.retrain(folder, data, verdict, partial(judge, claims=False))
        if not told.startswith("agrees") and verdict["valid"]:
            verdict |= {"valid": False, "invalid": f"trained again: {told}"}
    if arguments.json:
        print(json.dumps(verdict), flush=True)
    else:
        show(verdict)
    write_verdict(folder, verdict)
    if keep and "val_bpb" in verdict:
        KeptScores.clear(keep[0])
    if not verdict["valid"]:
        print(f"invalid: {verdict['invalid']}.", file=sys.stderr)
    return 0 if verdict["valid"] else 1


def main_with_verdicts() -> int:
    try:
        return main()
    except Invalid as fault:
        print(f"invalid: {fault}.", file=sys.stderr)
        if "--json" in sys.argv:
            print(json.dumps({"invalid": str(fault)}))
        return 1


if __name__ == "__main__":
    sys.exit(run_script(main_with_verdicts))
