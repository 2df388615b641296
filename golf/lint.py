"""What a reader finds in a contest-format folder before anything is run: sizes, times, tokens, claims and logs.

    python eval_bpb.py lint FOLDER... [--against FOLDER] [--json]

Purely static: scripts are parsed, never run. A folder of another track of ours is held to that track's limits, and to
the validation text that it names. Knows both families of public logs: the baseline's (step:S/I ...
train_time:Xms, Total submission size ..., final_..._exact val_loss: val_bpb:) and the later one (S/I train_loss: ...
train_time: Xm, quantized... val_loss: val_bpb: eval_time:, total_eval_time:).
"""

from __future__ import annotations

import ast
import json
import math
import statistics
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from golf.config import TRACKS
from golf.console import printable
from golf.contest_log import Log, numbered, read_log
from golf.errors import UsageError
from golf.files import read_plain
from golf.stats import NATS, P_VALUE, PRACTICE, welch

TOKENS = {  # targets of the validation set by export, whole rows and with the tail
    62_021_632: "sp1024", 62_021_845: "sp1024 with the tail", 45_508_608: "sp4096", 40_540_160: "sp8192",
    47_851_520: "CaseOps", 47_853_343: "CaseOps with the tail", 63_779_840: "the older sp1024 export",
}  # fmt: skip
# Bytes of the validation text: the baseline's 2.0727 nats a token and 1.2244 bits a byte over 62,021,632 tokens.
VALIDATION_BYTES = 62_021_632 * 2.07269931 / math.log(2) / 1.22436570
BYTES_OFF = 0.01  # relative
BPB_OFF = 5e-4
REQUIRED = ("author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "bytes_total")
WANTED = ("track", "bytes_code")
ALIASES = {
    "github_id": ("github", "github_username", "github_handle"), "author": ("authors",), "name": ("title", "run_name"),
    "blurb": ("description", "summary", "technique_summary"), "date": ("submission_date",),
    "val_loss": ("mean_val_loss", "final_val_loss", "val_loss_mean"),
    "val_bpb": ("mean_val_bpb", "final_val_bpb", "val_bpb_mean"),
    "bytes_total": ("artifact_bytes", "artifact_bytes_max", "artifact_bytes_mean", "total_bytes", "submission_bytes"),
    "bytes_code": ("code_bytes",),
}  # fmt: skip

PER_RUN = {
    "seed", "run_id", "logfile", "log_file", "log_path", "local_rank", "rank", "model_path", "quantized_model_path",
    "output_dir", "run_name", "timestamp",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something a judge would ask about: error or warning, and where it stands."""

    level: str
    file: str
    line: int
    text: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.level}: {self.text}"


def plain(path: Path) -> bool:
    """Whether it is a file itself, not a link to one, a pipe or a device."""
    return path.is_file() and not path.is_symlink()


class Linter:
    """Reads a folder and collects what it finds."""

    def __init__(self, folder: Path):
        self.folder, self.findings = folder, []
        self.values: dict = {}
        self.logs: list[Log] = []
        self.limits, self.texts = TRACKS["contest"], dict.fromkeys(TOKENS, VALIDATION_BYTES)

    def say(self, level: str, file: Path | str, line: int, text: str) -> None:
        self.findings.append(Finding(level, str(file), line, text))

    def run(self) -> list[Finding]:
        self.read_values()
        self.read_scripts()
        self.read_logs()
        self.compare()
        return self.findings

    def get(self, key: str) -> object:
        """A key of submission.json, or one of the names by which it is known."""
        return next((self.values[k] for k in (key, *ALIASES.get(key, ())) if k in self.values), None)

    def number(self, key: str) -> float | None:
        value = self.get(key)
        return float(value) if type(value) in (int, float) and abs(value) < 1 << 63 else None  # also no nan

    def read_values(self) -> None:
        if not (self.folder / "README.md").is_file():
            self.say("error", self.folder / "README.md", 0, "it is missing")
        named = [self.folder / "submission.json", *sorted(self.folder.glob("submission*.json"))]
        path = next((p for p in named if plain(p)), named[0])
        try:
            self.values = json.loads(read_plain(path))
            if not isinstance(self.values, dict):
                raise ValueError("it is not an object")
        except FileNotFoundError:
            self.say("error", path, 0, "it is missing")
            return
        except OSError as error:
            self.say("error", path, 0, f"it cannot be read ({error.strerror})")
            return
        except (ValueError, RecursionError) as error:
            self.values = {}
            self.say("error", path, 0, f"it is not JSON ({str(error)[:80]})")
            return
        track = self.values.get("track")
        if isinstance(track, str) and track in TRACKS and track != "contest":
            self.limits, self.texts = TRACKS[track], {}
            if all((self.number(key) or 0) >= 1 for key in ("val_tokens", "val_bytes")):
                self.texts = {int(self.number("val_tokens")): self.number("val_bytes")}
        for keys, level in ((REQUIRED, "error"), (WANTED, "warning")):
            for key in keys:
                if self.get(key) in (None, ""):
                    self.say(level, path, 0, f"the key {key} is missing")
        total = self.number("bytes_total")
        cap = self.limits.bytes_cap
        if total is not None and total > cap:
            self.say("error", path, self.line_of(path, "bytes_total"), f"{total:,.0f} bytes exceed {cap:,}")
        p, gain = self.number("p_value"), self.number("improvement_nats")
        if p is not None and p >= P_VALUE:
            text = f"p is {p:g}, the rule asks for less than {P_VALUE} (in practice {PRACTICE} was accepted)"
            self.say("warning", path, self.line_of(path, "p_value"), text)
        if gain is not None and gain < NATS:
            self.say("warning", path, self.line_of(path, "improvement_nats"),
                     f"{gain:g} nats better, the rule asks for {NATS} (in practice less was accepted)")  # fmt: skip

    def line_of(self, path: Path, key: str) -> int:
        """Where a key stands in a JSON file."""
        names = (key, *ALIASES.get(key, ()))
        for number, line in numbered(path):
            if any(f'"{name}"'.encode() in line for name in names):
                return number
        return 0

    def read_scripts(self) -> None:
        script = self.folder / "train_gpt.py"
        if not script.is_file():
            self.say("error", script, 0, "it is missing")
        for path in sorted(self.folder.glob("*.py")):
            if not plain(path):
                self.say("error", path, 0, "it is no plain file")
                continue
            try:
                source = read_plain(path)
            except OSError as error:
                self.say("error", path, 0, f"it cannot be read ({error.strerror})")
                continue
            if not source.strip():
                self.say("error", path, 0, "it is empty")
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ast.parse(source)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                line = getattr(error, "lineno", None) or 0
                self.say("error", path, line, f"it does not compile ({str(error)[:80]})")
        counted = self.number("bytes_code")
        shipped = sum(p.stat().st_size for p in self.folder.glob("*.py") if plain(p))
        if counted is not None and plain(script) and counted not in (script.stat().st_size, shipped):
            self.say("error", script, 0, f"{counted:,.0f} bytes of code are counted, the file that is shipped has "
                                         f"{script.stat().st_size:,}")  # fmt: skip

    def read_logs(self) -> None:
        paths = {
            p for pattern in ("*.log", "logs/*.txt", "logs/*.log", "train*.txt") for p in self.folder.glob(pattern)
        }
        self.logs = [read_log(p) for p in sorted(paths) if plain(p)]
        if not self.logs:
            self.say("error", self.folder, 0, "there is no log")
        for log in self.logs:
            self.check_log(log)

    def check_log(self, log: Log) -> None:
        cap, train_ms = self.limits.bytes_cap, 1e3 * self.limits.train_seconds
        for total, line in log.totals[-1:]:
            if total > cap:
                unit = ", but fit 16 MiB: the cap is decimal" if cap == 16_000_000 and total <= 16 << 20 else ""
                self.say("error", log.path, line, f"{total:,} bytes in all exceed {cap:,}{unit}")
        for size, line in log.mebibytes[-1:]:
            if 15.2588 < size <= 16:
                self.say("error", log.path, line, f"{size} MiB are {size * 2**20:,.0f} bytes: the cap is decimal")
        over = [(ms, line) for ms, line in log.train_ms if ms > train_ms]
        for ms, line in over[-1:]:
            self.say("error", log.path, line, f"{ms:,.0f} ms of training exceed {train_ms:,.0f}")
        for ms, line in log.eval_ms:
            if ms > self.limits.eval_seconds * 1e3:
                allowed = f"{self.limits.eval_seconds:g}"
                self.say("error", log.path, line, f"{ms / 1e3:,.1f} s of evaluation exceed {allowed}")
        for count, line in log.tokens[-1:]:
            if self.texts and count not in self.texts:
                near = min(self.texts, key=lambda n: abs(n - count))
                self.say("error", log.path, line, f"{count:,} validation tokens are no known set; "
                                                  f"{TOKENS.get(near, 'the one told')} has {near:,}")  # fmt: skip
            elif count == 63_779_840:
                self.say("warning", log.path, line, "63,779,840 validation tokens are the older sp1024 export")
        if not log.finals:
            self.say("error", log.path, 0, "no final val_loss and val_bpb: the run may have crashed")
        shipped = self.folder / "train_gpt.py"
        for size, line in log.codes[-1:]:
            if shipped.is_file() and size != shipped.stat().st_size:
                self.say("error", log.path, line, f"{size:,} bytes of code are counted, the file that is shipped has "
                                                  f"{shipped.stat().st_size:,}")  # fmt: skip
        for _, loss, bpb, line in log.finals[-1:]:
            self.check_bytes(loss, bpb, log.tokens[-1][0] if log.tokens else 0, log.path, line)

    def check_bytes(self, loss: float, bpb: float, tokens: int, path: Path, line: int) -> None:
        """Whether nats a token and bits a byte can belong to the validation text."""
        if bpb <= 0:
            self.say("error", path, line, f"val_bpb is {bpb:g}")
            return
        each = loss / math.log(2) / bpb
        known = [tokens] if tokens in self.texts else list(self.texts)
        if known and not any(abs(each * n / self.texts[n] - 1) < BYTES_OFF for n in known):
            nearest = min((self.texts[n] / n for n in known), key=lambda right: abs(right - each))
            self.say("error", path, line, f"loss {loss:g} and bpb {bpb:g} imply {each:.4f} bytes a token; the text "
                                          f"has {nearest:.4f}")  # fmt: skip

    def compare(self) -> None:
        """Claims against logs, and logs against each other."""
        path = self.folder / "submission.json"
        bpb, loss = self.number("val_bpb"), self.number("val_loss")
        ends = [log.finals[-1][2] for log in self.logs if log.finals]
        every = [f[2] for log in self.logs for f in log.finals]
        if bpb is not None and ends:
            candidates = [statistics.mean(ends), *every]
            if min(abs(bpb - c) for c in candidates) > BPB_OFF:
                told = ", ".join(f"{b:.4f}" for b in ends)
                self.say("error", path, self.line_of(path, "val_bpb"), f"val_bpb {bpb:g} is in no log; they end {told}")
        if bpb is not None and loss is not None:
            tokens = next((log.tokens[-1][0] for log in self.logs if log.tokens), 0)
            self.check_bytes(loss, bpb, tokens, path, self.line_of(path, "val_bpb"))
        seeds = [log.seed for log in self.logs if log.seed]
        if len(set(seeds)) < 3:
            self.say("warning", self.folder, 0, f"logs of {len(set(seeds))} seeds; a record wants at least 3")
        told = [log for log in self.logs if log.settings]
        for log in told[1:]:
            first, here = told[0].settings, log.settings
            other = sorted(k for k in set(first) | set(here) if first.get(k) != here.get(k) and k not in PER_RUN)
            if other:
                self.say("error", log.path, 0, f"{other[0]} is {here.get(other[0])}, in {told[0].path.name} "
                                               f"{first.get(other[0])}: seeds of different configurations")  # fmt: skip


def losses(folder: Path) -> list[float]:
    """Final losses, one a log."""
    linter = Linter(folder)
    linter.read_logs()
    return [log.finals[-1][1] for log in linter.logs if log.finals]


def significance(folder: Path, against: Path) -> Finding:
    """One-sided Welch test on the final losses of two folders, by the rule and by the organisers' practice."""
    ours, theirs = losses(folder), losses(against)
    if min(len(ours), len(theirs)) < 2:
        return Finding("warning", str(folder), 0, f"{len(ours)} and {len(theirs)} logs: no test with fewer than 2 each")
    gain, p, p_rule = statistics.mean(theirs) - statistics.mean(ours), welch(ours, theirs), welch(ours, theirs, NATS)
    enough = p_rule is not None and p_rule < P_VALUE
    told = "none, they do not vary" if p is None else f"{p:.3g}, {p_rule:.3g} for {NATS} nats"
    text = f"{gain:+.4f} nats better than {against.name}, one-sided Welch p {told} ({len(ours)} and {len(theirs)} logs)"
    text += f"; the rule asks for {NATS} at p < {P_VALUE}, in practice p < {PRACTICE} that it is better was accepted"
    return Finding("note" if enough else "warning", str(folder), 0, text)


def lint(folder: Path) -> list[Finding]:
    """All findings of a folder. Raises UsageError when it is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    return Linter(folder).run()


def main(words: list[str]) -> int:
    """eval_bpb.py lint FOLDER... [--against FOLDER] [--json]"""
    if {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return 0
    as_json = "--json" in words
    words = [w for w in words if w != "--json"]
    against = None
    if "--against" in words:
        at = words.index("--against")
        if at + 1 == len(words):
            raise UsageError("--against: give a folder after it.")
        against = Path(words[at + 1])
        del words[at : at + 2]
    strange = [w for w in words if w.startswith("-")]
    if strange or not words:
        raise UsageError(f"{strange[0] if strange else 'lint'}: give folders, --against FOLDER, --json.")
    found = {word: lint(Path(word)) for word in words}
    for word in words if against else ():
        found[word].append(significance(Path(word), against))
    if as_json:
        print(json.dumps({word: [asdict(f) for f in findings] for word, findings in found.items()}))
    else:
        for word, findings in found.items():
            for finding in findings:
                print(printable(str(finding)))
            errors = sum(f.level == "error" for f in findings)
            print(f"{word}: {errors} errors, {sum(f.level == 'warning' for f in findings)} warnings")
    return 1 if any(f.level == "error" for findings in found.values() for f in findings) else 0
