"""Ways to run that must come to the same: each pair in one place, with how near they must be and why.

Exact means bit for bit. The others differ in the order in which floating-point numbers are added, nothing else: losses
of 20 steps stay within the tolerance named, which a real difference (a lost gradient, another batch) leaves at once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import python_minifier
import torch
from test_exits import model_of, tokens_of

import artifact
from golf import exits
from golf.checkpoint import read_tensors
from golf.exits import run_exits
from golf.log_file import read_log
from golf.presets import parse_command_line
from tests.conftest import ROOT, TINY, run

pytestmark = pytest.mark.slow
STEPS = 20
BASE = (*TINY, "--run.no-judge", "--run.checkpoint", "--run.max-steps", STEPS, "--recipe.loops-from", "0.5",
        "--pack.calibration-batches", 2)  # fmt: skip

# Gradients are summed over ranks in another order: about 1e-7 a sum, grown by Muon's division by small singular values.
OVER_RANKS = 1e-4
# Fused chains keep more digits between operations.
COMPILED = 2e-4
# In float64, products over gathered rows are added in another order.
GATHERED_64 = 1e-9
# In float32, nats a token; a token at a threshold may stop elsewhere (test_exits.py counts them).
GATHERED_32 = 1e-4


def trained(place: Path, corpus: Path, *more: object, ranks: int = 1) -> Path:
    """The run folder of a short run."""
    words = ["train_gpt.py", "smoke", *BASE, "--run.data", corpus, "--run.runs", place, *more]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = run(*start, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = place.iterdir()
    return folder


def losses(folder: Path) -> list[float]:
    found = [r["loss"] for r in read_log(folder / "log.jsonl") if r["event"] == "step"]
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("alone"), corpus)


def test_every_rank_knows_the_folder_that_rank_0_names(tmp_path):
    """The name holds the time of day, which ranks that start apart see differently."""
    script = tmp_path / "ask.py"
    script.write_text(
        "import os, sys\nfrom golf.machine import set_up\nfrom golf.presets import PRESETS\n"
        "machine = set_up(PRESETS['smoke'])\nsays = machine.from_rank_0(f'named by {machine.rank}')\n"
        "os.write(1, f'{machine.rank}: {says}\\n'.encode())\n"
    )
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script)
    assert sorted(done.stdout.splitlines()) == ["0: named by 0", "1: named by 0"], done.stderr


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("overlap", ["--run.no-overlap", "--run.overlap"])
def test_ranks(alone, corpus, tmp_path, ranks, overlap):
    """1, 2 and 4 ranks see the same batches; plain and overlapped optimisers do the same sums."""
    several = trained(tmp_path, corpus, overlap, ranks=ranks)
    assert losses(several) == pytest.approx(losses(alone), rel=OVER_RANKS)


def test_twice(alone, corpus, tmp_path):
    """The same seed, machine and number of threads: exact, to the artifact's bytes."""
    again = trained(tmp_path, corpus)
    assert (again / "model.bin").read_bytes() == (alone / "model.bin").read_bytes()
    assert losses(again) == losses(alone)


@pytest.mark.parametrize(("ranks", "flags"), [
    (1, ("--run.threads", 2)), (2, ()),
    pytest.param(1, ("--run.compile", "block", "--run.dtype", "bfloat16"), marks=pytest.mark.skipif(
        shutil.which("g++") is None, reason="nothing can be compiled here")),
])  # fmt: skip
def test_twice_otherwise(corpus, tmp_path, ranks, flags):
    """Exact on two threads, on two ranks, and compiled in bfloat16 too."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (trained(tmp_path / name, corpus, *flags, ranks=ranks) for name in ("one", "two"))
    assert (one / "model.bin").read_bytes() == (two / "model.bin").read_bytes() and losses(one) == losses(two)


def test_resumed(alone, corpus, tmp_path):
    """Killed in the middle and resumed: exact."""
    words = [sys.executable, "train_gpt.py", "smoke", *map(str, BASE), "--run.data", str(corpus), "--run.runs",
             str(tmp_path), "--run.keep-every", "5", "--run.log-every", "1"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r"step\s+12\b", line):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    (folder,) = tmp_path.iterdir()
    done = run(*words[1:], "--run.resume", folder)
    assert done.returncode == 0 and "resumed after step 10" in done.stdout, done.stderr
    assert (folder / "model.bin").read_bytes() == (alone / "model.bin").read_bytes()
    assert losses(folder) == losses(alone)


@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing can be compiled here")
def test_compiled(alone, corpus, tmp_path):
    """Blocks and head compiled, and run as they stand."""
    compiled = trained(tmp_path, corpus, "--run.compile", "block")
    assert losses(compiled) == pytest.approx(losses(alone), rel=COMPILED)


@pytest.mark.parametrize("small", [False, True])
def test_bundled(alone, corpus, small):
    """The one file that ships and the checkout it was made from: exact."""
    flags = ["smoke", *map(str, TINY), "--recipe.loops-from", "0.5"]
    config = parse_command_line(flags).check()
    assert artifact.golden_difference(config, small, small, corpus, STEPS) == ""
    record = json.loads((alone / "submission.json").read_text())
    assert record["steps"] == STEPS


@pytest.mark.parametrize("rule", [exits.Entropy(3.4), exits.RandomDepth(0.4), exits.Difference(0.3)],
                         ids=lambda rule: type(rule).__name__)  # fmt: skip
def test_gathered(rule):
    """Only what runs is computed, or everything is and what stopped is put back: depths exact, states near."""
    model, tokens = model_of(), tokens_of(8)
    whole, some = (run_exits(model, tokens, rule, torch.float64, gather) for gather in (False, True))
    assert torch.equal(whole.depths, some.depths)
    torch.testing.assert_close(whole.states, some.states, rtol=GATHERED_64, atol=GATHERED_64)
    small = model.float()
    whole, some = (run_exits(small, tokens, rule, torch.float32, gather) for gather in (False, True))
    rows = (whole.depths == some.depths).all(dim=1)
    one, two = (small.head_losses(found.states, tokens.roll(-1, 1))[1] for found in (whole, some))
    assert rows.any() and (one - two).abs()[rows].max() <= GATHERED_32


def test_micro_batches(alone, corpus, tmp_path):
    """A batch in parts: the mean of means, added in another order."""
    parts = trained(tmp_path, corpus, "--run.micro-rows", 2)
    assert losses(parts) == pytest.approx(losses(alone), rel=OVER_RANKS)


def test_unpacked_weights_are_those_that_were_packed(alone, tmp_path):
    """The artifact read back is what the packer rounded to: its decoder has no freedom."""
    done = run("artifact.py", "unpack", alone / "model.bin", tmp_path / "w.safetensors")
    assert done.returncode == 0, done.stderr
    stored, packed = (read_tensors(p)[1] for p in (alone / "checkpoint.safetensors", tmp_path / "w.safetensors"))
    assert stored.keys() == packed.keys()
    again = run("artifact.py", "unpack", alone / "model.bin", tmp_path / "again.safetensors")
    assert again.returncode == 0
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_packed_by_another_numpy(alone, tmp_path):
    """Packing uses products, Cholesky factors and rounding: the oldest numpy that knows its names gives the same
    bytes."""
    other = tmp_path / "numpy"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(other), "numpy==2.0.2"]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("numpy 2.0.2 cannot be had here")
    packed = []
    for place in ("", f"{other}{os.pathsep}"):
        target = tmp_path / f"{len(packed)}.bin"
        done = run("artifact.py", "pack", alone / "checkpoint.safetensors", target, "--hessians",
                   alone / "hessians.safetensors", "--target-bytes", 30_000, PYTHONPATH=f"{place}{ROOT}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        packed.append(target.read_bytes())
    assert run("-c", "import numpy; print(numpy.__version__)", PYTHONPATH=str(other)).stdout == "2.0.2\n"
    assert packed[0] == packed[1]
    ours, theirs = (run("-c", BUNDLES, PYTHONPATH=f"{place}{ROOT}") for place in ("", f"{other}{os.pathsep}"))
    assert ours.returncode == 0 and ours.stdout == theirs.stdout, theirs.stderr


def another_python() -> str:
    """A Python of another version on this machine, 3.12 or newer; nothing where there is none."""
    named = [shutil.which(f"python3.{minor}") for minor in (12, 13, 14)]
    for path in [*filter(None, named), *map(str, sorted(Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python")))]:
        told = subprocess.run([path, "-c", "import sys, venv; print(sys.version_info[:2] >= (3, 12))"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if told.stdout == "True\n" and Path(path).resolve() != Path(sys.executable).resolve():
            return path
    return ""


def test_packed_by_another_python(alone, tmp_path):
    """Numbers and bytes do not come from the language: another Python with the same packages packs the same."""
    other, pins = another_python(), (ROOT / "requirements.txt").read_text().splitlines()
    if not other:
        pytest.skip("there is no Python 3.12 or newer beside this one")
    wanted = [p for p in pins if p.split("==")[0] in ("numpy", "scipy", "safetensors", "tyro", "zstandard", "psutil",
                                                      "sentencepiece", "python-minifier")]  # fmt: skip
    there = tmp_path / "venv" / "bin" / "python"
    subprocess.run([other, "-m", "venv", str(tmp_path / "venv")], check=True, capture_output=True)
    pip = [str(there), "-m", "pip", "install", "--quiet", *wanted]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("its packages cannot be had here")
    packed, bundles = [], []
    for python in (sys.executable, str(there)):
        target = tmp_path / f"{len(packed)}.bin"
        words = ["artifact.py", "pack", alone / "checkpoint.safetensors", target, "--hessians",
                 alone / "hessians.safetensors", "--target-bytes", 30_000]  # fmt: skip
        for command in (words, ["-c", BUNDLES]):
            done = subprocess.run([python, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False,
                                  env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
            assert done.returncode == 0, done.stderr
        packed.append(target.read_bytes())
        bundles.append(done.stdout.split("\n", 1))
    assert packed[0] == packed[1]
    assert bundles[0][0] != bundles[1][0] and bundles[0][1] == bundles[1][1]


BUNDLES = """
import hashlib, sys
from golf import bundle
from golf.presets import PRESETS
bundle.MINIFIED = bundle.ROOT / "nowhere" / "kept.json"
print(sys.version_info[:2])
for name in ("laptop", "baseline"):
    for path, data in sorted(bundle.counted_files(PRESETS[name]).items()):
        print(name, path, len(data), hashlib.sha256(data).hexdigest())
"""


def test_bundled_by_another_python(tmp_path):
    """The counted code is parsed, written anew and minified by the Python that packs."""
    (tmp_path / "bundles.py").write_text(BUNDLES)
    packages = tmp_path / "packages"
    shutil.copytree(Path(python_minifier.__file__).parent, packages / "python_minifier")
    npm = shutil.which("npm") and shutil.which("node")
    get = ["npm", "install", "--silent", "--prefix", str(tmp_path), "pyodide@314.0.7"]
    if not npm or subprocess.run(get, capture_output=True, check=False).returncode:
        pytest.skip("there is no node, or Python 3.14 for it cannot be had here")
    words = [ROOT / "tests" / "other_python.mjs", tmp_path / "node_modules" / "pyodide", ROOT, packages]
    other = subprocess.run(["node", *map(str, words), str(tmp_path / "bundles.py")], capture_output=True, text=True,
                           check=False)  # fmt: skip
    ours = run("-c", BUNDLES)
    assert ours.returncode == other.returncode == 0, ours.stderr + other.stderr
    versions, bundles = zip(*(out.split("\n", 1) for out in (ours.stdout, other.stdout)), strict=True)
    assert versions[1] == "(3, 14)" != versions[0]
    assert bundles[0] == bundles[1] and bundles[0].count("\n") == 3
