"""The benchmark works: each row that this machine can run has figures, the others a note, and rows stay."""

import json

import bench
import pytest

ROWS = ["1", "1d", "2", "3", "4", "5", "6", "7", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a call leaves in a folder that has a row of an earlier one. Row 1d needs CUDA."""
    out = tmp_path_factory.mktemp("bench")
    (out / "row-0-cpu.json").write_text('{"title": "Row 0: earlier", "notes": [], "results": []}')
    bench.main(["--quick", "--device=cpu", f"--rows={','.join(ROWS)}", f"--out={out}"])
    text = (out / "bench.md").read_text()
    assert all(text.count(f"## Row {row}: ") == 1 for row in ("0", *ROWS))
    return out


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_figures_or_a_note(folder, row):
    (path,) = folder.glob(f"row-{row}-*.json")
    kept = json.loads(path.read_text())
    missing = [note for note in kept["notes"] if note.startswith("not measured")]
    if row == "1d":
        assert missing == ["not measured: it needs CUDA"] and not kept["results"]
    else:
        assert not missing and kept["results"]
        assert all(r["ms"] > 0 and r["first_s"] > 0 for r in kept["results"])
