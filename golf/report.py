"""A run's page, report.html: what it scored, how it went, where its bytes are, and whether it is to be believed.

Everything is taken from the run folder (submission.json, log.jsonl, verdict.json, the sizes on disk) and the page opens
from disk: no script, no network.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path

from golf import charts, folders, records, verdicts
from golf.charts import Bar, Curve, Tile, bar_chart, line_chart, treemap
from golf.errors import UsageError
from golf.files import write_bytes
from golf.log_file import read_log
from golf.records import Record
from golf.shape import Shape, tensor_class

STYLE = charts.STYLE + """
.headline { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; margin: 1rem 0; list-style: none; }
.headline li { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; }
.headline b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.passed, .failed { white-space: nowrap; }
.passed::before { content: "\\2713  "; color: var(--three); }
.failed::before { content: "\\2717  "; color: var(--two); }
.good { color: var(--three); } .bad { color: var(--two); font-weight: 600; }
code { font: .85rem ui-monospace, monospace; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 0 1.5rem; }
figure { margin: 1rem 0; break-inside: avoid; }
figcaption { color: var(--faint); font-size: .85rem; }
@media print { body { max-width: none; font-size: 11pt; } h2 { break-after: avoid; } }
"""
SHADES = {"embedding": "#9ecae1", "attention": "#a1d99b", "mlp": "#fdae6b", "control": "#dadaeb", "code": "#fdd0a2",
          "other": "#d9d9d9"}  # fmt: skip
ATTENTION = ("query", "key", "value", "out")
DIFFERENCES = (
    "val_bpb", "val_loss", "unpacked_val_bpb", "bytes_total", "bytes_code", "bytes_model", "headroom", "steps",
    "tokens", "training_flops", "tokens_per_second", "train_seconds", "eval_seconds", "peak_memory",
)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What a run folder holds; a run without a record is shown from its log."""

    folder: Path
    record: Record
    rows: list[dict]
    verdict: dict | None

    def of(self, event: str) -> list[dict]:
        """The log's rows of one kind."""
        return [row for row in self.rows if row.get("event") == event]

    def last(self, event: str) -> dict:
        """The last row of a kind, or an empty one."""
        return next((row for row in reversed(self.rows) if row.get("event") == event), {})


def read(folder: Path) -> Told:
    """All that is known of a run. Raises UsageError for a folder that is none."""
    if not (folder / "log.jsonl").exists() and not (folder / "submission.json").exists():
        raise UsageError(f"{folder}: it is no run folder.")
    rows = read_log(folder / "log.jsonl")
    if (folder / "submission.json").exists():
        record = records.read(folder)
    else:
        start = next((r for r in rows if r.get("event") == "start"), {})
        record = records.from_dict(
            {"name": folder.name, "status": "unfinished", "config": start.get("config", {})}, str(folder / "log.jsonl")
        )
    return Told(folder, record, rows, verdicts.read(folder))


def write(folder: Path, against: Path | None = None, output: Path | None = None) -> Path:
    """Write the page; returns its path. Raises UsageError."""
    told = read(folder)
    path = output or folder / "report.html"
    write_bytes(path, page(told, read(against) if against else None).encode("utf-8", "backslashreplace"))
    return path


def page(told: Told, other: Told | None = None) -> str:
    """The whole page as text; where there is another run, its curves are dashed beside this one's."""
    record = told.record
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(record.name or told.folder.name)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(record.name or told.folder.name)}</h1>",
        f'<p class="faint">{html.escape(about(record))}</p>',
        headline(told),
    ]
    if other:
        name = html.escape(other.record.name or other.folder.name)
        parts += [f"<h2>Against {name}</h2>", warning(record, other.record), differences(told, other)]
    both = [told, other] if other else [told]
    parts += [*learning(both), *pace(both), *health(told), *bytes_of(told), *packing(told), *verdict(told)]
    parts += origin(told)
    return "\n".join(parts) + "\n</body></html>\n"


def about(record: Record) -> str:
    """One line on what was run."""
    words = [record.blurb, f"track {record.track}" if record.track else "", f"corpus {record.corpus}",
             f"seed {record.seed}", record.date]  # fmt: skip
    return "; ".join(w for w in words if w)


def headline(told: Told) -> str:
    """Score, size against the cap, time, and whether the referee calls it valid."""
    record, verdict = told.record, told.verdict
    score = "no score" if record.val_bpb is None else f"{record.val_bpb:.4f}"
    room = f"{abs(record.headroom):,} bytes {'under' if record.headroom >= 0 else 'OVER'} the cap"
    said = "not judged" if verdict is None else "valid" if verdict["valid"] else f"INVALID: {verdict['invalid']}"
    good = verdict is not None and verdict["valid"]
    items = [
        (score, f"bits a byte, {record.status}"),
        (f"{record.bytes_total:,}", f"bytes; {room}" if record.cap else "bytes"),
        (f"{record.train_seconds:.1f} s", f"training, {record.steps:,} steps, {record.tokens:,} tokens"
         + (f", {record.training_flops:.3g} FLOPs" if record.training_flops else "")),
        (f'<span class="{"good" if good else "bad"}">{html.escape(said[:60])}</span>', "by the referee"),
    ]
    return '<ul class="headline">' + "".join(f"<li><b>{v}</b>{html.escape(n)}</li>" for v, n in items) + "</ul>"


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A table whose cells are escaped; wide ones scroll by themselves."""
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row)  # noqa: E731
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" if svg else ""


def warning(ours: Record, theirs: Record) -> str:
    """What makes two runs' scores no comparison."""
    odd = [name for name, a, b in (
        ("texts", ours.corpus_fingerprint, theirs.corpus_fingerprint), ("tracks", ours.track, theirs.track),
        ("caps", ours.cap, theirs.cap)) if a != b]  # fmt: skip
    return f'<p class="bad">The runs are of different {" and ".join(odd)}: scores compare nothing.</p>' if odd else ""


def differences(told: Told, other: Told) -> str:
    """Results side by side, and every option that differs."""

    def shown(value: object, sign: str = "") -> str:
        if isinstance(value, float):
            return f"{value:{sign},.1f}" if abs(value) >= 1e4 else f"{value:{sign},.5g}"
        return f"{value:{sign},}" if type(value) is int else str(value)

    rows = []
    for key in DIFFERENCES:
        ours, theirs = getattr(told.record, key), getattr(other.record, key)
        if ours is None and theirs is None:
            continue
        change = ours - theirs if ours is not None and theirs is not None else None
        rows.append((key, shown(ours), shown(theirs), "-" if change is None else shown(change, "+")))
    result = table(("result", "this run", "the other", "difference"), rows)
    settings = []
    for part in ("shape", "recipe", "pack", "scoring", "run"):
        ours, theirs = (t.record.config.get(part) or {} for t in (told, other))
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key) and key not in ("name", "runs"):
                settings.append((f"{part}.{key}", ours.get(key, "-"), theirs.get(key, "-")))
    alike = "<p>Every option is the same.</p>"
    return result + (table(("option", "this run", "the other"), settings) if settings else alike)


def column(rows: list[dict], key: str) -> list[float]:
    """Numbers of a log's rows; what is no number is not a number."""
    return [finite(row.get(key)) for row in rows]


def finite(value: object) -> float:
    """What a log says, if it is a finite number."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.nan


def named(name: str, both: list[Told], number: int) -> str:
    return name if len(both) == 1 else f"{name}, {'this run' if number == 0 else 'the other'}"


def learning(both: list[Told]) -> list[str]:
    """Loss, and bits a byte, over seconds and over tokens, with the scores that were measured."""
    pictures = []
    for key, across in (("elapsed", "seconds of training"), ("tokens", "tokens")):
        curves, scores = [], []
        for number, told in enumerate(both):
            steps, record, dashed = told.of("step"), told.record, number > 0
            x, loss = column(steps, key), column(steps, "loss")
            curves.append(Curve(named("training loss", both, number), x, loss, number, dashed))
            if record.val_tokens and record.val_bytes:
                bits = record.val_tokens / record.val_bytes / math.log(2)
                scores.append(Curve(named("training text", both, number), x, [v * bits for v in loss], number, dashed))
            for name, chart, looks in (("validation loss", curves, measured(told, key, 1)),
                                       ("validation", scores, measured(told, key, 0))):  # fmt: skip
                if looks:
                    chart.append(Curve(named(name, both, number), *map(list, zip(*looks, strict=True)), number + 2,
                                       dashed, dots=True))  # fmt: skip
        pictures.append(figure(line_chart(curves, across, "nats a token"), f"Nats a token over {across}."))
        told_how = "the training text's at the validation text's bytes a token, the last dot of the packed artifact"
        pictures.append(figure(line_chart(scores, across, "bits a byte"), f"Bits a byte over {across}: {told_how}."))
    return ["<h2>Learning</h2>", grid(pictures)]


def measured(told: Told, key: str, which: int) -> list[tuple[float, float]]:
    """(place, score) of every look at the validation text, bits a byte (0) or nats a token (1); the packed one last."""
    steps, record = told.of("step"), told.record
    place = {finite(row.get("step")): row.get(key) for row in steps}
    looks = [(place.get(finite(r.get("step"))), (r.get("val_bpb"), r.get("val_loss"))) for r in told.of("validation")]
    end = steps[-1].get(key) if steps else None
    looks += [(end, (record.unpacked_val_bpb, record.unpacked_val_loss)), (end, (record.val_bpb, record.val_loss))]
    known = [(x, values[which]) for x, values in looks]
    return [look for look in known if all(math.isfinite(finite(v)) for v in look)]


def grid(pictures: list[str]) -> str:
    return f'<div class="figures">{"".join(pictures)}</div>'


def pace(both: list[Told]) -> list[str]:
    """Rate and loops over the clock, and tokens a second."""
    rates, loops, speed = [], [], []
    for number, told in enumerate(both):
        steps = told.of("step")
        x = column(steps, "elapsed")
        rates.append(Curve(named("learning rate, of its peak", both, number), x, column(steps, "rate_scale"), number,
                           number > 0))  # fmt: skip
        loops.append(Curve(named("loops", both, number), x, column(steps, "loops"), number, number > 0))
        batch = finite((told.record.config.get("recipe") or {}).get("batch_tokens"))
        took = [1e3 * batch / ms if ms else math.nan for ms in column(steps, "ms")]
        speed.append(Curve(named("tokens/s", both, number), x, took, number, number > 0))
    across = "seconds of training"
    return ["<h2>Schedule and speed</h2>", grid([
        figure(line_chart(rates, across, "share"), "Learning rate over the clock."),
        figure(line_chart(loops, across, "loops"), "Passes through the core."),
        figure(line_chart(speed, across, "tokens/s"), "Tokens a second, step by step."),
    ])]  # fmt: skip


def health(told: Told) -> list[str]:
    """Gradient norm, and of each pass the state's norm, its cosine to the pass before, and its loss."""
    steps, passes = told.of("step"), told.of("passes")
    place = {finite(row.get("step")): row.get("elapsed") for row in steps}
    across = "seconds of training"
    gradient = Curve("gradient norm", column(steps, "elapsed"), column(steps, "gradient_norm"))
    parts = [figure(line_chart([gradient], across, "norm"), "Gradient norm, before clipping.")]
    told_of = (
        ("state_norms", passes, "Norm a channel of the state after each pass.", "pass"),
        ("state_cosines", passes, "Cosine between the states after neighbouring passes.", "to pass"),
        ("pass_losses", steps, "Training loss when all stop after each pass.", "pass"),
    )
    for key, rows, caption, word in told_of:
        lists = [(place.get(finite(r.get("step"))), r[key]) for r in rows if isinstance(r.get(key), list)]
        lists = [(x, v) for x, v in lists if all(math.isfinite(finite(n)) for n in (x, *v))]
        count = max((len(values) for _, values in lists), default=0)
        first = 2 if key == "state_cosines" else 1
        curves = [
            Curve(f"{word} {n + first}", [x for x, v in lists if n < len(v)], [v[n] for _, v in lists if n < len(v)], n)
            for n in range(count)
        ]
        parts.append(figure(line_chart(curves, across, key.replace("_", " ")), caption))
    depth = Curve("mean depth", column(steps, "elapsed"), column(steps, "mean_depth"))
    parts.append(figure(line_chart([depth], across, "passes"), "Mean passes of a token, by the gate."))
    return ["<h2>Health</h2>", grid(parts)]


def kind_of(name: str) -> str:
    """The tile that a tensor belongs to."""
    part = name.rsplit(".", 1)[-1]
    if tensor_class(name) == "control":
        return "control"
    return "attention" if part in ATTENTION else "mlp" if name.startswith("blocks.") else "embedding"


def bytes_of(told: Told) -> list[str]:
    """Where the bytes are: the code, and each kind of tensor of each block, from the bits that the packer told."""
    bits, shape = told.last("packed").get("bits"), told.record.config.get("shape")
    sizes = folders.sizes(told.folder) if told.folder.is_dir() else None
    if not sizes or not sizes.total:
        return []
    tiles = [Tile("code", sizes.code, SHADES["code"]), Tile("other files", sizes.other, SHADES["other"])]
    left = sizes.weights
    if isinstance(bits, dict) and isinstance(shape, dict):
        counts = parameter_counts(shape)
        by_tile: dict[str, tuple[int, str]] = {}
        for name, rate in bits.items():
            if name in counts and 0 <= finite(rate) <= 64:
                block = f" {name.split('.')[1]}" if name.startswith("blocks.") else ""
                label = f"{kind_of(name)}{block}"
                size = round(rate * counts[name] / 8)
                by_tile[label] = (by_tile.get(label, (0, ""))[0] + size, SHADES[kind_of(name)])
        tiles += [Tile(name, size, shade) for name, (size, shade) in by_tile.items()]
        left -= sum(size for size, _ in by_tile.values())
    tiles.append(Tile("scales, tables and control" if bits else "weights", max(0, left), SHADES["control"]))
    tiles.sort(key=lambda t: -t.size)
    rows = [(t.name, f"{t.size:,}", f"{t.size / sizes.total:.1%}") for t in tiles if t.size]
    return ["<h2>Bytes</h2>", figure(treemap(tiles), f"{sizes.total:,} bytes of code and artifact."),
            table(("what", "bytes", "share"), rows)]  # fmt: skip


def parameter_counts(shape: dict) -> dict[str, int]:
    """Weights of each tensor, of a shape that a record tells; nothing for one that this program cannot read."""
    from golf.config import shape_from_dict

    try:
        read: Shape = shape_from_dict(shape)
    except UsageError:
        return {}
    return {name: math.prod(dims) for name, dims in read.parameters().items()}


def packing(told: Told) -> list[str]:
    """What packing costs at each number of loops."""
    costs = {k: v for k, v in told.record.quantization_penalty.items() if isinstance(v, (int, float))}
    if not costs:
        return []
    bars = [Bar(f"{loops} loops", v, v, v) for loops, v in costs.items()]
    most = max(1e-6, *costs.values())
    return ["<h2>What packing costs</h2>", figure(
        bar_chart(bars, most, "bits a byte", "{:+.4f}"),
        "Bits a byte more than before packing, at each number of loops, on a part of the validation text.",
    )]  # fmt: skip


def verdict(told: Told) -> list[str]:
    """Every check of the referee with its evidence."""
    if told.verdict is None:
        return ["<h2>Verdict</h2><p>Not judged: <code>python eval_bpb.py FOLDER</code> does.</p>"]
    rows = []
    for check in told.verdict["checks"]:
        status = check["status"]
        mark = status if status in ("passed", "failed") else ""
        cells = (check.get("number", ""), check.get("check", ""))
        rows.append(
            "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells)
            + f'<td class="{mark}">{html.escape(status)}</td>'
            + f'<td>{html.escape(str(check.get("evidence", "")))}</td></tr>'
        )  # fmt: skip
    head = "<tr><th></th><th>check</th><th>result</th><th>evidence</th></tr>"
    said = "valid" if told.verdict["valid"] else f"INVALID: {told.verdict['invalid']}"
    return [f"<h2>Verdict: {html.escape(said)}</h2>",
            f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>']  # fmt: skip


def origin(told: Told) -> list[str]:
    """Command, environment and configuration."""
    start = told.last("start")
    command = " ".join(map(str, start.get("command", []))) if isinstance(start.get("command"), list) else ""
    environment = told.record.environment or start.get("environment")
    environment = environment if isinstance(environment, dict) else {}
    rows = [(key, value) for key, value in environment.items()]
    parts = ["<h2>Where it comes from</h2>"]
    if command:
        parts.append(f"<p><code>python {html.escape(command)}</code></p>")
    if rows:
        parts.append(table(("environment", ""), rows))
    settings = [
        (f"{part}.{key}", json.dumps(value) if isinstance(value, (dict, list)) else value)
        for part in ("shape", "recipe", "pack", "scoring")
        for key, value in (told.record.config.get(part) or {}).items()
    ]
    if settings:
        parts.append(f"<details><summary>Every option</summary>{table(('option', 'value'), settings)}</details>")
    return parts
