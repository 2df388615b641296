"""The run's page: what is on it is what the folder holds, and a stranger's folder does no harm."""

from __future__ import annotations

import html
import json
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf import charts, report
from golf.errors import UsageError
from tests.conftest import ROOT, run

KEPT = next((ROOT / "runs").glob("*laptop-seed1*"))


def words_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def test_the_page_tells_score_size_curves_checks_and_origin():
    record = json.loads((KEPT / "submission.json").read_text())
    page = report.page(report.read(KEPT))
    told = words_of(page)
    assert f"{record['val_bpb']:.4f}" in told and f"{record['bytes_total']:,}" in told
    assert "212 bytes under the cap" in told
    for caption in ("Nats a token over seconds", "Nats a token over tokens", "Bits a byte over tokens", "Learning rate",
                    "Passes through the core", "Tokens a second", "Gradient norm", "bytes of code and artifact",
                    "at each number of loops", "Verdict: valid"):  # fmt: skip
        assert caption in told, caption
    verdict = json.loads((KEPT / "verdict.json").read_text())
    assert all(check["check"] in told for check in verdict["checks"]) and page.count('class="passed"') == 16
    assert record["environment"]["commit"] in told and "train_gpt.py laptop" in told
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")


def test_tiles_are_the_bytes_on_disk():
    page = report.page(report.read(KEPT))
    sizes = [int(v.replace(",", "")) for v in re.findall(r"<title>[^:<]*: ([\d,]+) bytes", page)]
    assert sum(sizes) == sum((KEPT / n).stat().st_size for n in ("model.bin", "train_gpt.py"))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
def test_a_treemap_fills_its_frame_with_areas_that_are_the_sizes(sizes):
    svg = charts.treemap([charts.Tile(f"t{n}", size, "#fff") for n, size in enumerate(sizes)])
    boxes = [tuple(map(float, b)) for b in
             re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)]  # fmt: skip
    assert len(boxes) == len(sizes)
    frame = 640 * 300
    for (x, y, w, h), size in zip(boxes, sorted(sizes, reverse=True), strict=True):
        assert x + w <= 640.2 and y + h <= 300.2
        assert abs(w * h - frame * size / sum(sizes)) <= 0.06 * (w + h) + 0.01  # coordinates have a tenth


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e3))
def test_ticks_are_round_numbers_inside(low, share):
    size = share * max(1.0, abs(low))
    high = low + size
    found = charts.ticks(low, high)
    assert len(found) <= 7 and all(low - 1e-6 * size <= v <= high + 1e-6 * size for v in found)


def test_another_run_stands_beside_it_with_every_option_that_differs(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(KEPT, other)
    record = json.loads((other / "submission.json").read_text())
    record["val_bpb"] += 0.1
    record["config"]["recipe"]["matrix_rate"] = 0.125
    (other / "submission.json").write_text(json.dumps(record))
    done = run("record.py", "report", KEPT, "--against", other, "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    told = words_of((tmp_path / "page.html").read_text())
    assert "recipe.matrix_rate" in told and "0.125" in told and "-0.1" in told and "the other" in told


def test_runs_of_other_texts_are_said_to_compare_nothing(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(KEPT, other)
    record = json.loads((other / "submission.json").read_text())
    assert "compare nothing" not in report.page(report.read(KEPT), report.read(other))
    (other / "submission.json").write_text(json.dumps(record | {"corpus_fingerprint": "x", "training_flops": 12}))
    page = words_of(report.page(report.read(KEPT), report.read(other)))
    assert "of different texts: scores compare nothing" in page and "e+" not in page.split("Learning")[0]


def test_a_strangers_folder_is_shown_escaped_and_without_its_scripts(tmp_path):
    nasty = "</title><script>alert(1)</script><img src=x onerror=alert(2)>"
    record = json.loads((KEPT / "submission.json").read_text())
    record |= {"name": nasty, "blurb": nasty, "environment": {nasty: nasty}, "quantization_penalty": {nasty: 0.1}}
    (tmp_path / "submission.json").write_text(json.dumps(record))
    rows = [{"event": "start", "command": [nasty], "config": {}}, {"event": "step", "step": nasty, "loss": "x"},
            {"event": "step", "step": 1, "loss": 3.0, "elapsed": 1.0, "ms": 0}, {"event": "passes", "step": 1,
             "state_norms": [1.0, "x"]}, {"event": "packed", "bits": {nasty: 3.0, "embedding": "x"}}]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "{torn")
    (tmp_path / "verdict.json").write_text(json.dumps(
        {"valid": False, "invalid": nasty, "checks": [{"check": nasty, "status": nasty, "evidence": nasty}]}
    ))  # fmt: skip
    page = report.page(report.read(tmp_path))
    assert "<script" not in page and "<img" not in page and "INVALID" in page and nasty in html.unescape(page)


def test_numbers_that_no_picture_has_room_for_are_left_out(tmp_path):
    record = json.loads((KEPT / "submission.json").read_text())
    record |= {"environment": {}, "config": record["config"] | {"recipe": {"batch_tokens": "x"}}}
    (tmp_path / "submission.json").write_text(json.dumps(record))
    huge = "9" * 400
    (tmp_path / "log.jsonl").write_text(
        '{"event": "start", "environment": ["x"], "command": ["x"], "config": {}}\n'
        f'{{"event": "step", "step": [1], "loss": {huge}, "elapsed": {huge}, "ms": {huge}}}\n'
        f'{{"event": "passes", "step": [], "state_norms": [{huge}, NaN]}}\n'
        f'{{"event": "validation", "step": {{}}, "val_bpb": {huge}, "val_loss": Infinity}}\n'
        '{"event": "packed", "bits": {"embedding": Infinity, "blocks.0.attn.query": -1e308}}\n'
    )
    assert "Where it comes from" in report.page(report.read(tmp_path))


def test_a_run_that_has_not_ended_has_a_page_and_no_run_has_none(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": "step", "step": 1, "loss": 3.0, "elapsed": 1.0}) + "\n")
    assert "unfinished" in words_of(report.page(report.read(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no run folder"):
        report.read(tmp_path / "empty")
