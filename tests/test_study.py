"""The study and its controls, on tiny networks: the plain loop trains as train.py does, what is added starts
at zero and leaves the rest alone, the figures are what they say, and the whole program runs to its end."""

import math

import controls
import pytest
import study
import torch
from conftest import old_text, table

import eval as ev
import train
from model import GPT

SHORT = "--block_size=32 --batch_size=4 --eval_every=4 --eval_windows=8 --test_windows=8 --device=cpu".split()


@pytest.fixture
def base(tmp_path, text):
    """A tiny network that was trained for a moment, and the words of a run that goes on from it."""
    shape = f"--n_layer=2 --n_embd=16 --dataset={old_text(text)} --max_steps=4 --out={tmp_path}/base".split()
    train.main(["pretrain", *shape, *SHORT])
    texts = [f"--init={tmp_path}/base/model", f"--dataset={text}", f"--retain={old_text(text)}"]
    return ["demo", *texts, "--max_steps=12", "--kd_weight=0", *SHORT]


def test_plain_loop_gives_the_curve_of_train(tmp_path, base):
    train.main([*base, "--max_growths=0", f"--out={tmp_path}/a"])
    controls.main(["full", *base, f"--out={tmp_path}/b"])
    a, b = ev.read_run(tmp_path / "a"), ev.read_run(tmp_path / "b")
    assert len(a["eval"]) == len(b["eval"]) == 4
    assert all(row.items() <= a_row.items() for row, a_row in zip(b["eval"], a["eval"]))
    for key in ("learn", "retain", "flops", "trainable", "parameters", "tokens"):
        assert a["result"][key] == b["result"][key]


@pytest.mark.parametrize("method", ["lora", "widened"])
def test_what_is_added_starts_at_zero_and_leaves_the_rest_alone(tmp_path, base, method):
    controls.main([method, *base, f"--out={tmp_path}/a"])
    train.main([*base, "--first_growth=0", "--grow_every=1", "--max_growths=2", f"--out={tmp_path}/b"])
    a, b = ev.read_run(tmp_path / "a"), ev.read_run(tmp_path / "b")
    assert a["eval"][0]["learn"] == b["eval"][0]["learn"] and a["eval"][-1]["learn"] < a["eval"][0]["learn"]
    assert a["result"]["trainable"] == pytest.approx(b["result"]["trainable"], rel=0.1)
    before = GPT.from_pretrained(tmp_path / "base/model").state_dict()
    if method == "lora":
        after = GPT.from_pretrained(tmp_path / "a/model").state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {f"h.{i}.{m}.weight" for i in (0, 1)
                         for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip


def test_figures():
    assert study.differs([1.0, 1.2], [1.0, 1.1]) == "="  # 0.05 with a standard deviation of 0.07
    assert study.differs([2.0, 2.2], [1.0, 1.1]) == "+1.050 ± 0.071"
    assert study.differs([1.0], [2.0]) == "one seed"
    evals = [{"step": s, "learn": a, "retain": b} for s, a, b in ((0, 3, 1), (50, 2, 1.5), (100, 1, 1.2))]
    assert study.at_operations({"eval": evals, "result": {"flops": 10}}, 5) == (2, 0.5)


def test_the_whole_study_runs(tmp_path, monkeypatch, capsys):
    """On one base, with each way to keep the old once. An arm mixed with the network before it, inside or
    stored beside it, predicts no window of 31 tokens worse than either by more than ln 4."""
    cures = ["--kd_weight=1 --kd_on=generated --generated=8", "--replay=0.25", "--ewc_lambda=10"]
    monkeypatch.setattr(study, "CURES", dict(zip(("generative replay", "replay", "EWC"), cures)))
    monkeypatch.setattr(study, "QUICK", study.QUICK._replace(bases={"2x64": study.QUICK.bases["2x64"]}))
    words, arms = ["--quick", f"--out={tmp_path}"], study.arms_on("2x64")
    assert len(arms) == len(study.ARMS) + 6
    study.main(words)
    text = (tmp_path / "study.md").read_text()
    assert "nan" not in text.lower() and (tmp_path / "study-2x64.png").exists()
    found = {row["arm"]: row for row in table(text, "mixed: learn")}
    assert found.keys() == arms.keys()
    for arm, row in found.items():
        run = study.read(study.arm_path(tmp_path, "2x64", arm, 0), study.base_path(tmp_path, "2x64"))
        for name in ("learn", "retain"):
            r = run["result"][name]
            assert r["mixed"] <= min(r["base"], r["grown"]) + math.log(4) / 31
            assert r["mixed"] not in (r["base"], r["grown"])
        assert row["mixed: learn"] == f"{run['result']['learn']['mixed']:.3f} (one seed)"
    stored = {arm: int(row["stored"].replace(",", "")) for arm, row in found.items()}
    assert stored["full"] == 2 * int(found["full"]["trainable"].replace(",", ""))
    assert stored["grow 2"] == ev.read_run(tmp_path / "2x64/grow-2-seed0")["result"]["parameters"]
    capsys.readouterr()
    study.main(words)  # all is done, and nothing is done again
    assert capsys.readouterr().out.startswith("written:")
    assert (tmp_path / "study.md").read_text() == text
