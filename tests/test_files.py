"""Files of strangers: links, pipes, devices, paths out of the folder, endless lines and deep JSON cost one sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import run
from safetensors.numpy import save

from golf import checkpoint, files, folders, log_file, records, rescore, resume, run_list, verdicts
from golf.data import Corpus
from golf.errors import UsageError

READERS = {
    "submission.json": records.read,
    "log.jsonl": lambda folder: log_file.read_log(folder / "log.jsonl"),
    "model.bin": rescore.read_artifact,
    "manifest.json": Corpus,
}


def become(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "link", "device"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_not_waited_for(tmp_path, name, kind):
    become(tmp_path / name, kind)
    with pytest.raises(UsageError, match=name):
        READERS[name](tmp_path)


def test_a_verdict_or_a_log_that_is_no_file_is_none(tmp_path):
    for kind in ("pipe", "device"):
        for name in ("verdict.json", "log.jsonl"):
            become(tmp_path / name, kind)
        assert verdicts.read(tmp_path) is None
        assert run_list.first_row(tmp_path / "log.jsonl") == {}


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert files.read_plain(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        files.read_plain(path, 4)
    with open(path, "rb") as stream, pytest.raises(ValueError, match="line 1 has more than 4 bytes"):
        list(files.lines_of(stream, 4))
    link = tmp_path / "link"
    link.symlink_to(path)
    assert files.read_plain(link, links=True) == b"12345"
    with pytest.raises(OSError, match="link"):
        files.read_plain(link)


@pytest.mark.parametrize("name", ["../train_000.bin", "/etc/passwd", "deep/train_000.bin"])
def test_shards_lie_in_their_folder(corpus, tmp_path, name):
    told = json.loads((corpus / "manifest.json").read_text())
    told["splits"]["train"]["files"] = [name]
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match="plain names"):
        Corpus(tmp_path)


def test_a_copy_follows_no_link_and_is_whole_or_not_there(tmp_path):
    source, target = tmp_path / "run", tmp_path / "copy"
    for name in ("source", "states"):
        (source / name).mkdir(parents=True)
    (source / "source" / "link").symlink_to("/etc")
    (source / "source" / "lost").symlink_to("nowhere")
    (source / "states" / "large").write_bytes(b"x")
    folders.copy_whole(source, target)
    assert (target / "source" / "link").is_symlink() and not (target / "states").exists()
    os.mkfifo(source / "pipe")
    with pytest.raises(UsageError, match=r"cannot be copied .*named pipe"):
        folders.copy_whole(source, tmp_path / "another")


def test_deep_json_in_a_safetensors_file(tmp_path):
    deep = "[" * 100_000
    (tmp_path / "states").mkdir()
    path = tmp_path / "states" / "x.safetensors"
    path.write_bytes(save({"a": np.zeros(1, np.float32)}, metadata={"shape": deep, "state": deep}))
    with pytest.raises(UsageError, match="no model shape"):
        checkpoint.read_tensors(path)
    with pytest.raises(UsageError, match="damaged"):
        resume.newest(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["documents", "validation", "submission", "log"])
def test_a_line_of_a_gigabyte_costs_little(tmp_path, kind):
    """Packed to some 30 kB where the reader unpacks; the process that reads it stays under half of it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    head, block = b'{"text": "', b"x" * (1 << 20)
    path = folder / {"documents": "a.jsonl.zst", "validation": "a.jsonl.zst", "submission": "submission.json",
                     "log": "log.jsonl"}[kind]  # fmt: skip
    with zstandard.open(path, "wb") if path.suffix == ".zst" else open(path, "wb") as out:
        out.write(head)
        for _ in range(1024):
            out.write(block)
        out.write(b'"}\n')
    reads = {
        "documents": f"from golf import sources; list(sources.files([Path({str(path)!r})], [], 'x').read())",
        "validation": f"from golf import validation; list(validation.read_documents(Path({str(path)!r})))",
        "submission": f"from golf import records; records.read(Path({str(folder)!r}))",
        "log": f"from golf import log_file; log_file.read_log(Path({str(path)!r}))",
    }
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom golf.errors import UsageError\n"
        f"try:\n    {reads[kind]}\nexcept UsageError as error:\n    print(error)\n"
        "status = Path('/proc/self/status')\n"  # what getrusage knows on Linux begins with the parent's peak
        "if status.exists():\n"
        "    print(1024 * int(status.read_text().split('VmHWM:')[1].split()[0]))\n"
        "else:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))\n"
    )
    done = run("-c", code)
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    said, peak = done.stdout.splitlines()
    assert "more than" in said and len(said) < 500
    assert int(peak) < 1 << 29
