"""Real text for the tests: a slice of Python's own library, always there; the yardstick's text where it is named."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # scorers that the tests start share the machine with other tests

from golf import prepare, sources, spool


def run(*words: object, cwd: Path = ROOT, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run a Python script or module of the checkout as a user would."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    env.pop("DATA_PATH", None) if "DATA_PATH" not in environment else None
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)


LONGEST = (
    "test_cheats", "test_line", "test_referee", "test_prepare", "test_quantize", "test_codec", "test_bundle",
    "test_depth",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take longest come first, so that no worker is left with one of them at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def library_texts() -> list[sources.Document]:
    """Three hundred documents of the standard library."""
    return list(itertools.islice(sources.builtin().read(), 300))


def small_corpus(out: Path, texts: list[sources.Document], validation_bytes: int) -> Path:
    """A prepared corpus of a vocabulary of 512, with so much validation text."""
    source = sources.Source("tiny", lambda: iter(texts), {"source": "tiny"}, ["PSF License Version 2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "VALIDATION_LEAST", validation_bytes)  # every test that trains scores it several times
        prepare.prepare(source, out, prepare.Options(vocab_size=512, validation_share=0.01))
    return out


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, library_texts: list[sources.Document]) -> Path:
    """A small prepared corpus of standard-library text."""
    return small_corpus(tmp_path_factory.mktemp("corpus"), library_texts, 20_000)


@pytest.fixture(scope="session")
def yardstick() -> Path:
    """The folder of real FineWeb text and tokenizers; tests that need it skip politely where it is absent."""
    folder = Path(os.environ.get("YARDSTICK_DATA", ""))
    if not (folder / "fineweb_val_prefix.jsonl.zst").is_file():
        pytest.skip("YARDSTICK_DATA names no folder with the yardstick's text")
    return folder


def unpacked(path: Path) -> bytes:
    """Contents of a .zst file."""
    with zstandard.open(path, "rb") as stream:
        return stream.read()


# A model of the same kind as the presets, small enough to train in a second.
TINY = (
    "--shape.vocab-size", "512", "--shape.width", "32", "--shape.heads", "2", "--shape.kv-heads", "1",
    "--recipe.sequence-length", "64", "--recipe.batch-tokens", "512", "--run.compile", "none",
    "--run.dtype", "float32", "--run.threads", "1", "--run.device", "cpu",
)  # fmt: skip
