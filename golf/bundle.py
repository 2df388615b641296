"""The code of a submission: which files are counted, and how they lie in a run folder."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COUNTED = ("__init__", "config", "model", "muon", "data", "codec", "bpb", "clock", "machine")
MODULES = "golf.zip"
# The copy in a run folder finds its modules in the archive beside it.
PROLOGUE = b"import sys\nfrom os.path import dirname\nsys.path.insert(0, (dirname(__file__) or '.') + '/golf.zip')\n"
EPOCH = (2026, 1, 1, 0, 0, 0)


def counted_files() -> dict[str, bytes]:
    """The code as it ships: train_gpt.py, and the counted modules in one archive. Same source, same bytes."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for name in COUNTED:
            out.writestr(
                zipfile.ZipInfo(f"golf/{name}.py", EPOCH),
                (ROOT / "golf" / f"{name}.py").read_bytes(),
                zipfile.ZIP_DEFLATED,
            )
    source = (ROOT / "train_gpt.py").read_bytes()
    head, future, rest = source.partition(b"from __future__ import annotations\n")
    return {"train_gpt.py": head + future + PROLOGUE + rest, MODULES: archive.getvalue()}


def code_bytes() -> int:
    """Bytes of code that a run folder will hold."""
    return sum(len(data) for data in counted_files().values())
