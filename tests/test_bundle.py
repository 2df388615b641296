"""The bundle: one file, the same bytes every time, allowed imports only, and the same training bit for bit."""

import ast
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, TINY, run
from hypothesis import given, settings
from hypothesis import strategies as st

from golf import bundle
from golf.config import Config
from golf.errors import UsageError
from golf.presets import PRESETS
from golf.recipe import Pack, Recipe, Run
from golf.shape import Shape

GOLDEN = ("--run.max-steps", "20", "--recipe.loops-from", "0.5", "--run.name", "golden")


@pytest.fixture(scope="module")
def checkout(corpus, tmp_path_factory):
    """A 20-step run of the checkout, judged."""
    runs = tmp_path_factory.mktemp("runs")
    done = run("train_gpt.py", "smoke", *TINY, *GOLDEN, "--run.data", corpus, "--run.runs", runs)
    assert done.returncode == 0, done.stderr
    return next(runs.iterdir())


def losses(log: str) -> list[float]:
    rows = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [row["loss"] for row in rows if row["event"] == "step"]


def alone(source: bytes, folder, corpus, **environment: str) -> subprocess.CompletedProcess:
    """Run a bundle isolated, in a folder that holds nothing else."""
    folder.mkdir()
    (folder / "train_gpt.py").write_bytes(source)
    return subprocess.run(
        [sys.executable, "-I", "train_gpt.py"], cwd=folder, capture_output=True, text=True, timeout=240, check=False,
        env={"PATH": "/usr/bin:/bin", "DATA_PATH": str(corpus), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["counted", "source"])
def test_the_bundle_trains_as_the_checkout_does_bit_for_bit(checkout, corpus, tmp_path, kind):
    path = checkout / ("train_gpt.py" if kind == "counted" else "source/train_gpt.py")
    done = alone(path.read_bytes(), tmp_path / "empty", corpus)
    assert done.returncode == 0, done.stderr
    assert losses(done.stdout) == losses((checkout / "log.jsonl").read_text()) and len(losses(done.stdout)) == 20
    record = json.loads((checkout / "submission.json").read_text())
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[-1]["val_bpb"] == pytest.approx(record["unpacked_val_bpb"], abs=1e-12)
    if kind == "counted":  # the readable one leaves the artifact less room
        model = (tmp_path / "empty" / "model.bin").read_bytes()
        assert len(model) == record["bytes_model"]
        again = run("eval_bpb.py", checkout, "--data", corpus, "--json")
        assert json.loads(again.stdout)["val_bpb"] == pytest.approx(record["val_bpb"], abs=1e-9)


def test_the_bundle_overwrites_nothing_and_says_what_is_wrong(corpus, tmp_path):
    source, model = bundle.counted_files(PRESETS["smoke"])["train_gpt.py"], tmp_path / "model.bin"
    model.write_bytes(b"mine")
    there = alone(source, tmp_path / "a", corpus, MODEL_PATH=str(model))
    nothing = alone(source, tmp_path / "b", tmp_path / "nowhere")
    for done, said in ((there, "MODEL_PATH"), (nothing, "manifest.json")):
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert model.read_bytes() == b"mine"


def test_same_configuration_same_bytes():
    for name in ("baseline", "smoke"):
        first = bundle.counted_files(PRESETS[name])
        assert first == bundle.counted_files(PRESETS[name])
        size = len(first["train_gpt.py"])  # other configurations of a track differ by what is baked in
        assert bundle.code_bytes(PRESETS[name]) == pytest.approx(size, abs=600)
    assert "source/train_gpt.py" in first and len(first["train_gpt.py"]) < len(first["source/train_gpt.py"]) / 3


def test_a_bundle_is_one_readable_file_of_allowed_imports():
    source = bundle.readable(PRESETS["record"])
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= {"torch", "numpy", "sentencepiece", "zstandard"} | sys.stdlib_module_names
    names = [n for node in tree.body for n in bundle.defined(node)]
    assert len(names) == len(set(names))
    assert {"load_scorer", "main", "CONFIG", "RecurrentGPT", "Muon"} <= set(names)
    assert "write_shard" not in names  # only what is used
    assert "# Every parameter's role" in source  # with its comments
    assert max(map(len, source.splitlines())) < 500


def test_the_configuration_is_baked_in():
    config = replace(PRESETS["laptop"], run=Run(seed=7, data="/somewhere/else", name="x"))
    source = bundle.readable(config)
    (text,) = [t for node, t in bundle.take_apart("x", source).statements if bundle.defined(node) == ["CONFIG"]]
    names = {"Config": Config, "Pack": Pack, "Shape": Shape, "Recipe": Recipe, "Run": Run}
    found = eval(text.partition("CONFIG = ")[2], names)
    assert found == replace(config, run=Run(seed=7, data="data"))
    assert "/somewhere" not in source


def test_minified_and_packed_are_smaller():
    source = bundle.readable(PRESETS["smoke"])
    small = bundle.minified(source)
    assert len(bundle.packed(small)) < len(bundle.packed(source)) < len(small) < len(source)


def test_no_formatted_string_holds_a_quoted_one():
    """From Python 3.12 on such a string is minified to one that 3.11 cannot read, and to other bytes."""
    fields = [n for n in ast.walk(ast.parse(bundle.readable(PRESETS["laptop"]))) if isinstance(n, ast.FormattedValue)]
    quoted = [n for field in fields for n in ast.walk(field.value) if isinstance(n, ast.Constant)]
    assert fields and not [n.value for n in quoted if isinstance(n.value, str | bytes)]


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.binary(), st.binary(min_size=1, max_size=1).map(lambda b: b * 3 + b"07\\n\"\r\n")))
def test_any_bytes_stand_in_a_source(data):
    names: dict = {}
    exec(compile(b'# coding: latin-1\nx = "%b".encode("latin-1")' % bundle.literal(data), "x", "exec"), names)
    assert names["x"] == data


@pytest.mark.parametrize(("code", "said"), [
    ("import requests", "requests"),
    ("def f():\n    import golf.data", "at the top"),
    ("from golf.data import Corpus as C", "keeps its name"),
    ("x = open('/etc/passwd')", "/etc/passwd"),
    ("x = open('../other')", "../other"),
])  # fmt: skip
def test_code_that_reaches_out_is_refused(code, said):
    with pytest.raises(UsageError, match=said):
        bundle.take_apart("module.py", code)


def test_two_definitions_of_a_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "golf").mkdir()
    for name in bundle.MODULES:
        text = (ROOT / "golf" / f"{name}.py").read_text()
        (tmp_path / "golf" / f"{name}.py").write_text(text + ("\nNEXT = 3\n" if name == "muon" else ""))
    (tmp_path / "train_gpt.py").write_text((ROOT / "train_gpt.py").read_text())
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    with pytest.raises(UsageError, match="both define NEXT"):
        bundle.readable(PRESETS["smoke"])


@pytest.mark.slow
def test_the_bundle_command(checkout, corpus, tmp_path):
    out = tmp_path / "out"
    for flags in ([], ["--minify"], ["--minify", "--pack"]):
        target = out / "-".join(["x", *flags])
        done = run("artifact.py", "bundle", checkout, "--output", target, *flags, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["bytes_code"] == (target / "train_gpt.py").stat().st_size
    assert (target / "train_gpt.py").read_bytes() == (checkout / "train_gpt.py").read_bytes()
    assert run("artifact.py", "bundle", checkout, "--minify", "--pack").returncode == 0  # what is there already
    before = (checkout / "train_gpt.py").read_bytes()
    for words in ([checkout], ["smoke"], [tmp_path], ["nothing"]):
        done = run("artifact.py", "bundle", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (checkout / "train_gpt.py").read_bytes() == before


@pytest.mark.slow
def test_the_golden_run_of_the_command(checkout, corpus, tmp_path):
    """Of a run whose flags are not its preset's."""
    done = run("artifact.py", "bundle", checkout, "--output", tmp_path / "x", "--pack", "--golden", corpus)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x" / "train_gpt.py").exists()
