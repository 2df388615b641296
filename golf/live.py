"""A run as people follow it: plain lines, or on a terminal one panel that stays in place; from the log's rows alone."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import sys
import time
from pathlib import Path

from golf.config import shape_from_dict
from golf.console import printable
from golf.errors import UsageError
from golf.files import open_plain
from golf.log_file import is_locked, parsed

RECENT = 50  # steps whose mean is shown as the loss
REFRESH = 0.25  # seconds between two pictures
POLL = 0.5  # seconds between two looks at a log
BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def predicted_loss(progress: list[float], loss: list[float]) -> float | None:
    """Where the training loss will end: a straight line in the logarithm of progress through its last two thirds, at
    the clock's end. None before a quarter of the clock or 20 steps: at a tenth it is up to 1.2 nats off."""
    if len(loss) < 20 or progress[-1] < 0.25:
        return None
    start = len(loss) // 3
    x = [math.log(max(p, 1e-9)) for p in progress[start:]]
    if len(set(x)) < 2:
        return None
    return statistics.linear_regression(x, loss[start:]).intercept


class State:
    """What the rows so far say."""

    def __init__(self) -> None:
        self.start: dict = {}
        self.last: dict = {}
        self.progress: list[float] = []
        self.loss: list[float] = []

    def take(self, row: dict) -> None:
        if row.get("event") == "start":
            self.start = row
        elif row.get("event") == "step" and isinstance(row.get("loss"), float):
            self.last = row
            self.progress.append(float(row.get("progress", 0.0)))
            self.loss.append(row["loss"])

    @property
    def bits(self) -> float | None:
        """Bits a byte for each nat a token, by the bytes of the validation text."""
        per_token = self.start.get("corpus", {}).get("bytes_a_token")
        return 1 / per_token / math.log(2) if per_token else None

    @property
    def max_steps(self) -> int:
        return self.start.get("config", {}).get("run", {}).get("max_steps", 0)

    def left(self) -> str:
        """How long it goes on."""
        if self.max_steps:
            return f"{self.max_steps - self.last['step']} steps left"
        return f"{self.last['limit'] - self.last['elapsed']:.0f} s left"

    def speed(self) -> float:
        return self.last["tokens"] / max(self.last["elapsed"], 1e-9)


def told(state: State, row: dict) -> str | None:
    """A row as a line, or nothing."""
    event = row.get("event")
    if event == "start":
        return started(row)
    if event == "step":
        every = state.start.get("config", {}).get("run", {}).get("log_every", 20)
        if row["step"] != 1 and row["step"] % max(1, every):
            return None
        pace = f"{state.speed():>9,.0f} tokens/s  {row['ms']:>7.1f} ms/step"
        return f"step {row['step']:>6}  loss {row['loss']:.4f}  {pace}  {state.left()}"
    if event == "memory":
        return row["message"]
    if event == "warm-up":
        return f"warm-up {row['seconds']:.1f} s (outside the clock)"
    if event == "resumed":
        changed = "; the code has changed since" if row["code_changed"] else ""
        return f"resumed after step {row['step']}, {row['elapsed']:.2f} s on the clock{changed}"
    if event == "not-kept":
        return f"no checkpoint at step {row['step']}: {row['reason']}"
    if event == "validation":
        return f"step {row['step']:>6}  val_loss {row['val_loss']:.4f}  val_bpb {row['val_bpb']:.4f}"
    if event == "trained":
        why = f": {row['reason']}" if row["reason"] else ""
        return f"training {row['status']}{why} after {row['steps']} steps, {row['train_seconds']:.2f} s"
    if event == "calibrated":
        late = "" if row["batches"] else ", too late: packed without"
        return (f"calibrated on {row['batches']} batches in {row['seconds']:.1f} s (reserve {row['reserve']:.1f} s)"
                f"{late}")  # fmt: skip
    if event == "packed":
        loss = row["predicted_loss"]
        expected = f", expected to cost {loss:.5f} nats a token" if loss is not None else ""
        return "\n".join([f"packed in {row['seconds']:.1f} s: {row['bytes']:,} bytes{expected}", *row["notes"]])
    if event == "unpacked":
        return f"before packing: val_loss {row['val_loss']:.5f}  val_bpb {row['val_bpb']:.5f}"
    if event == "penalty" and not row["bpb"]:
        return "what packing costs was not measured: memory ran out"
    if event == "penalty":
        return "packing costs, bpb: " + ", ".join(f"{loops} loops {bpb:+.5f}" for loops, bpb in row["bpb"].items())
    if event == "judging":
        return "judging the artifact in a process of its own"
    if event == "failed":
        return f"failed: {row['error']}"
    return None


def started(row: dict) -> str:
    """The first line: what is trained, where, on what."""
    config, machine = row["config"], row["machine"]
    shape = shape_from_dict(config["shape"])
    line = (
        f"{config['preset']} seed {config['run']['seed']}: {shape.parameter_count:,} parameters, "
        f"{shape.unique_layers} unique and {shape.effective_layers} effective layers, width {shape.width}; "
        f"{machine['world']} x {machine['device']} {machine['dtype'][6:]}, compile {machine['compile']}; "
        f"corpus {row['corpus']['name']}{' -> ' + row['folder'] if 'folder' in row else ''}"
    )
    return "\n".join([line, *machine["notes"]])


class Lines:
    """Plain lines, for a pipe or a file."""

    def __init__(self) -> None:
        self.state = State()

    def take(self, row: dict) -> None:
        self.state.take(row)
        for line in (told(self.state, row) or "").splitlines():
            print(printable(line), flush=True)

    def close(self) -> None:
        pass


class Panel:
    """One picture that stays in place while steps go by; other events are lines above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.state, self.drawn = State(), 0.0
        self.console = Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.live.start()

    def take(self, row: dict) -> None:
        self.state.take(row)
        if row.get("event") == "step":
            if time.monotonic() - self.drawn > REFRESH:
                self.drawn = time.monotonic()
                self.live.update(self.picture(), refresh=True)
            return
        if row.get("event") == "trained":
            self.live.update("", refresh=True)
        for line in (told(self.state, row) or "").splitlines():
            self.console.print(printable(line), markup=False, soft_wrap=True)

    def close(self) -> None:
        self.live.stop()

    def picture(self) -> object:
        """Bar, loss and its curve, what is predicted."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        state, row = self.state, self.state.last
        loss = statistics.mean(state.loss[-RECENT:])
        end, bits = predicted_loss(state.progress, state.loss), state.bits
        grid = Table.grid(padding=(0, 2))
        grid.add_row(ProgressBar(total=1.0, completed=min(1.0, row["progress"]), width=40),
                     f"{row['progress']:.0%}  {state.left()}")  # fmt: skip
        grid.add_row(f"step {row['step']:,}  loops {row['loops']}  loss {loss:.4f}  {curve(state.loss)}",
                     f"{state.speed():,.0f} tokens/s  {row['ms']:.0f} ms/step")  # fmt: skip
        if bits:
            ahead = f", about {end * bits:.4f} at the end" if end is not None else ""
            grid.add_row(f"bits a byte of the training text {loss * bits:.4f}{ahead}", planned(state.start))
        return grid


def curve(loss: list[float], width: int = 24) -> str:
    """The last two thirds of a curve in block characters."""
    kept = loss[len(loss) // 3 :]
    edges = [n * len(kept) // width for n in range(width + 1)]
    means = [statistics.mean(kept[a:b]) for a, b in itertools.pairwise(edges) if b > a]
    low, high = min(means), max(means)
    return "".join(BLOCKS[int((v - low) / max(high - low, 1e-9) * (len(BLOCKS) - 1))] for v in means)


def planned(start: dict) -> str:
    """Bytes that the submission is predicted to take of its cap."""
    size = start.get("planned", {})
    return f"about {size['bytes']:,} of {size['cap']:,} bytes" if size else ""


def display() -> Lines | Panel:
    """What fits the standard output."""
    return Panel() if sys.stdout.isatty() else Lines()


def told_end(record: dict | None, step: int) -> int:
    """Say how a run that was watched has ended; exit 0 where it left a record."""
    if not record:
        print(f"the run ended without a record, after step {step}", file=sys.stderr)
        return 1
    size = record.get("bytes_total")
    size = f"{size:,}" if type(size) is int else size
    print(printable(f"{record.get('status')}: val_bpb {record.get('val_bpb')}, {size} bytes"))
    return 0


def watch(folder: Path) -> int:
    """Follow a run from another terminal until it ends; exit 0 when it ends with a record, 1 when its writer is gone
    without one. Raises UsageError for a folder that is no run's."""
    log = folder / "log.jsonl"
    try:
        file = open_plain(log)
    except OSError as error:
        raise UsageError(f"{log} cannot be read ({error.strerror}); name a run folder.") from error
    shown = display()
    try:
        with file:
            rest, record = b"", None
            while True:
                alive = is_locked(log)  # before reading: what is read after a writer's end is all there is
                rest += file.read()
                *lines, rest = rest.split(b"\n")
                for row in filter(None, map(parsed, lines)):
                    with contextlib.suppress(LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
                        shown.take(row)  # a row that was written by hand may lack anything
                    if row.get("event") in ("record", "start", "step"):  # a run may go on after its record
                        record = row if row["event"] == "record" else None
                if not alive:
                    shown.close()
                    return told_end(record, shown.state.last.get("step", 0))
                time.sleep(POLL)
    finally:
        shown.close()
