"""A submission's scorer in a process of its own, as the referee holds it: shut in, timed, and never trusted.

Tokens and log-probabilities cross in two files that only open descriptors reach; what is read is copied before it is
looked at, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil

from golf import folders
from golf.console import printable
from golf.errors import UsageError

HERE = Path(__file__).resolve().parent
HOST, SANDBOX = HERE / "host.py", HERE / "sandbox.py"
SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
    "/etc/alternatives", "/etc/localtime", "/sys/devices/system",
)  # fmt: skip
TMP_MB = 1024  # what a scorer may write
MOST_PROCESSES = 1024
# Errors of a scorer that wanted what it was not given.
REACHES_OUT = ("FileNotFoundError", "PermissionError", "Connection", "OSError", "gaierror", "TimeoutError", "URLError")
LEAST_FREE = 0.02  # of the machine's memory, below which the scorer is stopped: nameless files are no process's own
MOST_NUMBERS = 1 << 29  # log-probabilities of one row, two gigabytes
LONGEST_WAIT = 60.0  # seconds between two looks at the limits, where they are far
LOOK_EVERY = 0.2  # seconds between two looks at a scorer's memory
PROBE_TIMES = 10  # times as long as a row that is scored, what a row that is only probed may take
KEPT_VARIABLES = ("PATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


class Invalid(Exception):
    """The submission broke a rule, `check` where it is one of the numbered, or its scorer failed: one sentence."""

    def __init__(self, message: str, check: int = 0):
        super().__init__(message)
        self.check = check


@dataclass
class Limits:
    """What a scorer may use: seconds for loading and scoring, seconds for the referee's probes, bytes of memory."""

    seconds: float
    probe_seconds: float = 600.0
    memory: int = 0
    """Bytes of its process tree; 0 is three quarters of the machine's."""
    grace: float = 30.0
    """Seconds for what a scorer prepares when it is first asked in full."""
    scoring: float = field(default=0.0, init=False)
    probing: float = field(default=0.0, init=False)
    rows: float = field(default=0.0, init=False)
    """That were asked for to be scored."""
    rows_took: float = field(default=0.0, init=False)
    """Seconds of scoring without what loading and adapting take."""
    beyond: float = field(default=0.0, init=False)
    """Seconds by which rows that were only probed took longer than they may."""

    def spend(self, seconds: float, share: float, rows: int = 0) -> None:
        """Note seconds that `rows` took, of which a share was for probes. What a scorer does while it is only probed
        could be work for the rows to come: a row may take PROBE_TIMES what one takes that is scored, and what all take
        beyond that and the grace is scoring."""
        self.probing += seconds * share
        self.scoring += seconds * (1 - share)
        if share < 1:
            self.rows += rows * (1 - share)
            self.rows_took += seconds * (1 - share) if rows else 0.0
        elif rows and self.rows:
            before = max(self.grace, self.beyond)
            self.beyond += max(0.0, seconds - PROBE_TIMES * rows * self.rows_took / self.rows)
            self.scoring += max(self.grace, self.beyond) - before

    def left(self, share: float) -> float:
        """Seconds until one of the two is used up."""
        scoring = self.seconds - self.scoring if share < 1 else math.inf
        return min(scoring, self.probe_seconds - self.probing if share else math.inf)

    @property
    def most_memory(self) -> int:
        return self.memory or psutil.virtual_memory().total * 3 // 4


@cache
def why_not_isolated() -> str:
    """The reason why this system cannot shut a process in, or nothing."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no namespaces"
    spec = json.dumps({"binds": [[p, p] for p in installation()]})
    done = subprocess.run([sys.executable, "-I", SANDBOX, "--try", spec], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout.strip() or "the system refused namespaces"


def installation() -> list[str]:
    """Paths of the interpreter, its libraries and the system's."""
    executable = Path(sys.executable)
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, str(executable.resolve().parent.parent)}
    for path in list(own):  # an environment may be a link to a folder elsewhere, over further links
        while os.path.islink(path):
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
            own.add(path)
        own.add(os.path.realpath(path))
    found: list[str] = []
    for path in sorted({*own, *SYSTEM}, key=lambda p: (len(p), p)):
        if os.path.exists(path) and not any(path.startswith(f + "/") for f in found):
            found.append(path)
    return found


class Contender:
    """A scorer that has been loaded. Use as a context manager. Raises Invalid when it fails or overruns its limits.

    `isolation` is "isolated" in namespaces of its own, else "watched", or "open" where nothing holds it.
    `vocab` and `offers` are what it told.
    """

    def __init__(
        self, folder: Path, tokenizer: bytes, limits: Limits, hidden: Path | None = None, probe: bool = False,
        shut_in: bool = True,
    ):  # fmt: skip
        self.folder, self.tokenizer, self.limits, self.probe = folder, tokenizer, limits, probe
        self.share = 0.0  # of what is asked next: how much of it is for probes
        self.reason = why_not_isolated()
        self.isolation = "open" if not shut_in else "watched" if self.reason else "isolated"
        if hidden and any(str(hidden.resolve()).startswith(p + "/") for p in installation()):
            raise UsageError(f"--data {hidden}: it lies inside the Python installation, where scorers see it; move it.")
        self.fault = ""

    def __enter__(self) -> Contender:
        with contextlib.ExitStack() as stack:
            self.start(stack)
            told = self.receive()
            self.vocab = told.get("vocab")
            if type(self.vocab) is not int or self.vocab < 1:
                raise Invalid(f"the scorer's vocab is {self.vocab!r:.60}")
            self.offers = {name for name in ("score", "adapt", "reset") if told.get(name) is True}
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.resources.__exit__(None, None, None)

    def start(self, stack: contextlib.ExitStack) -> None:
        """Copy what counts and start the process; everything is undone by `stack`."""
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="golf-", ignore_cleanup_errors=True)))
        copy, root = place / "submission", place / "root"
        copy.mkdir()
        root.mkdir()
        folders.copy_counted(self.folder, copy)
        (copy / "tokenizer.model").write_bytes(self.tokenizer)  # the referee's own, not the folder's
        self.tokens, self.answers = (shared_file(stack) for _ in range(2))
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        passed = (request_read, answer_write, self.tokens.fileno(), self.answers.fileno())
        environment = {k: os.environ[k] for k in KEPT_VARIABLES if k in os.environ}
        python = [sys.executable, "-I", "-B"]
        if self.isolation == "isolated":
            binds = [[p, p] for p in installation()] + [[str(copy), "/submission"], [str(HOST), "/host.py"]]
            spec = json.dumps({"binds": binds, "root": str(root), "tmp_mb": TMP_MB, "fds": passed})
            command = [*python, str(SANDBOX), spec, *python, "/host.py", "/submission", "[]"]
            environment |= {"HOME": "/tmp", "TMPDIR": "/tmp"}
        else:
            private = place / "tmp"
            private.mkdir()
            allowed = [str(copy), str(private), str(HOST), *installation()] if self.isolation == "watched" else []
            command = [*python, str(HOST), str(copy), json.dumps(allowed)]
            environment |= {"HOME": str(private), "TMPDIR": str(private)}
        self.process = subprocess.Popen(
            [*command, *map(str, passed)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd=copy, env=environment, pass_fds=passed, start_new_session=True,
        )  # fmt: skip
        os.close(request_read)
        os.close(answer_write)
        stack.callback(self.kill)
        self.requests, self.replies = request_write, answer_read
        stack.callback(os.close, answer_read)
        stack.callback(os.close, request_write)
        self.pending = b""
        ended = threading.Event()
        watcher = threading.Thread(target=self.watch_memory, args=(ended,), daemon=True)
        watcher.start()
        stack.callback(watcher.join)
        stack.callback(ended.set)

    def watch_memory(self, ended: threading.Event) -> None:
        """Kill the process tree when it takes more memory or processes than allowed."""
        most = self.limits.most_memory
        try:
            top = psutil.Process(self.process.pid)
        except psutil.NoSuchProcess:
            return
        while not ended.wait(LOOK_EVERY):
            try:
                tree = [top, *top.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            used = taken(tree, "rss")
            if used > most:
                used = taken(tree, "pss")  # pages that processes share count once; slower to find out
            if used > most:
                self.fault = f"the scorer was stopped: it took {used / 1e9:.1f} GB of memory, {most / 1e9:.1f} allowed"
            elif (machine := psutil.virtual_memory()).available < LEAST_FREE * machine.total:
                self.fault = f"the scorer was stopped: the machine had {machine.available / 1e6:,.0f} MB of memory left"
            elif len(tree) > MOST_PROCESSES:
                self.fault = f"the scorer was stopped: it started {len(tree):,} processes"
            if self.fault:
                self.kill()
                return

    def kill(self) -> None:
        """End the scorer and what it started."""
        started = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in started:  # those that left the group; in namespaces they end with the first process
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def receive(self, rows: int = 0) -> dict:
        """The scorer's next message, and its time on the clock; `rows` that it was asked for."""
        began, share = time.monotonic(), 1.0 if self.probe else self.share
        while b"\n" not in self.pending:
            left = self.limits.left(share) - (time.monotonic() - began)
            ready, _, _ = select.select([self.replies], [], [], min(max(0.0, left), LONGEST_WAIT))
            if not ready and left > LONGEST_WAIT:
                continue
            if not ready:
                if self.limits.seconds - self.limits.scoring <= time.monotonic() - began and share < 1:
                    cap = f"{self.limits.seconds:g} s, the track's evaluation cap"
                    raise Invalid(f"the scorer was stopped after {cap}", 10)
                raise Invalid(f"the scorer was stopped after {self.limits.probe_seconds:g} s of probes")
            part = os.read(self.replies, 65_536)
            if not part:
                raise Invalid(self.fault or f"the scorer's process ended ({self.ending()})")
            self.pending += part
            if len(self.pending) > 1 << 20:
                raise Invalid("the scorer answered with something else than a short message")
        self.limits.spend(time.monotonic() - began, share, 0 if self.probe else rows)
        line, self.pending = self.pending.split(b"\n", 1)
        try:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError(message)
        except (ValueError, RecursionError) as error:
            raise Invalid(f"the scorer answered {line[:80]!r}") from error
        if "error" in message:
            said = printable(str(message["error"])[:500])
            raise Invalid(f"the scorer failed: {said}", 11 if said.startswith(REACHES_OUT) else 0)
        return message

    def ending(self) -> str:
        """How the process ended."""
        code = self.process.wait()
        number = -code if code < 0 else code - 128
        return f"signal {number}" if number > 0 else f"exit code {code}"

    def ask(self, kind: str, arrays: list[np.ndarray], **what: int) -> None:
        """Send a request with int64 arrays and wait for its answer."""
        data = b"".join(np.ascontiguousarray(a, dtype=np.int64).tobytes() for a in arrays)
        os.ftruncate(self.tokens.fileno(), len(data))
        os.pwrite(self.tokens.fileno(), data, 0)
        if self.pending or (select.select([self.replies], [], [], 0)[0] and os.read(self.replies, 1)):
            raise Invalid(self.fault or "the scorer answered before it was asked")
        left = self.limits.left(1.0 if self.probe else self.share)
        if not select.select([], [self.requests], [], max(0.0, min(left, LONGEST_WAIT)))[1]:
            raise Invalid("the scorer does not read what it is asked")
        with contextlib.suppress(BrokenPipeError):  # receive() says how the process ended
            os.write(self.requests, (json.dumps({"ask": kind, **what}) + "\n").encode())
        rows = what.get("rows", 0)
        if self.receive(rows).get("rows") != max(1, rows):
            raise Invalid("the scorer answered another request than the one made")

    def numbers(self, *dims: int) -> np.ndarray:
        """float32 numbers of these dimensions from the file of answers, the referee's own copy."""
        given = np.empty(dims, dtype=np.float32)
        view, done = memoryview(given).cast("B"), 0
        while done < given.nbytes:
            count = os.preadv(self.answers.fileno(), [view[done:]], done)
            if not count:
                raise Invalid("the scorer cut the file of its answers short")
            done += count
        return given

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T) -> (B, T, V) float32."""
        rows, length = tokens.shape
        os.ftruncate(self.answers.fileno(), 4 * rows * length * self.vocab)
        self.ask("logprobs", [tokens], rows=rows, length=length)
        return self.numbers(rows, length, self.vocab)

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T + 1) -> (B, T) float32, the log-probability of each but the first."""
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        os.ftruncate(self.answers.fileno(), 4 * rows * length)
        self.ask("score", [tokens], rows=rows, length=length)
        return self.numbers(rows, length)

    def adapt(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Show tokens (N,) whose scores were committed, each with the number of its document."""
        self.ask("adapt", [tokens, documents], length=int(tokens.size))

    def reset(self) -> None:
        """Have the scorer forget everything that it adapted to."""
        self.ask("reset", [])


def taken(processes: list[psutil.Process], kind: str) -> int:
    """Bytes of memory of processes: resident, or with shared pages in proportion where the system tells."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            info = process.memory_full_info() if kind == "pss" else process.memory_info()
            total += getattr(info, kind, info.rss)
    return total


def shared_file(stack: contextlib.ExitStack) -> BinaryIO:
    """A nameless file that lives while it is open, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return stack.enter_context(os.fdopen(os.memfd_create("golf"), "w+b", buffering=0))
    return stack.enter_context(tempfile.TemporaryFile(buffering=0))
