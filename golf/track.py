"""A finished run mirrored to trackio, on this machine alone; log.jsonl stays the truth."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from golf.config import Config
from golf.errors import UsageError
from golf.log_file import read_log

SHOWN = ("loss", "rate_scale", "loops", "gradient_norm", "tokens", "elapsed", "ms", "mean_depth", "penalty")


def require_trackio() -> None:
    """Raise UsageError, before any time is spent, where trackio is not installed."""
    if find_spec("trackio") is None:
        raise UsageError("--run.track trackio: it is not installed, run pip install trackio, or leave the option out.")


def mirror(folder: Path, config: Config) -> None:
    """Write the steps and scores of a run folder's log to trackio's local store, project golf-TRACK."""
    import trackio

    rows = read_log(folder / "log.jsonl")
    start = next((row for row in rows if row.get("event") == "start"), {})
    run = trackio.init(
        project=f"golf-{config.track}", name=folder.name, config=start.get("config", {}), embed=False,
        auto_log_gpu=False,
    )
    for row in rows:
        if row.get("event") == "step":
            values = {key: row[key] for key in SHOWN if isinstance(row.get(key), (int, float))}
        elif row.get("event") in ("validation", "unpacked", "record"):
            prefix = "packed_" if row["event"] == "record" else ""
            values = {prefix + key: row[key] for key in ("val_loss", "val_bpb") if isinstance(row.get(key), float)}
        else:
            continue
        if values:
            run.log(values, step=row.get("step") if row["event"] != "record" else row.get("steps"))
    trackio.finish()
