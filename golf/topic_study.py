"""The study of depth by topic from run folders to a verdict, as one object and for people."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tyro.conf import Positional

from golf import records
from golf.console import counted
from golf.errors import UsageError
from golf.rescore import read_artifact
from golf.texts import chosen_texts


@dataclass(frozen=True)
class TopicsArguments:
    """Mean loops by topic, with intervals over documents and runs, and what else could explain them."""

    folders: Positional[tuple[str, ...]]
    """Run folders of looped models of one tokenizer; several are crossed with the documents."""
    docs: tuple[str, ...]
    """Documents as JSON lines {topic, text, source}, held out of training; several files where sources lie apart."""
    exit: Literal["entropy", "margin", "divergence", "difference", "gate", "random"] = "entropy"
    """Rule by which tokens stop; gate asks a model that has one."""
    threshold: float | None = None
    """The rule's; chosen for --mean-depth when absent."""
    mean_depth: float = 0.0
    """Mean passes that the threshold is chosen for; 0 is the middle between one and all."""
    per_topic: int = 0
    """Documents of each topic; 0 is all."""
    controls: bool = False
    """Run the eleven controls too, the first four on every model, the rest on the first; some fifteen measurements."""
    agreement: bool = False
    """Ask how far runs agree on a token's depth; needs two or more (and is told whenever there are)."""
    order: tuple[str, ...] = ()
    """Topics from the deepest on as they are expected, each against the next; several joined by + count as one."""
    draws: int = 1000
    """Bootstrap draws."""
    json: bool = False
    """Print one JSON object."""
    output: str = ""
    """File to write that object to."""


def topics(a: TopicsArguments) -> dict:
    """The whole study as one object. Raises UsageError."""
    from golf import contrasts as against
    from golf import controls, depth
    from golf import topics as study

    texts = [text for docs in a.docs for text in chosen_texts(Path(docs), a.per_topic)]
    if not a.folders:
        raise UsageError("topics: name a run folder.")
    if not 10 <= a.draws <= 100_000:
        raise UsageError(f"--draws {a.draws}: give 10 to 100,000.")
    models, same = depth.load_all(a.folders), models_of(a.folders)
    if a.agreement and len(set(same)) < 2:
        raise UsageError("--agreement: it needs runs of two models or more, name another folder.")
    if len({m.table.vocab_size for m in models}) > 1:
        raise UsageError("The runs have different tokenizers, give runs of one.")
    for model in models:  # refused before any time is spent
        model.rule(a.exit, a.threshold or 0.0)
    study.check_topics(texts)
    against.check_order({t.topic for t in texts}, a.order)
    runs, rules, found = [], [], []
    for model in counted(models, "runs measured"):
        wanted = a.mean_depth or (1 + model.loops) / 2
        threshold = a.threshold
        if threshold is None:
            threshold = depth.threshold_for(model, texts[:: max(1, len(texts) // 60)], a.exit, wanted)
        rules.append(model.rule(a.exit, threshold))
        runs.append(depth.measure(model, texts, rules[-1]))
        found.append({"run": model.name, "threshold": threshold, "mean_depth": float(runs[-1].depth.mean()),
                      "bpb": runs[-1].bits_a_byte})  # fmt: skip
    resampling = study.Resampling(runs[0], len(runs), a.draws, models=same)
    rows, names = study.by_topic(runs, resampling), runs[0].topics
    equal, equal_a_byte = (study.adjusted(runs, resampling, a_byte=a_byte) for a_byte in (False, True))
    loops, sources = [r["loops"] for r in rows], study.by_source(runs, resampling)
    explained = [study.shares(r) for r in runs]
    mean_share = {name: float(np.mean([e[name] for e in explained])) for name in explained[0]}
    agree = study.agreement(runs, same) if len(set(same)) > 1 else None
    checked = gates = None
    if a.controls:
        first = [same.index(model) for model in sorted(set(same))]  # a run of each model
        gates = [controls.gates(models[n], texts, runs[n], a.exit) for n in counted(first, "gates of a model compared")]
        checked = {"1-4 gates": gates, **controls.all_of_them(models[0], texts, runs[0], a.exit, rules[0])}
    word, said = study.verdict(gates, mean_share["topic_adds"], agree["tokens"] if agree else None)
    return {
        "rule": a.exit, "loops": models[0].loops, "runs": found, "topics": plain(rows),
        "adjusted": {n: e.row() for n, e in zip(names, equal, strict=True)},
        "adjusted_a_byte": {n: e.row() for n, e in zip(names, equal_a_byte, strict=True)},
        "contrasts": against.contrasts(names, loops), "contrasts_adjusted": against.contrasts(names, equal),
        "order": against.in_order(names, loops, a.order), "order_adjusted": against.in_order(names, equal, a.order),
        "sources": plain(sources), "contrasts_by_source": against.by_pairs_of_sources(names, sources),
        "contrasts_by_source_adjusted": against.by_pairs_of_sources(
            names, [row | {"loops": row["adjusted"]} for row in sources]
        ),
        "classes": plain(study.by_class(runs, resampling)),
        "variance_explained": mean_share, "agreement": agree, "controls": checked, "verdict": word, "because": said,
    }  # fmt: skip


def models_of(folders: tuple[str, ...]) -> list[int]:
    """A number for the model of each run, the same for one, and for those whose gates were trained for it."""
    of = []
    for folder in map(Path, folders):
        gate = records.read(folder).extra.get("gate")
        own = hashlib.sha256(read_artifact(folder)).hexdigest()
        of.append(gate.get("of", own) if isinstance(gate, dict) else own)
    return [list(dict.fromkeys(of)).index(o) for o in of]


def plain(rows: list[dict]) -> list[dict]:
    """Rows whose intervals are written out."""
    return [{k: v.row() if hasattr(v, "row") else v for k, v in row.items()} for row in rows]


def show_topics(found: dict) -> None:
    """The study for people."""
    for run in found["runs"]:
        print(f"{run['run']}: {found['rule']} at {run['threshold']:.5g}, {run['mean_depth']:.3f} of {found['loops']} "
              f"loops a token, {run['bpb']:.4f} bpb")  # fmt: skip

    def cell(v: dict) -> str:
        return f"{v['mean']:.3f}" + (f" [{v['low']:.3f}, {v['high']:.3f}]" if v["low"] is not None else "")

    print("\n| topic | documents | tokens | loops a token | at equal difficulty and kind | loops a byte "
          "| at equal difficulty and kind | bpb | nats that passes gain |\n" + "|---" * 9 + "|")  # fmt: skip
    for row in sorted(found["topics"], key=lambda r: -r["loops"]["mean"]):
        equal, equal_a_byte = (found[name][row["topic"]] for name in ("adjusted", "adjusted_a_byte"))
        print(f"| {row['topic']} | {row['documents']} | {row['tokens']:,} | {cell(row['loops'])} | {cell(equal)} | "
              f"{cell(row['loops_a_byte'])} | {cell(equal_a_byte)} | {row['bpb']:.3f} | "
              f"{cell(row['gain'])} |")  # fmt: skip
    for title, name in (
        ("Contrasts, raw", "contrasts"), ("Contrasts, adjusted", "contrasts_adjusted"),
        ("The order that was expected, raw", "order"), ("The order that was expected, adjusted", "order_adjusted"),
    ):  # fmt: skip
        if found[name]:
            print(f"\n{title}:")
        for row in found[name]:
            print(f"  {row['topics']:<28} {row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] "
                  f"p {row['p_holm']:.2g} (Holm)")  # fmt: skip
    for title, name in (("raw", "contrasts_by_source"), ("adjusted", "contrasts_by_source_adjusted")):
        print(f"\nBetween sources of 20 documents or more, {title}:")
        for row in found[name]:
            each = "; ".join(f"{' - '.join(s or '-' for s in e['sources'])} {e['mean']:+.3f}" for e in row["pairs"])
            print(f"  {row['topics']:<28} {row['sources']}, p {row['p_holm']:.2g} (Holm): {each}")
    print("\n| source | topic | documents | loops a token | at equal difficulty and kind |\n" + "|---" * 5 + "|")
    for row in found["sources"]:
        print(f"| {row['source'] or '-'} | {row['topic']} | {row['documents']} | {cell(row['loops'])} | "
              f"{cell(row['adjusted'])} |")  # fmt: skip
    print("\n| kind of token | tokens | loops at it | more than the mean token | loops to predict it "
          "| more than the mean token |\n|---|---|---|---|---|---|")  # fmt: skip
    for row in found["classes"]:
        cells = [cell(row[c]) if c in row else "-" for c in ("at", "at_more", "predicting", "predicting_more")]
        print(f"| {row['class']} | {row['tokens']:,} | {' | '.join(cells)} |")
    shares = found["variance_explained"]
    print("\nShare of depth's variance explained on held-out documents: "
          + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shares.items()))  # fmt: skip
    if found["controls"]:
        print("\nControls:")
        for name, value in found["controls"].items():
            print(f"  {name}: {json.dumps(value)}")
    print(f"\nverdict: {found['verdict']}")
    for line in found["because"]:
        print(f"  {line}")
