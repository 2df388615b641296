"""Documents with topics, and what is known of each of their tokens. No torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from golf.errors import UsageError
from golf.sources import Document, read_file

SHOWN_BYTES = 20_000  # of a text that is drawn


def read_topics(path: Path) -> list[Document]:
    """Documents of a file of JSON lines {topic, text, source}. Raises UsageError for a line that is none, and for a
    document without a topic or text."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file, name lines of {{topic, text}}.")
    found = list(read_file(path))
    for number, document in enumerate(found, 1):
        if not (document.text and document.topic):
            raise UsageError(f"{path}: document {number} has no {'topic' if document.text else 'text'}.")
    if not found:
        raise UsageError(f"{path} holds no documents, name lines of {{topic, text}}.")
    return found


def chosen_texts(path: Path, per_topic: int) -> list[Document]:
    """The documents of a file, at most so many of each topic, spread over its sources as they come."""
    texts = read_topics(path)
    if per_topic < 0:
        raise UsageError(f"--per-topic {per_topic}: give 0 or more.")
    if not per_topic:
        return texts
    kept = []
    for topic in dict.fromkeys(t.topic for t in texts):
        mine = [t for t in texts if t.topic == topic]
        kept += [mine[n * len(mine) // per_topic] for n in range(per_topic)] if len(mine) > per_topic else mine
    return kept


def texts_to_draw(path: str) -> list[Document]:
    """What --text names, as documents. Raises UsageError."""
    if path != "-" and Path(path).suffix in (".jsonl", ".zst", ".gz"):
        found = read_topics(Path(path))
    else:
        try:
            raw = sys.stdin.buffer.read(SHOWN_BYTES + 4) if path == "-" else Path(path).read_bytes()
            text = raw.decode(errors="ignore" if len(raw) > SHOWN_BYTES else "strict")
        except OSError as error:
            raise UsageError(f"--text {path}: it cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"--text {path}: it is not UTF-8 text ({error.reason}).") from error
        found = [Document(text, "the text" if path == "-" else Path(path).name)] if text else []
    if not found:
        raise UsageError(f"--text {path}: it is empty, give text.")
    kept, left = [], SHOWN_BYTES
    for one in found:
        if left > 0:
            cut = one.text.encode()[:left].decode(errors="ignore")
            kept, left = [*kept, replace(one, text=cut)], left - len(one.text.encode())
    return kept


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
