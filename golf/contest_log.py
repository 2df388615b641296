"""Facts of a public training log, both families of them, each with the line it stands on; nothing is believed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LINE_LIMIT = 1 << 16  # bytes of a line that are looked at
CUT = 1000  # of them that patterns are looked for in
KEYS = re.compile(
    rb"train_time|Total submission size|val_bpb|eval_time|MiB|val_tokens|val_loader|tokens:|Code size|seed|vocab_size"
)
TRAIN_TIME = re.compile(rb"train_time:\s*([\d.]+)\s*(ms|s|m)\b")
TOTAL_SIZE = re.compile(rb"Total submission size[^:]*:\s*([\d,]+)\s*bytes")
CODE_SIZE = re.compile(rb"Code size[^:]*:\s*([\d,]+)\s*bytes")
MIB = re.compile(rb"(?<![\d.])([\d.]+)\s*MiB")
FINAL = re.compile(
    rb"^\s*(\S*(?:final|quantized|roundtrip|ttt|sliding)\S*)\s.*?val_loss:\s*([\d.]+)\s+val_bpb:\s*([\d.]+)"
)
EVAL_TIME = re.compile(rb"(?:total_)?eval_time:\s*([\d.]+)\s*(ms|s)\b")
VAL_TOKENS = re.compile(rb"(?:val_loader.*?tokens|val_tokens|validation tokens)\s*[:=]\s*([\d,]+)")
SETTING = re.compile(rb"^\s*([A-Za-z_]\w*)\s*[:=]\s*(\S.*?)\s*$")
UNITS = {b"ms": 1.0, b"s": 1e3, b"m": 60e3}


@dataclass
class Log:
    """Facts of one log, each with the line it stands on."""

    path: Path
    seed: str = ""
    train_ms: list[tuple[float, int]] = field(default_factory=list)
    totals: list[tuple[int, int]] = field(default_factory=list)
    codes: list[tuple[int, int]] = field(default_factory=list)
    mebibytes: list[tuple[float, int]] = field(default_factory=list)
    finals: list[tuple[str, float, float, int]] = field(default_factory=list)
    eval_ms: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)


def whole(text: bytes) -> int:
    """A count with commas; of so many digits that none is meant, 0."""
    digits = text.replace(b",", b"")
    return int(digits) if 0 < len(digits) < 19 else 0


def decimal(text: bytes) -> float:
    """Digits and points as a number; 0 where they are none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, each cut at LINE_LIMIT."""
    with open(path, "rb") as stream:
        number, rest = 0, False
        while line := stream.readline(LINE_LIMIT):
            if not rest:
                number += 1
                yield number, line
            rest = not line.endswith(b"\n")


def read_log(path: Path) -> Log:
    """The facts of a log."""
    log = Log(path, (re.findall(r"seed[_-]?(\d+)", path.name) or [""])[0])
    in_settings = False
    for number, line in numbered(path):
        if b"yperparameters" in line[:60]:
            in_settings = True
        elif in_settings:
            if found := SETTING.match(line[:500]):
                log.settings[found[1].decode()] = found[2].decode(errors="replace")
            elif line.strip():
                in_settings = False
        line = line[:CUT]
        if not KEYS.search(line):
            continue
        if found := TRAIN_TIME.search(line):
            log.train_ms.append((decimal(found[1]) * UNITS[found[2]], number))
        if found := TOTAL_SIZE.search(line):
            log.totals.append((whole(found[1]), number))
        if found := CODE_SIZE.search(line):
            log.codes.append((whole(found[1]), number))
        if found := MIB.search(line):
            log.mebibytes.append((decimal(found[1]), number))
        if found := FINAL.search(line):
            log.finals.append((found[1].decode(errors="replace"), decimal(found[2]), decimal(found[3]), number))
        if found := EVAL_TIME.search(line):
            log.eval_ms.append((decimal(found[1]) * UNITS[found[2]], number))
        if found := VAL_TOKENS.search(line):
            log.tokens.append((whole(found[1]), number))
        if not log.seed and (found := re.search(rb"\bseed[\"']?\s*[:=]\s*(\d+)", line)):
            log.seed = found[1].decode()
    return log
