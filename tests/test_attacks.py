"""Submissions that reach for what is not theirs: each says so itself if it gets through, and the verdict must be clean.

What cheats a score is in tests/cheats; what takes too much, hangs or speaks out of turn is in test_referee.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

import eval_bpb
from golf import records
from golf.contender import why_not_isolated
from golf.errors import UsageError
from tests.test_referee import UNIFORM, submission

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not_isolated()), reason="this system cannot shut a process in"),
]  # fmt: skip

ATTACKS = {
    "reads the validation text": """
        for base, folders, files in os.walk("/"):
            folders[:] = [f for f in folders if os.path.join(base, f) not in ("/proc", "/sys")]
            for name in files:
                if name.startswith("val_") and name.endswith(".bin") or name == "val.jsonl":
                    got(os.path.join(base, name))
    """,
    "reads other processes": """
        for pid in os.listdir("/proc"):
            if pid.isdigit() and int(pid) != os.getpid():
                try:
                    told = open(f"/proc/{pid}/cmdline", "rb").read()
                except OSError:
                    continue
                if b"pytest" in told or b"eval_bpb" in told:
                    got(told)
    """,
    "changes the kernel's settings": """
        for name in ("sys/kernel/core_pattern", "sys/vm/overcommit_memory", "sysrq-trigger", "sys/kernel/hostname"):
            try:
                open(os.path.join("/proc", name), "w").close()
                got(name)
            except OSError:
                pass
    """,
    "signals its parents": """
        for pid in {os.getppid(), 1, 2, 3}:
            if pid != os.getpid():
                try:
                    os.kill(pid, 0)
                    if pid != 1 and pid != os.getppid():
                        got(pid)
                except OSError:
                    pass
        try:
            os.kill(-1, 0)
        except OSError:
            pass
    """,
    "forges a verdict": """
        for place in (folder, "/", "/tmp", os.getcwd(), os.path.expanduser("~")):
            try:
                open(os.path.join(str(place), "verdict.json"), "w").write('{"valid": true, "val_bpb": 0.1}')
            except OSError:
                pass
    """,
    "fills the disk": """
        written = 0
        try:
            with open("/tmp/full", "wb") as file:
                while written < 3 << 30:
                    written += file.write(bytes(1 << 24))
            got("3 GB written")
        except OSError:
            os.unlink("/tmp/full")
    """,
    "opens sockets": """
        import socket
        for family, where in ((socket.AF_INET, ("127.0.0.1", 22)), (socket.AF_INET, ("1.1.1.1", 53))):
            try:
                with socket.socket(family) as s:
                    s.settimeout(1)
                    s.connect(where)
                    got(where)
            except OSError:
                pass
        for base, folders, files in os.walk("/"):
            folders[:] = [f for f in folders if os.path.join(base, f) not in ("/proc", "/sys")]
            for name in files:
                path = os.path.join(base, name)
                if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
                    got(path)
    """,
    "changes the code that runs it": """
        import sysconfig
        for place in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/lib", "/etc"):
            try:
                open(os.path.join(place, "golf_was_here"), "w").write("x")
                got(place)
            except OSError:
                pass
    """,
    "mounts and becomes another": """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"proc", b"/tmp", b"proc", 0, None) == 0 and os.path.exists("/tmp/1"):
            names = [open(f"/tmp/{p}/cmdline", "rb").read() for p in os.listdir("/tmp") if p.isdigit()]
            if any(b"pytest" in n for n in names):
                got(names)
        for call in (lambda: os.setuid(0), lambda: os.chroot("/proc/1/root")):
            try:
                call()
            except OSError:
                pass
        if os.path.exists("/proc/1/root/home") and os.listdir("/proc/1/root/home"):
            got("another root")
    """,
    "reads the ledger's memory": """
        for pid in (os.getppid(), 1):
            try:
                with open(f"/proc/{pid}/mem", "rb", 0) as file, open(f"/proc/{pid}/maps") as maps:
                    if b"eval_bpb" in open(f"/proc/{pid}/cmdline", "rb").read():
                        got(maps.readline())
            except OSError:
                pass
    """,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_got_and_the_score_is_right(tmp_path, corpus, name):
    attack = textwrap.indent(textwrap.dedent(ATTACKS[name]), "        ")
    head = "    import os, stat\n\n    def got(what):\n        raise RuntimeError(f'GOT THROUGH: {what!r:.200}')\n"
    source = UNIFORM.replace("    import numpy as np\n", f"    import numpy as np\n{head}", 1)
    source = source.replace("        return Scorer()", f"{attack}\n        return Scorer()")
    folder = submission(tmp_path / "attack", corpus, source)
    before = {p: p.read_bytes() for p in corpus.iterdir()}
    verdict = eval_bpb.judge(folder, corpus)
    assert verdict["valid"], verdict["invalid"]
    assert verdict["val_loss"] == pytest.approx(6.238, abs=0.001)
    assert {p: p.read_bytes() for p in corpus.iterdir()} == before
    assert not (folder / "verdict.json").exists() and not Path("/tmp/verdict.json").exists()


def test_who_kills_whatever_it_can_reaches_nothing_of_ours(tmp_path, corpus):
    """Every signal that ends or stops, to its parents, to each process it sees, and to all at once."""
    kills = textwrap.indent(textwrap.dedent("""
        import os, signal
        seen = {int(p) for p in os.listdir("/proc") if p.isdigit()} | {os.getppid(), 1} - {0}
        for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
            for pid in (*seen - {os.getpid(), 0}, -1):
                try:
                    os.kill(pid, number)
                except OSError:
                    pass
    """), "        ")  # fmt: skip
    source = UNIFORM.replace("        return Scorer()", f"{kills}\n        return Scorer()")
    folder = submission(tmp_path / "kills", corpus, source)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as beside:
        verdict = eval_bpb.judge(folder, corpus)  # which this process lives to see
        assert psutil.Process(beside.pid).status() in (psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING)
        beside.kill()
    assert verdict["valid"] or "scorer" in verdict["invalid"], verdict


@pytest.mark.parametrize("name", ["submission.json", "scorer.py", "train_gpt.py", "weights.bin", "tokenizer.model"])
def test_links_and_paths_out_of_the_folder_are_refused(tmp_path, corpus, name):
    folder = submission(tmp_path / "links", corpus, UNIFORM)
    (folder / name).unlink(missing_ok=True)
    os.symlink("/etc/passwd", folder / name)
    try:
        said = eval_bpb.judge(folder, corpus).get("invalid", "valid")
    except UsageError as error:
        said = str(error)
    assert "link" in said or name == "tokenizer.model", said  # which is the data's own, and the folder's is not read


def test_a_tokenizer_by_a_path_out_of_the_folder_is_refused(tmp_path, corpus):
    for path in ("../../etc/passwd", "/etc/passwd", ".hidden"):
        folder = tmp_path / path.replace("/", "_")
        told = {"kind": "sentencepiece", "file": path, "sha256": "0" * 64, "transform": "none"}
        submission(folder, corpus, UNIFORM, tokenizer=told)
        with pytest.raises(Exception, match="not a plain name"):
            eval_bpb.judge(folder, corpus)


def test_json_of_a_million_brackets_costs_little(tmp_path, corpus):
    folder = submission(tmp_path / "deep", corpus, UNIFORM)
    (folder / "submission.json").write_text("[" * 1_000_000)
    with pytest.raises(UsageError, match="not JSON"):
        records.read(folder)
