"""The contest's own shards and tokenizer, fetched from its public dataset."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from golf.bpb import ByteTable
from golf.data import complete, read_shard
from golf.errors import UsageError
from golf.files import read_plain, write_bytes

REPOSITORY, PREFIX = "willdepueoai/parameter-golf", "datasets"
BEGUN = ".begun"  # what is being fetched, until it is there


def download(name: str, out: Path) -> Path:
    """Fetch one file below PREFIX of the dataset to `out`, by its own name; keep one that is there whole."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # one sentence at the end instead of a warning for every retry
    target = out / Path(name).name
    if target.exists():
        return target
    try:
        got = hf_hub_download(REPOSITORY, f"{PREFIX}/{name}", repo_type="dataset", local_dir=out / ".work")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{PREFIX}/{name} of {REPOSITORY} could not be fetched ({reason}); check the network, then run it again."
        ) from error
    shutil.move(got, target)
    return target


def entry(manifest: dict, section: str, name: str) -> dict:
    """The manifest's row called `name` in one of its lists, or an empty one."""
    rows = manifest.get(section)
    return (
        next((r for r in rows if isinstance(r, dict) and r.get("name") == name), {}) if isinstance(rows, list) else {}
    )


def variant_in(out: Path) -> str:
    """The variant whose shards stand in a folder, fetched whole or in part; empty where that is not known."""
    for name in ("manifest.json", BEGUN):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return str(json.loads(read_plain(out / name))["request"]["variant"])
    return ""


def fetch(out: Path, variant: str, train_shards: int) -> dict:
    """Fetch the whole validation split and `train_shards` train shards to `out`; return our manifest.

    Raises UsageError when the variant is not published or a file cannot be had.
    """
    if train_shards < 1:
        raise UsageError(f"--train-shards {train_shards}: give 1 or more.")
    out.mkdir(parents=True, exist_ok=True)
    request = {"source": "contest", "variant": variant, "train_shards": train_shards}
    if earlier := complete(out, request):
        return earlier
    if (there := variant_in(out)) not in ("", variant):  # in files of the same names
        raise UsageError(f"--variant {variant}: {out} holds shards of {there}, give another --out or delete it.")
    try:
        published = json.loads(download("manifest.json", out / ".manifest").read_text("utf-8"))
        if not isinstance(published, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise UsageError(f"The hub's manifest.json is not JSON ({error}); try again.") from error
    dataset = f"fineweb10B_{variant}"
    row = entry(published, "datasets", dataset)
    if not row:
        known = ", ".join(str(r.get("name")) for r in published.get("datasets", []))
        raise UsageError(f"--variant {variant}: not among the published datasets ({known}).")
    stats = row.get("stats") or {}
    there = int(stats.get("files_train", train_shards))
    if train_shards > there:
        raise UsageError(f"--train-shards {train_shards}: {variant} has {there} of them, give that many or fewer.")
    write_bytes(out / BEGUN, json.dumps({"request": request}).encode())
    tokenizer_row = entry(published, "tokenizers", str(row.get("tokenizer_name")))
    tokenizer = tokenizer_row.get("model_path") or f"tokenizers/fineweb_{variant.removeprefix('sp')}_bpe.model"
    model = download(str(tokenizer), out).rename(out / "tokenizer.model")
    table = ByteTable(model)
    splits = {}
    for name, count in (("val", int(stats.get("files_val", 1))), ("train", train_shards)):
        files = [download(f"datasets/{dataset}/fineweb_{name}_{i:06d}.bin", out).name for i in range(count)]
        splits[name] = count_split(out, files, table)
        print(f"{name}: {count} shards, {splits[name]['tokens']:,} tokens")
    identity = hashlib.sha256()
    for file in splits["val"]["files"]:
        identity.update((out / file).read_bytes())
    identity.update(json.dumps(splits["train"]["files"]).encode())
    manifest = {
        "name": f"contest-{variant}", "fingerprint": identity.hexdigest()[:16],
        "attribution": ["FineWeb (ODC-BY 1.0, CommonCrawl terms of use), as published for the parameter-golf contest."],
        "tokenizer": {
            "kind": "sentencepiece", "vocab_size": table.vocab_size,
            "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        },
        "splits": splits, "dropped": 0,
        "request": request,
    }  # fmt: skip
    write_bytes(out / "manifest.json", json.dumps(manifest, indent=1).encode())
    shutil.rmtree(out / ".work", ignore_errors=True)
    shutil.rmtree(out / ".manifest", ignore_errors=True)
    (out / BEGUN).unlink()
    return manifest


def count_split(out: Path, files: list[str], table: ByteTable) -> dict:
    """Documents, tokens and bytes of the published shards."""
    documents = tokens = counted = 0
    for name in files:
        shard = read_shard(out / name)
        documents += int(np.count_nonzero(shard == table.bos))
        tokens += shard.size
        for start in range(0, shard.size, 1 << 24):
            part = shard[start : start + (1 << 24)]
            before = shard[start - 1 : start] if start else part[:1]
            counted += table.count(np.concatenate([before, part[:-1]]), part)
    return {
        "documents": documents, "bytes": counted, "tokens": tokens, "counted_bytes": counted, "lossy_documents": 0,
        "files": files,
    }  # fmt: skip
