#!/usr/bin/env python3
"""Adaptive depth: how many loops tokens take, by topic with intervals and controls, and drawn on the text.

    python depth_map.py split DOCS.jsonl OUT [--formulaic] [--known-difficulty]      training and held-out documents
    python depth_map.py gate RUN OUT --data DIR [--seed N]      train a gate for a packed looped model
    python depth_map.py frontier RUN... --data DIR [--exit RULES] [--png FILE] [--json]
    python depth_map.py topics RUN... --docs FILE.jsonl [--exit RULE] [--controls] [--json]
    python depth_map.py map RUN --text FILE|- [--output PAGE.html] [--png FILE] [--json]
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tyro.conf import Positional

from golf import formulaic as made
from golf import records
from golf.console import parse, run_script, show
from golf.data import Corpus
from golf.errors import UsageError
from golf.files import write_bytes
from golf.rescore import read_artifact, rescored
from golf.texts import chosen_texts, read_topics, texts_to_draw
from golf.topic_study import TopicsArguments, show_topics, topics

HELD_OUT = 0.2
GATE_TOKENS = 64_000_000  # of training text that a gate learns from at most

dumps = json.dumps  # the commands have an option called json


# == preparing =====================================================================================================


def split(
    docs: Positional[str], output: Positional[str], formulaic: bool = False, known_difficulty: bool = False,
    json: bool = False,
) -> int:  # fmt: skip
    """Cut documents into a training part, of equal bytes for each topic, and a held-out fifth, both as JSON lines.

    Args:
        docs: Documents as JSON lines {topic, text, source}.
        output: Folder to write train.jsonl, held.jsonl and perhaps known.jsonl to.
        formulaic: Add a topic of formulaic text: licences of the installed packages, tables, lists.
        known_difficulty: Write known.jsonl too: tasks of the kind that the tenth control asks, to be trained on.
        json: Print one JSON object.
    """
    texts = read_topics(Path(docs))
    if formulaic:
        texts += made.formulaic()
    number = lambda t: int(hashlib.sha256(gist(t.text).encode()).hexdigest()[:8], 16) / 16**8  # noqa: E731
    held = [t for t in texts if number(t) < HELD_OUT]
    rest = sorted((t for t in texts if number(t) >= HELD_OUT), key=number)
    size = lambda t: len(t.text.encode())  # noqa: E731
    topics = {t.topic for t in texts}
    if lost := topics - {t.topic for t in rest} or topics - {t.topic for t in held}:
        raise UsageError(f"--docs {docs}: no document of topic {min(lost):.60} is on one side of the split, give more.")
    totals = {topic: sum(size(t) for t in rest if t.topic == topic) for topic in topics}
    left, train = dict.fromkeys(totals, min(totals.values())), []
    for text in rest:
        if left[text.topic] > 0:
            cut = text.text.encode()[: left[text.topic]].decode(errors="ignore")
            left[text.topic] -= size(text)
            train.append(replace(text, text=cut))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": train, "held": held}
    if known_difficulty:
        parts["known"] = made.known_difficulty(seed=2, documents=400)
    for name, rows in parts.items():
        lines = (dumps({"topic": t.topic, "source": t.source, "text": t.text}) + "\n" for t in rows)
        write_bytes(folder / f"{name}.jsonl", "".join(lines).encode())
    show({"topics": len(totals), "bytes_a_topic": min(totals.values()), "train": len(train), "held": len(held)}, json)
    return 0


def gist(text: str) -> str:
    """What near-copies of a text share, which stay on one side: letters and digits, but for lines of copyright."""
    lines = (line for line in text.lower().splitlines() if "copyright" not in line)
    return "".join(c for line in lines for c in line if c.isalnum()) or text


def gate(
    run: Positional[str], output: Positional[str], data: str = "", seed: int = 1, steps: int = 200, rate: float = 0.03,
    least_gain: float = 0.005, label: Literal["next", "last"] = "next", quantile: float = 0.5, json: bool = False,
) -> int:  # fmt: skip
    """Train a gate for the packed model of a run, all else frozen; write a run folder with it in the artifact.

    Args:
        run: A run folder of a looped model; best trained with --recipe.depth-loss each.
        output: Folder to write.
        data: Prepared text; data/CORPUS of the record when empty.
        seed: Seed of the order in which text is read.
        steps: Updates; in their second half losses are those of tokens that stop as the gate says.
        rate: Adam's learning rate at the start.
        least_gain: Nats that a pass must gain to be worth it.
        label: A gate after a pass learns what the next pass gains, or what that pass gained.
        quantile: Where the gate's exits must have summed to this a token stops.
        json: Print one JSON object.
    """
    if not 2 <= steps <= 100_000:
        raise UsageError(f"--steps {steps}: give 2 to 100,000.")
    if not 0 < rate <= 1:
        raise UsageError(f"--rate {rate:g}: give more than 0, at most 1.")
    if not 0 <= quantile <= 1:
        raise UsageError(f"--quantile {quantile:g}: give 0 to 1.")
    source, target = Path(run), Path(output)
    record = records.read(source)
    if target.exists():
        raise UsageError(f"{target} exists already, name another folder.")
    corpus = Corpus(data or f"data/{record.corpus}", "--data")
    packed = read_artifact(source)
    from golf import gate as gates

    shape, model = gates.gated(packed)
    corpus.check(shape.vocab_size, record.context)
    parts, room = [], GATE_TOKENS
    for shard in corpus.shards("train"):
        parts.append(shard[:room])
        room -= parts[-1].size
    stream = np.concatenate(parts)
    told = gates.train_gate(
        model, stream, record.context, gates.GateOptions(seed, steps, rate, least_gain, label, quantile)
    )  # fmt: skip
    again = gates.with_gate(packed, model)
    shape = record.config.get("shape", {}) | {"exit_gate": "hazard"}
    told["of"] = hashlib.sha256(packed).hexdigest()
    record = replace(record, config=record.config | {"shape": shape}, extra=record.extra | {"gate": told})
    rescored(source, target, {"exit": "gate", "exit_threshold": quantile}, again, record)
    show({"written": output, "bytes_more": len(again) - len(packed), **told}, json)
    return 0


# == the frontier ==================================================================================================


@dataclass(frozen=True)
class FrontierArguments:
    """Bits per byte against loops a token, counted FLOPs and seconds, for rules by which tokens stop."""

    folders: Positional[tuple[str, ...]]
    """Run folders of looped models; a model with a gate of its own adds the gate's points."""
    data: str = ""
    """Prepared text, whose validation split is scored; data/CORPUS of the first record when empty."""
    exit: tuple[Literal["entropy", "margin", "divergence", "difference", "random", "fixed", "gate"], ...] = (
        "entropy", "margin", "divergence", "difference", "random", "fixed",
    )  # fmt: skip
    """Rules."""
    points: int = 3
    """Thresholds of each rule, spread between one pass and all."""
    threshold: float | None = None
    """One more of a gate: the one that it was trained for. Of several runs all but the first are asked for it alone."""
    rows: int = 64
    """Rows of text."""
    repeats: int = 1
    """Times that each batch is timed; the least counts."""
    png: str = ""
    """Picture to write."""
    json: bool = False
    """Print one JSON object."""


def frontier(a: FrontierArguments) -> dict:
    """All points of every run. Raises UsageError."""
    from golf import depth
    from golf import frontier as curves

    if not a.folders:
        raise UsageError("frontier: name a run folder.")
    for name in ("points", "rows", "repeats"):
        if not 1 <= getattr(a, name) <= 100_000:
            raise UsageError(f"--{name} {getattr(a, name)}: give 1 to 100,000.")
    corpus = Corpus(a.data or f"data/{records.read(Path(a.folders[0])).corpus}", "--data")
    found: dict[str, list] = {}
    for looped in depth.load_all(a.folders):
        gate = looped.model.shape.exit_gate
        rules = ["gate"] if gate == "act" else [*a.exit, *(["gate"] if gate != "none" and "gate" not in a.exit else [])]
        if a.threshold is not None:
            if "gate" not in rules:
                raise UsageError(f"--threshold {a.threshold:g}: {looped.name} has no gate, leave it out.")
            looped.rule("gate", a.threshold)  # refused before any time is spent
        given = curves.batches(looped, corpus, a.rows)
        chosen = curves.spread(looped, given, list(rules), a.points) if a.threshold is None or not found else []
        if a.threshold is not None:
            chosen.append(("gate", a.threshold))
        found[looped.name] = curves.measure(looped, given, chosen, a.repeats)
    if a.png:
        lines, apart = {}, {}
        same = [p for points in found.values() for p in points if (p.rule, p.threshold) == ("gate", a.threshold)]
        if len(same) > 1:  # of runs that differ in what depth cost them
            apart[f"each run's gate at {a.threshold:g}"] = same
        for run, points in found.items():
            for name in dict.fromkeys(p.rule for p in points[1:]):
                label = name if len(found) == 1 or a.threshold is not None else f"{name}, {run}"
                lines.setdefault(label, [*(p for p in points if p.rule == name), points[0]])
        curves.draw(Path(a.png), lines, apart)
    return {run: [asdict(p) for p in points] for run, points in found.items()}


# == the map =======================================================================================================


@dataclass(frozen=True)
class MapArguments:
    """Draw each token of a text in the colour of its loops, on a page that opens from disk."""

    folder: Positional[str]
    """A run folder of a looped model."""
    text: str
    """A text, a file of JSON lines {topic, text}, or - for standard input; the first 20,000 bytes are drawn."""
    docs: str = ""
    """Documents as JSON lines {topic, text} for the chart by topic."""
    exit: Literal["entropy", "margin", "divergence", "difference", "gate", "random", "fixed"] = "entropy"
    """Rule by which tokens stop."""
    threshold: float | None = None
    """The rule's; chosen for --mean-depth on the heads of the texts when absent."""
    mean_depth: float = 0.0
    """Mean passes that the threshold is chosen for; 0 is the middle between one and all."""
    output: str = "depth.html"
    """Page to write."""
    png: str = ""
    """Picture to write, for papers."""
    before: bool = False
    """In the picture show the loops spent to predict a token, not those at it."""
    json: bool = False
    """Print one JSON object with every token."""


def draw(a: MapArguments) -> dict:
    """Write the page, and the picture if asked; returns what is on it. Raises UsageError."""
    from golf import charts, depth, map_page
    from golf import topics as study

    texts = texts_to_draw(a.text)
    looped = depth.load(Path(a.folder))
    looped.rule(a.exit, (1.0 if a.exit == "fixed" else 0.0) if a.threshold is None else a.threshold)
    if a.threshold is None:
        threshold = depth.threshold_for(looped, texts, a.exit, a.mean_depth or (1 + looped.loops) / 2)
    else:
        threshold = a.threshold
    rule = looped.rule(a.exit, threshold)
    documents, depths = [], []
    for text in texts:
        spots = depth.spots(looped, text.text, rule)
        depths += [s.loops for s in spots]
        documents.append(map_page.Shown(text.topic, spots))
    pictures = [("Tokens by loops", map_page.histogram(np.array(depths), looped.loops))]
    if a.docs:
        chosen = chosen_texts(Path(a.docs), 200)
        study.check_topics(chosen)
        tokens = depth.measure(looped, chosen, rule)
        rows = study.by_topic([tokens], study.Resampling(tokens, 1))
        bars = [charts.Bar(r["topic"], *(r["loops"].row()[k] for k in ("mean", "low", "high"))) for r in rows]
        bars.sort(key=lambda bar: -bar.mean)
        pictures.append(("Loops a token by topic", charts.bar_chart(bars, looped.loops, "loops, 95 % intervals")))
    about = (f"{looped.name}: {a.exit} at {threshold:.4g}, {np.mean(depths):.2f} of {looped.loops} loops a token. "
             "A token is drawn whole; one that holds part of a character shows a replacement sign.")  # fmt: skip
    written = map_page.page("What it thinks longer about", about, looped.loops, documents, pictures)
    write_bytes(Path(a.output), written.encode())
    if a.png:
        map_page.write_png(Path(a.png), documents, looped.loops, a.before)
    return {
        "run": looped.name, "rule": a.exit, "threshold": threshold, "mean_depth": float(np.mean(depths)),
        "written": a.output,
        "documents": [{"title": d.title, "tokens": [asdict(s) for s in d.spots]} for d in documents],
    }


COMMANDS = {
    "split": split, "gate": gate, "frontier": FrontierArguments, "topics": TopicsArguments, "map": MapArguments,
}  # fmt: skip


def main() -> int:
    words = sys.argv[1:]
    if words[:1] == ["topics"]:
        asked = parse(tyro.cli, TopicsArguments, prog="depth_map.py topics", args=words[1:])
        found = topics(asked)
        if asked.output:
            write_bytes(Path(asked.output), dumps(found, indent=1).encode() + b"\n")
        print(dumps(found)) if asked.json else show_topics(found)
        return 0
    if words[:1] == ["map"]:
        asked = parse(tyro.cli, MapArguments, prog="depth_map.py map", args=words[1:])
        found = draw(asked)
        if asked.json:
            print(dumps(found))
        else:
            print(f"written: {found['written']}, {found['mean_depth']:.2f} loops a token")
        return 0
    if words[:1] == ["frontier"]:
        from golf.frontier import Point, table

        asked = parse(tyro.cli, FrontierArguments, prog="depth_map.py frontier", args=words[1:])
        found = frontier(asked)
        for run, points in found.items() if not asked.json else ():
            print(f"{run}:\n{table([Point(**p) for p in points])}\n")
        if asked.json:
            print(dumps(found))
        return 0
    return parse(tyro.extras.subcommand_cli_from_dict, COMMANDS, prog="depth_map.py")


if __name__ == "__main__":
    sys.exit(run_script(main))
