"""The code of a submission as one file: train_gpt.py with its modules inlined and its configuration baked in.

Same source and configuration, same bytes, on any machine. What nothing in the file uses is left out.
"""

from __future__ import annotations

import ast
import bz2
import contextlib
import hashlib
import json
import re
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

from golf.config import Config
from golf.errors import UsageError
from golf.files import write_bytes

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "errors", "shape", "recipe", "checks", "config", "files", "halting", "loss", "block", "model", "objective",
    "trellis", "grid", "rans", "entropy", "reference", "codec", "quantize", "muon", "overlap", "data", "bpb", "clock",
    "machine", "calibrate", "noise", "average", "guard", "ngrams", "exits", "scoring",
)  # fmt: skip
PACKAGES = {"torch", "numpy", "sentencepiece", "zstandard", *sys.stdlib_module_names}
KEPT = ("load_scorer", "main", "CONFIG")
SIZES, MINIFIED = ROOT / "code_bytes.json", ROOT / "minified.json"
PACKED_TRACKS = ("laptop", "smoke")  # plain code would eat a good part of their cap

MAIN_IMPORTS = ("import json", "import os", "import sys", "from dataclasses import replace", "from pathlib import Path")
MAIN_RULE = "# == this file's own main: the baked configuration; SEED, DATA_PATH and MODEL_PATH from outside =="
MAIN = (
    """
"""
    + MAIN_RULE
    + '''

CONFIG = {config}


def main() -> int:
    """Train again from scratch, JSON lines on standard output, and write the artifact."""
    run = replace(
        CONFIG.run, seed=int(os.environ.get("SEED", CONFIG.run.seed)), data=os.environ.get("DATA_PATH", CONFIG.run.data)
    )
    config = replace(CONFIG, run=run).check(int(os.environ.get("WORLD_SIZE", 1)))
    here = Path(__file__)
    path = Path(os.environ.get("MODEL_PATH", here.parent / "model.bin"))
    if path.exists():
        raise UsageError(f"{{path}} exists, name another file in MODEL_PATH.")
    corpus = Corpus(run.data)
    corpus.check(config.shape.vocab_size, config.recipe.sequence_length)
    machine = set_up(config)

    def report(row: dict) -> None:
        if machine.rank == 0:
            print(json.dumps(row), flush=True)

    with Interrupt().watched() as interrupt:
        result = Training(config, corpus, machine, report).run(interrupt)
        if machine.rank == 0:
            pack(result, config, path, here.stat().st_size, report)
        score = validation_score(result.model, corpus, config, machine)
        report({{"event": "unpacked", "val_loss": score.loss, "val_bpb": score.bpb}})
    return 0 if result.status == "complete" else 1


if __name__ == "__main__":
    try:
        code = main()
    except UsageError as error:
        print(f"train_gpt.py: {{error}}", file=sys.stderr)
        code = 2
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
'''
)

LOADER = b'''\
# coding: latin-1
"""The code of this submission, compressed; the same code lies readable under source/."""
import bz2, linecache
SOURCE = bz2.decompress("%b".encode("latin-1")).decode()
NAME = __file__ + ":unpacked"
linecache.cache[NAME] = (len(SOURCE), None, SOURCE.splitlines(True), NAME)
exec(compile(SOURCE, NAME, "exec"))
'''  # every byte is a character of Latin-1: base 85 would take a fifth more


@dataclass(frozen=True)
class Module:
    """A source file taken apart: its imports, and its top-level statements with the comments above each."""

    name: str
    heading: str
    imports: list[ast.Import | ast.ImportFrom]
    statements: list[tuple[ast.stmt, str]]


def take_apart(name: str, source: str) -> Module:
    """Read a module. Raises UsageError for what a bundle cannot hold."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    heading, imports, statements = "", [], []
    end = 0  # lines used so far
    for node in tree.body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        above = lines[end:first]
        end = node.end_lineno
        if isinstance(node, ast.Expr) and not statements and not imports:
            heading = ast.get_docstring(tree) or ""
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(node)
        elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        else:
            statements.append((node, "".join(above).lstrip("\n") + "".join(lines[first:end])))
    refuse_strange(name, tree, source)
    return Module(name, heading, imports, statements)


def refuse_strange(name: str, tree: ast.Module, source: str) -> None:
    """Raise UsageError for imports beyond the allowed packages and for paths that lead out of the folder."""
    inner_main = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"), None)
    ours = set(map(id, ast.walk(inner_main))) if inner_main else set()
    for n in tree.body:
        if isinstance(n, ast.If) and "__name__" in ast.unparse(n.test):
            ours |= set(map(id, ast.walk(n)))
    for node in ast.walk(tree):
        if id(node) in ours:
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in names:
                top = module.split(".")[0]
                if top == "golf" and (isinstance(node, ast.Import) or node not in tree.body):
                    raise UsageError(
                        f"{name}: write `from golf.x import name` at the top, line {node.lineno} does not."
                    )
                if top == "golf" and any(a.asname for a in node.names):
                    raise UsageError(f"{name}: a golf name keeps its name, line {node.lineno} changes it.")
                if top not in PACKAGES | {"golf", "__future__"}:
                    raise UsageError(f"{name}: a submission may not import {module}.")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            path = node.value
            if path.startswith(("/", "~", "../")) and len(path) > 1 and " " not in path:
                raise UsageError(f"{name}: a submission may not read {path}, line {node.lineno}.")


def defined(node: ast.stmt) -> list[str]:
    """Names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def used(node: ast.AST) -> set[str]:
    """Names that a statement mentions, in annotations too."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def reachable(modules: list[Module]) -> set[str]:
    """Names that the kept functions need, directly or not."""
    needs: dict[str, set[str]] = {}
    for module in modules:
        for node, _ in module.statements:
            for name in defined(node):
                needs.setdefault(name, set()).update(used(node))
    everything = "Config(shape=Shape(), recipe=Recipe(), pack=Pack(), scoring=Scoring(), run=Run())"
    found, todo = set(), [*KEPT, *used(ast.parse(MAIN.format(config=everything)))]
    while todo:
        name = todo.pop()
        if name not in found and name in needs:
            found.add(name)
            todo += needs[name]
    return found


def merged_imports(modules: list[Module], names: set[str]) -> str:
    """One import block: the others' imports, sorted, less what nothing uses."""
    lines = set(MAIN_IMPORTS)
    for module in modules:
        for node in module.imports:
            for alias in node.names:
                if foreign(node) and bound_name(alias) in names:
                    kept = [alias]
                    one = ast.Import(kept) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, kept, 0)
                    lines.add(ast.unparse(one))
    return "\n".join(sorted(lines, key=lambda line: (line.split()[1], line)))


def foreign(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import stays: neither ours nor __future__."""
    return isinstance(node, ast.Import) or (node.module or "").split(".")[0] not in ("golf", "__future__")


def bound_name(alias: ast.alias) -> str:
    return (alias.asname or alias.name).split(".")[0]


def baked(value: object, comma: str = ", ") -> str:
    """A dataclass as the expression that makes it, default fields left out."""
    parts = []
    for f in fields(value):
        item = getattr(value, f.name)
        default = f.default_factory() if callable(getattr(f, "default_factory", None)) else f.default
        if item != default:
            parts.append(f"{f.name}={baked(item) if is_dataclass(item) else repr(item)}")
    return f"{type(value).__name__}({comma.join(parts)})"


def source_files() -> list[Path]:
    """Everything that is inlined, in its order."""
    return [*(ROOT / "golf" / f"{name}.py" for name in MODULES), ROOT / "train_gpt.py"]


def readable(config: Config) -> str:
    """One self-contained train_gpt.py for this configuration. Raises UsageError for code that cannot be bundled."""
    run = config.run
    data = run.data if not Path(run.data).is_absolute() else "data"
    config = replace(config, run=replace(run, data=data, name="", runs="runs", judge=True, checkpoint=False))
    modules = [take_apart(path.name, path.read_text("utf-8")) for path in source_files()]
    keep = reachable(modules) - {"main"}
    owner: dict[str, str] = {}
    parts, names = [], used(ast.parse(MAIN.format(config="0")))
    for module in modules:
        texts = []
        for node, text in module.statements:
            mine = defined(node)
            for name in mine:
                if owner.setdefault(name, module.name) != module.name:
                    raise UsageError(f"{module.name} and {owner[name]} both define {name}; rename one of them.")
            if mine and not set(mine) & keep:
                continue
            names |= used(node)
            texts.append(text.rstrip())
        rule = f"# == {module.name.removesuffix('.py')} ".ljust(100, "=")
        about = "".join(f"# {line}".rstrip() + "\n" for line in module.heading.splitlines())
        parts.append(f"{rule}\n{about}\n" + "\n\n\n".join(texts))
    imported = {bound_name(a) for m in modules for node in m.imports if foreign(node) for a in node.names}
    if clash := sorted(imported & set(owner)):
        raise UsageError(f"The names {clash} are both imported and defined; rename them.")
    head = f'"""A submission in one file: preset {config.preset}, track {config.track}."""\n\n'
    head += f"from __future__ import annotations\n\n{merged_imports(modules, names)}\n\n"
    return head + "\n\n\n".join(parts) + "\n\n" + MAIN.format(config=baked(config, ",\n    "))


def minified(source: str) -> str:
    """The same program with short names, by python-minifier; the modules' part is kept from one time to the next."""
    import python_minifier

    modules, _, main = source.partition(MAIN_RULE)
    key = hashlib.sha256(modules.encode()).hexdigest()
    kept = read_kept(MINIFIED)
    if type(kept.get(key)) is not str:
        small = python_minifier.minify(modules, rename_globals=False, remove_literal_statements=True)
        kept = {key: small}
        keep(MINIFIED, kept)
    main = python_minifier.minify(main, rename_globals=False, hoist_literals=False, remove_literal_statements=True)
    return f"{kept[key]}\n{main}\n"


def read_kept(path: Path) -> dict:
    """What an earlier call worked out, or nothing."""
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text("utf-8"))
        return kept if isinstance(kept, dict) else {}
    return {}


def keep(path: Path, values: dict) -> None:
    """Write it down where that is possible."""
    with contextlib.suppress(OSError):
        write_bytes(path, json.dumps(values).encode())


def literal(data: bytes) -> bytes:
    """How `data` stands between double quotes in a Latin-1 source."""
    for raw, escaped in ((b"\\", rb"\\"), (b'"', rb"\""), (b"\n", rb"\n"), (b"\r", rb"\r")):
        data = data.replace(raw, escaped)
    return re.sub(rb"\0(?=[0-7])", rb"\\x00", data).replace(b"\0", rb"\0")


def packed(source: str) -> bytes:
    """The program compressed into a loader that runs it, its lines known to tracebacks and inspect."""
    return LOADER % literal(bz2.compress(source.encode(), 9))  # 1.6 % smaller than lzma's best


def counted_files(config: Config) -> dict[str, bytes]:
    """The code of a run folder, by its path in it: train_gpt.py counts; source/train_gpt.py, if any, does not."""
    source = readable(config)
    if config.track not in PACKED_TRACKS:
        return {"train_gpt.py": source.encode()}
    return {"train_gpt.py": packed(minified(source)), "source/train_gpt.py": source.encode()}


def code_bytes(config: Config) -> int:
    """Bytes of code that a run folder will count, to within the few by which configurations of a track differ.

    Found once for each state of the source and kept in a file: minifying takes a second.
    """
    state = hashlib.sha256(config.track.encode())
    for path in (*source_files(), Path(__file__)):
        state.update(path.read_bytes())
    known = read_kept(SIZES)
    found = known.get(config.track)
    if not isinstance(found, list) or found[:1] != [state.hexdigest()] or type(found[-1]) is not int:
        found = [state.hexdigest(), len(counted_files(config)["train_gpt.py"])]
        keep(SIZES, {**known, config.track: found})
    return found[1]
