"""The study and its controls, on tiny networks: the plain loop trains as train.py does, what is added starts
at zero and leaves the rest alone, the figures are what they say, and the whole program runs to its end."""

import copy

import controls
import numpy as np
import pytest
import study
import study_runs
import torch
import torch.nn.functional as F
from conftest import BYTES, old_text, tiny_gpt

import eval as ev
import grow
import train
from model import GPT

SHORT = "--block_size=32 --batch_size=4 --eval_every=4 --eval_windows=8 --test_windows=8 --device=cpu".split()


@pytest.fixture
def base(tmp_path, text):
    """A tiny network that was trained for a moment, and the words of a run that goes on from it."""
    shape = f"--n_layer=2 --n_embd=16 --dataset={old_text(text)} --max_steps=4 --out={tmp_path}/base".split()
    train.main(["pretrain", *shape, *SHORT])
    texts = [f"--init={tmp_path}/base/model", f"--dataset={text}", f"--retain={old_text(text)}"]
    return ["demo", *texts, "--max_steps=12", *SHORT]


def test_plain_loop_gives_the_curve_of_train(tmp_path, base):
    train.main([*base, "--max_growths=0", f"--out={tmp_path}/a"])
    controls.main(["full", *base, f"--out={tmp_path}/b"])
    a, b = ev.read_run(tmp_path / "a"), ev.read_run(tmp_path / "b")
    assert a["eval"] == b["eval"] and len(a["eval"]) == 4
    for key in ("learn", "retain", "flops", "trainable", "parameters", "tokens"):
        assert a["result"][key] == b["result"][key]


@pytest.mark.parametrize("method", ["lora", "widened"])
def test_what_is_added_starts_at_zero_and_leaves_the_rest_alone(tmp_path, base, method):
    controls.main([method, *base, f"--out={tmp_path}/a"])
    train.main([*base, "--first_growth=0", "--grow_every=1", "--max_growths=2", f"--out={tmp_path}/b"])
    a, b = ev.read_run(tmp_path / "a"), ev.read_run(tmp_path / "b")
    assert a["eval"][0] == b["eval"][0] and a["eval"][-1]["learn"] < a["eval"][0]["learn"]
    assert a["result"]["trainable"] == pytest.approx(b["result"]["trainable"], rel=0.1)
    before = GPT.from_pretrained(tmp_path / "base/model").state_dict()
    if method == "lora":
        after = GPT.from_pretrained(tmp_path / "a/model").state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {f"h.{i}.{m}.weight" for i in (0, 1)
                         for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip


@pytest.mark.parametrize("count", [0, 7])
def test_mixed_losses_are_those_of_the_windows(count):
    """The last window is a shorter one."""
    nets = [tiny_gpt(vocab_size=BYTES, seed=seed) for seed in (0, 1)]
    tokens = np.random.default_rng(0).integers(0, BYTES, 16 * 20 + 5).astype(np.uint16)
    scale = study_runs.QUICK._replace(windows=count, context=16)
    found, each = study_runs.mixed_losses(nets, tokens, scale, (0, 0.01)), []
    for window in torch.from_numpy(tokens.astype(np.int64)).split(16)[: count or None]:
        with torch.no_grad():
            losses = [
                F.cross_entropy(net(window[None, :-1])[0][0], window[1:], reduction="none") for net in nets
            ]
        each.append(torch.stack(losses)[:, None])  # (2, 1, T - 1)
    alone = torch.cat(each, -1).mean((1, 2)).tolist()
    for share in (0, 0.01):
        mixed = torch.cat([grow.mix(losses, share) for losses in each], -1).mean().item()
        assert found[str(share)] == pytest.approx([*alone, mixed], abs=1e-6)


def test_the_dial_leads_from_base_to_tuned():
    base = tiny_gpt(vocab_size=BYTES)
    tuned = copy.deepcopy(base)
    grow.insert_block(tuned, 2)
    tuned.config.versions = (1,)  # as a run that froze nothing leaves it
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.1 * torch.randn_like(p)
    x = torch.randint(BYTES, (2, 16))
    ends = [study_runs.between(base, tuned, alpha)(x)[0] for alpha in (0, 1)]
    torch.testing.assert_close(ends, [base(x)[0], tuned(x)[0]])


def test_figures():
    assert study.differs([1.0, 1.2], [1.0, 1.1]) == "="  # 0.05 with a standard deviation of 0.07
    assert study.differs([2.0, 2.2], [1.0, 1.1]) == "+1.050 ± 0.071"
    assert study.differs([1.0], [2.0]) == "one seed"
    assert study.mean_sd(["not reached", 1.0, "not reached"]) == "not reached (2 of 3 seeds)"
    points = [[3.0, 0.0], [2.0, 0.1]]  # straight: a tenth of the way at 0.01
    assert study.lowest_at(points, 0.01) == pytest.approx(2.9)
    assert study.hypervolume(points) == pytest.approx(0.1 * 0.5 + 0.15 * 1.0, rel=0.01)
    evals = [{"step": s, "learn": a, "retain": b} for s, a, b in ((0, 3, 1), (50, 2, 1.5), (100, 1, 1.2))]
    assert study.retained_at(evals, 1.5, 50) == pytest.approx(0.35)
    assert study.retained_at(evals, 2.5, 50) == "early"
    assert study.retained_at(evals, 0.5, 50) == "not reached"
    run = {"eval": evals, "result": {"flops": 10}}
    assert study.at_operations(run, 5) == (2, 0.5)


def test_windows_change_text_in_the_middle():
    mixed = study_runs.switching(np.arange(100), np.arange(1000, 1100), 4)
    assert mixed[:8].tolist() == [0, 1, 1000, 1001, 2, 3, 1002, 1003]


def test_the_whole_study_runs(tmp_path, monkeypatch):
    """Each way to keep the old at one strength, and one of the arms that only the demo's base has."""
    for cure in list(study_runs.CURES)[1::2]:
        monkeypatch.delitem(study_runs.CURES, cure)
        for method in ("full", "grow 2"):
            monkeypatch.delitem(study_runs.CURED, f"{method} + {cure}")
    for arm in list(study_runs.EXTRA)[1:]:
        monkeypatch.delitem(study_runs.EXTRA, arm)
    study.main(["--quick", f"--out={tmp_path}/study"])
    text = (tmp_path / "study/study.md").read_text()
    assert "NaN" not in text and (tmp_path / "study/study.png").exists()
    for arm in study_runs.ARMS | study_runs.CURED:
        assert f"| {arm} " in text
    for part in text.split("\n## ")[1:]:
        assert "`" in part, "a table without its command"
    study.main(["--quick", f"--out={tmp_path}/study"])  # all is done, and nothing is done again
    assert (tmp_path / "study/study.md").read_text() == text
