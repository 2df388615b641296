"""The referee: a submission folder to bits per byte on the whole validation split.

    python eval_bpb.py FOLDER [--data DIR] [--official] [--json]
    python eval_bpb.py sample FOLDER --prompt TEXT

The scorer runs in a fresh process that is given only the counted files and the tokenizer. The loop, the tokens, the
byte count, the clock and the sum of nats are the referee's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tyro

from golf import folders, records
from golf.bpb import ByteTable, Score, decoded_bytes, windows
from golf.config import TRACKS, UsageError
from golf.console import parse, run_script
from golf.data import Corpus

HOST = Path(__file__).resolve().parent / "golf" / "host.py"
BUFFER_BYTES = 64 << 20  # log-probabilities asked for at a time
NORMAL = 1e-3  # how far a row's probabilities may sum from 1


class Invalid(Exception):
    """The submission broke a rule or its scorer failed: one sentence; exit 1."""


@dataclass
class Limits:
    """Seconds left for loading and scoring together."""

    seconds: float

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    @property
    def used(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        return self.seconds - self.used


class Host:
    """A submission's scorer in its own process, on a copy of what is counted. Use as a context manager.

    Tokens and log-probabilities cross in two files that only open descriptors reach; what is read is copied before it
    is looked at. Raises Invalid when the scorer fails, answers with wrong shapes or runs out of time.
    """

    def __init__(self, folder: Path, tokenizer: bytes, limits: Limits):
        self.folder, self.tokenizer, self.limits = folder, tokenizer, limits

    def __enter__(self) -> Host:
        with contextlib.ExitStack() as stack:
            self.start(stack)
            self.vocab = self.receive("vocab")
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.resources.__exit__(None, None, None)

    def start(self, stack: contextlib.ExitStack) -> None:
        """Copy the folder and start the process; everything is undone by `stack`."""
        copy = stack.enter_context(tempfile.TemporaryDirectory(prefix="golf-", ignore_cleanup_errors=True))
        folders.copy_counted(self.folder, Path(copy))
        (Path(copy) / "tokenizer.model").write_bytes(self.tokenizer)  # the referee's own, not the folder's
        self.tokens, self.answers = (shared_file(stack) for _ in range(2))
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR")
        environment = {k: os.environ[k] for k in kept if k in os.environ} | {"HOME": copy}
        passed = (request_read, answer_write, self.tokens.fileno(), self.answers.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(HOST), copy, *map(str, passed)], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=copy, env=environment, pass_fds=passed,
            start_new_session=True,
        )  # fmt: skip
        os.close(request_read)
        os.close(answer_write)
        stack.callback(self.kill)
        self.requests, self.replies = os.fdopen(request_write, "w"), answer_read
        stack.callback(os.close, answer_read)
        stack.callback(self.close_requests)
        self.pending = b""

    def close_requests(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()

    def kill(self) -> None:
        """End the scorer and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def receive(self, key: str) -> int:
        """The integer under `key` of the scorer's next message."""
        while b"\n" not in self.pending:
            ready, _, _ = select.select([self.replies], [], [], max(0.0, self.limits.left))
            if not ready:
                raise Invalid(f"the scorer was stopped after {self.limits.seconds:g} s, the track's evaluation cap")
            part = os.read(self.replies, 65_536)
            if not part:
                raise Invalid(f"the scorer's process ended (exit code {self.process.wait()})")
            self.pending += part
            if len(self.pending) > 1 << 20:
                raise Invalid("the scorer answered with something else than a short message")
        line, self.pending = self.pending.split(b"\n", 1)
        try:
            message = json.loads(line)
            if isinstance(message, dict) and "error" in message:
                raise Invalid(f"the scorer failed: {str(message['error'])[:500]}")
            value = message[key]
            if type(value) is not int or value < 1:
                raise ValueError(value)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Invalid(f"the scorer answered {line[:80]!r}") from error
        return value

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T) int64 -> (B, T, V) float32, the referee's own copy."""
        rows, length = tokens.shape
        given = np.empty((rows, length, self.vocab), dtype=np.float32)
        os.ftruncate(self.answers.fileno(), given.nbytes)
        data = np.ascontiguousarray(tokens, dtype=np.int64).tobytes()
        os.ftruncate(self.tokens.fileno(), len(data))
        os.pwrite(self.tokens.fileno(), data, 0)
        with contextlib.suppress(BrokenPipeError):  # receive() says how the process ended
            self.requests.write(json.dumps({"rows": rows, "length": length}) + "\n")
            self.requests.flush()
        if self.receive("rows") != rows:
            raise Invalid("the scorer answered another request than the one made")
        view, done = memoryview(given).cast("B"), 0
        while done < given.nbytes:
            count = os.preadv(self.answers.fileno(), [view[done:]], done)
            if not count:
                raise Invalid("the scorer cut the file of its answers short")
            done += count
        return given


def shared_file(stack: contextlib.ExitStack) -> BinaryIO:
    """A nameless file that lives while it is open, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return stack.enter_context(os.fdopen(os.memfd_create("golf"), "w+b", buffering=0))
    return stack.enter_context(tempfile.TemporaryFile(buffering=0))


def score_tokens(
    ask: Callable[[np.ndarray], np.ndarray],
    vocab: int,
    tokens: np.ndarray,
    context: int,
    official: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[float, int]:
    """Nats (float64) and targets of a stream of tokens, rows of `context`; the partial last row too unless official.

    At places of the referee's choice, in every answer, the probabilities must sum to 1. Raises Invalid.
    """
    rows = max(1, BUFFER_BYTES // (4 * vocab * context))
    choice = np.random.default_rng()
    nats, count = 0.0, 0
    for inputs, targets in windows(tokens, context, rows, whole_only=official):
        given = ask(inputs)
        chosen = np.take_along_axis(given, targets[..., None], axis=-1)[..., 0]
        if not np.isfinite(chosen).all() or chosen.max() > NORMAL:
            raise Invalid("the scorer gave a log-probability that is not finite or above 0")
        places = choice.integers(0, targets.size, max(8, targets.size // 100))
        sums = np.exp(given.reshape(-1, vocab)[places].astype(np.float64)).sum(axis=-1)
        wrong = ~(np.abs(sums - 1) <= NORMAL)  # also where the sum is not a number
        if wrong.any():
            raise Invalid(f"the scorer's probabilities sum to {sums[wrong][0]:.4f}, not to 1")
        nats -= float(chosen.sum(dtype=np.float64))
        count += targets.size
        progress(count)
    return nats, count


def count_bytes(table: ByteTable, tokens: np.ndarray, targets: int) -> int:
    """Bytes of the first `targets` targets, once the table and the decoded text of the whole split agree."""
    by_table = table.count(tokens[:-1], tokens[1:])
    by_text = decoded_bytes(table, tokens)
    if by_table != by_text:
        raise UsageError(
            f"The validation text decodes to {by_text:,} bytes but the token table counts {by_table:,}; "
            "the tokenizer does not fit these shards."
        )
    return by_table if targets == tokens.size - 1 else table.count(tokens[:targets], tokens[1 : targets + 1])


def tell_progress(total: int, limits: Limits) -> Callable[[int], None]:
    """Scored tokens and time left, on a terminal only."""
    if not sys.stderr.isatty():
        return lambda done: None

    def tell(done: int) -> None:
        left = limits.used / done * (total - done)
        end = "\n" if done >= total else ""
        print(f"\rscored {done:,} of {total:,} tokens, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)

    return tell


def data_folder(record: records.Record, given: str) -> Path:
    """The data asked for, or the data the record names. Raises UsageError."""
    if given:
        return Path(given)
    return Path(os.environ.get("DATA_PATH") or f"data/{record.corpus}")


def check_context(record: records.Record, folder: Path) -> None:
    """Refuse a record that asks for rows of no sane length. Raises UsageError."""
    if not 2 <= record.context <= 1 << 20:
        raise UsageError(f"{folder}/submission.json: context {record.context} is not from 2 to {1 << 20}.")


def judge(folder: Path, data: Path, official: bool = False) -> dict:
    """Score a submission folder. Raises Invalid for the submission's faults, UsageError for the user's."""
    record = records.read(folder)
    corpus = Corpus(data)
    if record.track not in TRACKS:
        raise UsageError(f"{folder}/submission.json: track {record.track!r} is none of {', '.join(TRACKS)}.")
    check_context(record, folder)
    measured = folders.sizes(folder)
    model = corpus.tokenizer.read_bytes()
    if record.tokenizer_sha256 not in ("", hashlib.sha256(model).hexdigest()):
        raise UsageError(f"--data {data}: its tokenizer is not the one {folder} was trained with, name other data.")
    table = ByteTable(model)
    tokens = np.concatenate(corpus.shards("val"))
    if tokens.size - 1 < record.context:
        raise UsageError(f"--data {data}: the validation split is shorter than one row of {record.context} tokens.")
    if int(tokens.max()) >= table.vocab_size:
        raise UsageError(f"--data {data}: a validation token exceeds the tokenizer's {table.vocab_size} pieces.")
    targets = tokens.size - 1
    if official:
        targets = targets // record.context * record.context
    text_bytes = count_bytes(table, tokens, targets)
    limits = Limits(TRACKS[record.track].eval_seconds)
    with Host(folder, model, limits) as host:
        if host.vocab != table.vocab_size:
            raise Invalid(f"the scorer's vocabulary is {host.vocab}, the tokenizer's {table.vocab_size}")
        tell = tell_progress(targets, limits)
        nats, count = score_tokens(host.logprobs, host.vocab, tokens, record.context, official, tell)
    seconds = limits.used
    score = Score(nats, count, text_bytes)
    artifact = folder / "model.bin"
    return {
        "folder": str(folder), "val_loss": score.loss, "val_bpb": score.bpb, "val_tokens": score.tokens,
        "val_bytes": score.bytes, "eval_seconds": round(seconds, 3), "official_truncation": official,
        "corpus": corpus.name, "corpus_fingerprint": corpus.fingerprint, "bytes_total": measured.total,
        "cap": TRACKS[record.track].bytes_cap, "fits": measured.total <= TRACKS[record.track].bytes_cap,
        "model_sha256": hashlib.sha256(artifact.read_bytes()).hexdigest() if artifact.is_file() else "",
    }  # fmt: skip


@dataclass(frozen=True)
class JudgeArguments:
    """Score a submission folder in bits per byte. Exit 0 scored, 1 invalid or over the cap, 2 misuse."""

    folder: tyro.conf.Positional[str]
    """A run folder."""
    data: str = ""
    """Prepared data; DATA_PATH or data/CORPUS of the record when empty."""
    official: bool = False
    """Leave out the partial last row, as the contest's trainer does."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class SampleArguments:
    """Let a packed model write."""

    folder: tyro.conf.Positional[str]
    """A run folder."""
    prompt: str = ""
    """Text to continue."""
    tokens: int = 100
    """Tokens to write."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    seed: int = 1


def sample(arguments: SampleArguments) -> str:
    """The prompt and its continuation. Raises Invalid and UsageError."""
    folder = Path(arguments.folder)
    for name in ("tokens", "temperature", "seed"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise UsageError(f"--{name} {value}: give 0 or more.")
    record = records.read(folder)
    check_context(record, folder)
    table = ByteTable(folder / "tokenizer.model")
    generator = np.random.default_rng(arguments.seed)
    row = [table.bos, *table.encode(arguments.prompt)]
    asked = table.decode(row)
    limits = Limits(TRACKS.get(record.track, TRACKS["contest"]).eval_seconds)
    with Host(folder, (folder / "tokenizer.model").read_bytes(), limits) as host:
        if host.vocab != table.vocab_size:
            raise Invalid(f"the scorer's vocabulary is {host.vocab}, the tokenizer's {table.vocab_size}")
        for _ in range(arguments.tokens):
            given = host.logprobs(np.array([row[-record.context :]], dtype=np.int64))[0, -1].astype(np.float64)
            if not np.isfinite(given).any() or np.isnan(given).any():
                raise Invalid("the scorer gave log-probabilities that are not numbers")
            if arguments.temperature == 0:
                token = int(given.argmax())
            else:
                weight = np.exp((given - given.max()) / arguments.temperature)
                token = int(generator.choice(weight.size, p=weight / weight.sum()))
            if token == table.bos:
                break
            row.append(token)
    return arguments.prompt + table.decode(row)[len(asked) :].decode(errors="replace")


def main() -> int:
    if sys.argv[1:2] == ["sample"]:
        print(sample(parse(tyro.cli, SampleArguments, prog="eval_bpb.py sample", args=sys.argv[2:])))
        return 0
    arguments = parse(tyro.cli, JudgeArguments, prog="eval_bpb.py")
    folder = Path(arguments.folder)
    verdict = judge(folder, data_folder(records.read(folder), arguments.data), arguments.official)
    if arguments.json:
        print(json.dumps(verdict))
    else:
        for key, value in verdict.items():
            print(f"{key}: {value}")
    return 0 if verdict["fits"] else 1


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
