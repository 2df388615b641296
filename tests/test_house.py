"""The house rules that a program can hold."""

import ast
import json
import re
import shlex
import subprocess

import pytest
from conftest import ROOT, TINY, run

from golf.bundle import MODULES
from golf.presets import PRESETS

SCRIPTS = {"train_gpt", "artifact", "budget", "eval_bpb", "record", "depth_map"}
ALLOWED = {"torch", "numpy", "sentencepiece", "zstandard"}


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "golf":
                yield from (f"golf.{alias.name}" for alias in node.names)


def test_counted_modules_import_only_what_a_submission_may():
    import sys

    for name in MODULES:
        for module in imports(ROOT / "golf" / f"{name}.py"):
            top = module.split(".")[0]
            if top == "golf":
                assert module == "golf" or module.split(".")[1] in MODULES, f"{name} imports {module}"
            else:
                assert top in ALLOWED or top in sys.stdlib_module_names, f"{name} imports {module}"
    for module in imports(ROOT / "train_gpt.py", top_level_only=True):
        if module.startswith("golf."):
            assert module.split(".")[1] in MODULES, f"train_gpt imports {module} outside main()"


def test_the_package_imports_no_script():
    for path in (ROOT / "golf").glob("*.py"):
        assert not SCRIPTS & {m.split(".")[0] for m in imports(path)}, path.name


def test_no_pickle():
    for path in [*ROOT.glob("*.py"), *(ROOT / "golf").glob("*.py")]:
        text = path.read_text("utf-8")
        assert not re.search(r"\bpickle\b(?!=False)|torch\.load|torch\.save|allow_pickle=True", text.replace(
            "nothing is pickled", "").replace("no pickle", "")), path.name  # fmt: skip


def test_readme_commands_name_real_things():
    text = (ROOT / "README.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^make ([\w-]+)", text, re.M)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for script, preset in re.findall(r"python (train_gpt|budget)\.py (\w[\w-]*)", text):
        assert (
            preset in PRESETS or (script == "budget" and preset in ("table", "measure", "fit")) or preset.isupper()
        ), preset
    rooms = (ROOT / "docs" / "rooms.md").read_text("utf-8")
    named = re.findall(r"`(golf/\w+\.py|\w+\.py)`", "".join(re.findall(r"^\| .*\n", text + rooms, re.M)))
    assert all((ROOT / name).exists() for name in named)
    missing = {f"golf/{p.name}" for p in (ROOT / "golf").glob("*.py")} - {"golf/__init__.py"} - set(named)
    assert not missing, missing
    assert not re.search(r"\b[A-Z]+_(BLOCK|TABLE)\b", text), "a placeholder"


def test_a_reader_that_leaves_early_is_no_error():
    import sys

    command = f"{sys.executable} budget.py table | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.slow
def test_a_reader_that_leaves_early_ends_no_run(corpus, tmp_path):
    import sys

    words = [sys.executable, "train_gpt.py", "smoke", *TINY, "--run.max-steps", "30", "--run.log-every", "1",
             "--run.no-judge", "--run.data", str(corpus), "--run.runs", str(tmp_path)]  # fmt: skip
    done = subprocess.run(["bash", "-c", f"{shlex.join(words)} | head -2"], cwd=ROOT, capture_output=True, check=False)
    record = json.loads(next(tmp_path.glob("*/submission.json")).read_text())
    assert done.returncode == 0 and record["status"] == "complete" and record["steps"] == 30, done.stderr


def test_the_repository_holds_no_large_files_and_no_data():
    done = subprocess.run(["git", "ls-files", "-s", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        return
    names = [row.split("\t", 1)[1] for row in done.stdout.decode().split("\0") if row]
    assert not [n for n in names if n.endswith((".zst", "tokenizer.model")) or n.startswith("data/")]
    assert sum((ROOT / n).stat().st_size for n in names if (ROOT / n).exists()) < 15_000_000


@pytest.mark.parametrize("command", [
    "train_gpt.py", "train_gpt.py smoke", "artifact.py", "artifact.py pack", "budget.py", "budget.py fit",
    "eval_bpb.py", "eval_bpb.py prove", "eval_bpb.py lint", "depth_map.py", "depth_map.py topics", "record.py",
    "record.py submit", "-m golf.prepare", "-m golf.ablate",
])  # fmt: skip
def test_every_help_shows_a_command(command):
    done = run(*command.split(), "--help")
    words = f"python {command.split()[0]}" if command[0] != "-" else f"python {command}"
    assert done.returncode == 0 and (words in done.stdout or "budget.py fit" in done.stdout), done.stderr


def test_the_shell_can_complete_options_and_subcommands(tmp_path):
    """In a real bash, on what tyro prints."""
    done = run("record.py", "--tyro-print-completion", "bash")
    assert done.returncode == 0
    (tmp_path / "completion.bash").write_text(done.stdout)
    script = (
        f"source {tmp_path}/completion.bash; f=$(complete -p record.py | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
        "COMP_WORDS=(record.py com); COMP_CWORD=1; $f record.py com record.py; echo ${COMPREPLY[@]}"
    )
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert "compare" in told.stdout, told.stderr
