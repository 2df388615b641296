"""A long scoring that can be interrupted: what is committed stays committed, and is never scored again.

Two files of the judge's own: NAME holds, as JSON, whose scores they are, how many are committed, the seconds they took
and what the checks saw; NAME.f32 the scores, float32, one a target in order. A part is appended and synced before NAME
says that it stands.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from golf.contender import Limits
from golf.errors import UsageError
from golf.files import write_bytes
from golf.judging import Referee
from golf.log_file import lock
from golf.rows import Row
from golf.sheet import Lead

SCHEMA = 4
SPENT = ("scoring", "probing", "rows", "rows_took", "beyond")  # of the limits


class KeptScores:
    """Where a referee writes its ledger through, and goes on from."""

    def __init__(self, path: Path, identity: dict, every: int = 1 << 20):
        """`identity` says of which submission and text the scores are; `every` so many targets they are kept. Raises
        UsageError for files of another, or that another judge writes."""
        self.every = every
        self.path, self.scores, self.identity = path, path.with_name(path.name + ".f32"), identity
        self.state: dict = {}
        self.stretches = 0  # that stand
        self.digest = hashlib.sha256()  # of their scores
        if path.exists():
            self.state = self.read()
        self.taken = open(self.scores, "a", encoding="utf-8")  # which locks it for as long as this judge lives
        if not lock(self.taken):
            raise UsageError(f"--keep {path}: another judge is at it, name another file or wait.")

    def read(self) -> dict:
        """What stands. Raises UsageError."""
        path, identity = self.path, self.identity
        try:
            told = json.loads(path.read_text("utf-8"))
            size, stretches, count = self.scores.stat().st_size, told["stretches"], told["count"]
            fits = told["schema"] == SCHEMA and type(count) is type(stretches) is int and 0 <= 4 * count <= size
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"--keep {path}: it is damaged ({error!r:.80}), delete it to begin anew.") from error
        if not fits or told.get("identity") != identity:
            raise UsageError(f"--keep {path}: it is of another submission or text, name another file or delete it.")
        return told

    def go_on(self, referee: Referee, limits: Limits, stretches: list[list[Row]]) -> int:
        """Commit again what is kept of `stretches`, row by row; returns how many of them that is. Raises UsageError for
        scores that are not those that were kept."""
        if not self.state:
            return 0
        count = self.state["count"]
        with open(self.scores, "r+b") as file:
            file.truncate(4 * count)  # what was appended and never said to stand
        scores = np.fromfile(self.scores, dtype="<f4")
        self.digest.update(scores.tobytes())
        if self.digest.hexdigest() != self.state["sha256"]:
            raise UsageError(f"--keep {self.path}: its scores were changed or are damaged, delete it to begin anew.")
        for row in itertools.chain(*stretches[: self.state["stretches"]]):
            referee.ledger.commit(row, scores[row.new.start - 1 : row.new.stop - 1])
        referee.committed = self.state["committed"]
        for name in SPENT:
            setattr(limits, name, getattr(limits, name) + self.state[name])
        for number, check in self.state["checks"].items():
            mine = referee.sheet.checks[int(number)]
            mine.tried, mine.faults = mine.tried + check["tried"], mine.faults + check["faults"]
        for name in ("flip_nats", "compared", "identical", "distributions", "worst"):
            setattr(referee, name, self.state[name])
        referee.lead, referee.surplus = (Lead(**self.state[name]) for name in ("lead", "surplus"))
        self.state["interruptions"] += 1
        self.stretches = self.state["stretches"]
        return self.stretches

    def stand(self, referee: Referee, limits: Limits, stretches: int, rows: list[Row]) -> None:
        """The scores of so many stretches stand; of `rows` the first and the last are of those that did not yet."""
        part = slice(rows[0].new.start, rows[-1].new.stop)
        scores = referee.ledger.scores[part].astype("<f4").tobytes()
        self.digest.update(scores)
        with open(self.scores, "ab" if self.state else "wb") as file:
            file.write(scores)
            file.flush()
            os.fsync(file.fileno())
        checks = {n: {"tried": c.tried, "faults": c.faults} for n, c in referee.sheet.checks.items()}
        times = self.state.get("interruptions", 0)
        self.state = {
            "schema": SCHEMA, "identity": self.identity, "stretches": stretches, "count": referee.ledger.count,
            "committed": referee.committed, "checks": checks, "flip_nats": referee.flip_nats,
            "compared": referee.compared, "identical": referee.identical, "distributions": referee.distributions,
            "worst": referee.worst, **{name: getattr(limits, name) for name in SPENT},
            "lead": asdict(referee.lead), "surplus": asdict(referee.surplus),
            "interruptions": times, "sha256": self.digest.hexdigest(),
        }  # fmt: skip
        write_bytes(self.path, json.dumps(self.state, default=lambda number: number.item()).encode())
        self.stretches = stretches

    @property
    def count(self) -> int:
        """Targets that stand."""
        return self.state.get("count", 0)

    @staticmethod
    def clear(path: Path) -> None:
        """Delete both files, of a scoring whose verdict is out."""
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".f32").unlink(missing_ok=True)
