"""The benchmark works: each row that this machine can run has figures, the others a note, and rows stay."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

CUDA_ONLY = ["1d"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two calls leave in one folder."""
    out = tmp_path_factory.mktemp("bench")
    for rows in ("1d", "1,2,3,4,6,7"):
        words = ["--quick", "--device=cpu", f"--rows={rows}", f"--out={out}"]
        command = [sys.executable, "tests/bench.py", *words]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=300)
        assert run.returncode == 0, run.stderr
    return out


@pytest.mark.parametrize("row", list("123467"))
def test_a_row_has_figures(folder, row):
    (path,) = folder.glob(f"row-{row}-*.json")
    kept = json.loads(path.read_text())
    assert not any(note.startswith("not measured") for note in kept["notes"]), kept["notes"]
    assert kept["results"] and all(r["ms"] > 0 and r["first_s"] > 0 for r in kept["results"])


@pytest.mark.parametrize("row", CUDA_ONLY)
def test_a_row_that_cannot_run_is_a_note(folder, row):
    (path,) = folder.glob(f"row-{row}-*.json")
    kept = json.loads(path.read_text())
    assert not kept["results"] and "not measured: it needs CUDA" in kept["notes"]


def test_the_report_has_the_rows_of_both_calls(folder):
    text = (folder / "bench.md").read_text()
    for row in [*"123467", *CUDA_ONLY]:
        assert text.count(f"## Row {row}: ") == 1
