"""Documents with topics, and what is known of each of their tokens. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from golf.config import UsageError
from golf.sources import open_text


@dataclass(frozen=True)
class Text:
    """A document with its topic and where it comes from."""

    text: str
    topic: str
    source: str = ""


def read_texts(path: Path) -> list[Text]:
    """Documents of a file of JSON lines {topic, text, source}. Raises UsageError with the line that is wrong."""
    found, number = [], 0
    try:
        with open_text(path) as stream:
            for line in stream:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    if not (isinstance(row.get("text"), str) and isinstance(row.get("topic"), str) and row["text"]):
                        raise ValueError("no text or no topic")
                    row["text"].encode()
                    found.append(Text(row["text"], row["topic"], str(row.get("source", ""))))
    except OSError as error:
        raise UsageError(f"--docs {path}: it cannot be read ({error.strerror}).") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f'--docs {path} line {number}: give an object with "topic" and "text" ({error}).') from error
    return found


@dataclass
class Tokens:
    """One entry a token that was predicted, in the order of documents and positions.

    Depth, losses and entropy are of the position that predicts it; `here` and `kind_here` are of the token that stands
    there, `target` and `kind` of the one that is predicted.
    """

    document: np.ndarray  # int32
    topic: np.ndarray  # int16, a place in `topics`
    source: np.ndarray  # int16, a place in `sources`
    position: np.ndarray  # int32
    here: np.ndarray  # int32
    target: np.ndarray  # int32
    bytes: np.ndarray  # int32, of the target
    kind: np.ndarray  # int8
    kind_here: np.ndarray  # int8; -1 at the start of a document
    fragment: np.ndarray  # int8, of the token that stands there
    opens: np.ndarray  # bool: the target begins a sentence
    depth: np.ndarray  # int8
    loss: np.ndarray  # float32, nats under the rule
    losses: np.ndarray  # (N, R) float32, nats when everyone stops after each pass
    entropy: np.ndarray  # float32, nats of the distribution after the first pass
    topics: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def where(self, keep: np.ndarray) -> Tokens:
        """Those entries only."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[keep] for k, v in columns.items() if isinstance(v, np.ndarray)})

    def with_depths(self, depth: np.ndarray, loss: np.ndarray) -> Tokens:
        return replace(self, depth=depth, loss=loss)

    @property
    def bits_a_byte(self) -> float:
        return float(self.loss.sum(dtype=np.float64) / np.log(2) / self.bytes.sum())
