"""The study and its controls, on tiny networks: its plain loop trains as train.py does, what is added changes
nothing at first and leaves the rest alone, its figures are what they say, and the whole program runs."""

import math
import statistics
from functools import partial

import controls
import pytest
import study
import torch
from conftest import old_text, table

import data
import eval as ev
import grow
import train
from model import GPT, GPTConfig

SHORT = "--block_size=32 --batch_size=4 --eval_every=6 --eval_windows=8 --test_windows=8 --device=cpu".split()


@pytest.fixture
def base(tmp_path, text):
    """A tiny network that was trained for a moment, and the words of a run that goes on from it."""
    shape = f"--n_layer=2 --n_embd=16 --dataset={old_text(text)} --max_steps=4 --out={tmp_path}/base".split()
    train.main(["pretrain", *shape, *SHORT])
    texts = [f"--init={tmp_path}/base/model", f"--dataset={text}", f"--retain={old_text(text)}"]
    return ["demo", *texts, "--max_steps=12", *study.PLAIN.split(), *SHORT]


GROWTH = "--max_growths=2 --grow_every=5 --where=spread"


@pytest.mark.parametrize("words", [
    "", f"{GROWTH} --kd_on=generated --kd_weight=1 --generated=32", "--kd_on=retain --kd_weight=0.5",
    f"{GROWTH} --replay=0.25", f"{GROWTH} --freeze=none --ewc_lambda=30",
])  # fmt: skip
def test_plain_loop_trains_as_train(tmp_path, base, words):
    """Same losses, to the last bit."""
    words = [*base, *words.split()]
    train.main([*words, f"--out={tmp_path}/a"])
    result, found = ev.read_run(tmp_path / "a")["result"], study.run(train.parse(words))
    for key in ("learn", "retain"):
        assert (result[key]["base"], result[key]["grown"]) == (found[f"{key}_before"], found[key])
        assert result[key]["mixed"] in (None, found[f"{key}_mixed"])  # train.py mixes what it has inside
        assert result[key]["kl"] == found[f"{key}_kl"]
    assert found["trainable"] == result["trainable"] and found["flops"] == result["flops"]
    kept = result["retain"]["mixed"] is not None
    assert found["stored"] == result["parameters"] if kept else found["stored"] > result["parameters"]


CHANGES = {
    "fork": partial(controls.fork, blocks=[1, 3]),
    "LoRA": controls.lora,
    "widened": controls.widen,
    "widened, copied": partial(controls.widen, copied=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_added_changes_nothing_at_first_and_leaves_the_rest_alone(change):
    torch.manual_seed(0)
    config = GPTConfig(257, 32, 4, 32, (0,) * 4)
    before, model = GPT(config), GPT(config)
    model.load_state_dict(before.state_dict())
    x = torch.randint(257, (2, 32))
    CHANGES[change](model)
    rounding = 1e-5 if change == "widened, copied" else 0  # two halves add up
    assert (model(x)[0] - before(x)[0]).abs().max() <= rounding
    trains, C = grow.trainable(model), config.n_embd
    assert sum(p.numel() for p in trains) == pytest.approx(2 * (12 * C * C + 13 * C), rel=0.05)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = grow.make_optimizer(model, 1e-2, 0.1)
    for _ in range(2):
        model(x)[0].square().mean().backward()
        assert change == "LoRA" or all(p.grad is not None for p in trains)
        optimizer.step()
    now = dict(model.named_parameters())
    assert frozen and all(torch.equal(now[name], p) for name, p in frozen.items())
    assert not torch.allclose(model(x)[0], before(x)[0])


def test_learning_rate_is_better_than_its_neighbours(tmp_path, monkeypatch):
    """By validation loss, from 8e-3 on to both sides; a run that diverges loses."""
    losses = {0.001: 2.0, 0.002: 1.5, 0.004: 1.6, 0.008: 1.7, 0.016: math.inf}
    asked = []

    def run(self, arm, lr, seed):
        asked.append((lr, seed))
        return {"val": losses[lr], "seed": seed, "lr": lr}

    monkeypatch.setattr(study.Study, "run", run)
    runs = study.Study(tmp_path).do(study.Arm("full"))
    assert [found["lr"] for found in runs] == [0.002] * 3 and [found["seed"] for found in runs] == [0, 1, 2]
    assert {lr for lr, _ in asked} == set(losses)


def test_figures():
    def runs(*learns):
        rest = dict(retain=1, retain_before=1, learn_mixed=1, retain_mixed=1, learn_kl=0)
        rest |= dict(lr=1, steps=1, trainable=1, stored=1, flops=1)
        return [dict(learn=learn, **rest) for learn in learns]

    a, b, c = runs(1.0, 1.2, 1.1), runs(1.1, 1.5), runs(9)
    sigma = study.sigma({"a": a, "b": b, "c": c}, "learn")
    assert sigma == pytest.approx(math.sqrt((0.01 + 0.08) / 2))  # sample variances; c has none
    # b varies by 0.283, a by 0.1 or, where all arms do, by more; c's one run by what all do
    assert (
        study.differs(a, runs(0.6, 0.8), "learn", 0.1) == "+0.400"
    )  # 2 sqrt(0.1^2 / 3 + 0.141^2 / 2) = 0.231
    assert study.differs(a, runs(0.6, 0.8), "learn", 0.3) == "="  # 2 sqrt(0.3^2 / 3 + 0.3^2 / 2) = 0.548
    assert study.differs(a, b, "learn", 0.1) == "="  # 2 sqrt(0.1^2 / 3 + 0.283^2 / 2) = 0.416
    assert study.differs(c, a, "learn", 0.1) == "+7.900"
    runs_of = {"full": c, "full, long": runs(5, 5), "grow 4, long": runs(6, 6)}
    assert "(+1.000)" in study.arms_table(
        [study.Arm("grow 4, long")], runs_of, {"learn": 0.1}
    )  # long to long
    up = {name: [dict(run, learn_kl=run["learn"]) for run in found] for name, found in (("a", a), ("c", c))}
    assert study.rank_correlation(up, "learn", "KL on new text") == pytest.approx(1)


def test_the_whole_study_runs(tmp_path, monkeypatch):
    """Few arms on a tiny base. Mixed with the network before it, no arm predicts a window of 31 tokens worse
    than either by more than ln 4; at equal operations it costs what full fine-tuning costs."""
    monkeypatch.setattr(study, "BASES", {study.SMALL: "--n_layer=2 --n_embd=16"})
    named = {arm.name: arm for arm in study.all_arms() if arm.base == study.SMALL}
    one_seed = "full + new text 0.3"
    chosen = ["full", "fork 2", "LoRA", "widened, copied", "grow 2", "full + new text 1", one_seed]
    equal = named["grow 2, equal operations"]
    sections = {"Learning and forgetting": [named[name] for name in chosen], "Equal": [equal], "Missing": []}
    monkeypatch.setattr(study, "sections", lambda: sections)
    monkeypatch.setattr(study.Study, "lr", lambda self, arm: 0.008)
    words = "--max_steps=6 --block_size=32 --batch_size=4 --eval_every=3 --eval_windows=2 --test_windows=4"
    tiny = study.Study(tmp_path, words)
    runs_of = {arm.name: tiny.do(arm) for arm in study.all_arms()}
    assert [len(runs) for runs in runs_of.values()] == [3, 3, 3, 3, 3, 3, 1, 3]
    for found in (found for runs in runs_of.values() for found in runs):
        for key in ("learn", "retain"):
            assert found[f"{key}_mixed"] <= min(found[f"{key}_before"], found[key]) + math.log(4) / 31
            assert found[f"{key}_mixed"] not in (found[f"{key}_before"], found[key])
    full, grown = runs_of["full"][0], runs_of["grow 2"][0]
    steps = runs_of[equal.name][0]["steps"]
    assert steps < 6 and abs(steps * grown["flops"] / 6 - full["flops"]) < grown["flops"] / 6
    study.write(tiny)
    text = (tmp_path / "tables.md").read_text()
    found = {row["arm"]: row for row in table(text, "KL on new text")}
    assert found.keys() == runs_of.keys() - {equal.name} and equal.name in text and "nan" not in text
    mean = statistics.mean(found["learn"] for found in runs_of["LoRA"])
    assert found["LoRA"]["learn"].startswith(f"{mean:.3f} ± ") and found["full"]["learn"].endswith("(=)")
    (full,) = [row for row in table(text, "validation") if row["arm"] == "full"]
    assert full["validation"] == f"{runs_of['full'][0]['val']:.3f}" and full["lr"] == "0.008"
    assert all((tmp_path / f"study-{name}.png").exists() for name in ("alone", "mixed"))
    monkeypatch.setattr(study, "run", None)  # all is there, and nothing is done again
    assert [tiny.do(arm) for arm in study.all_arms()] == list(runs_of.values())
    tiny.file(named["LoRA"], 0.008, 1).unlink()
    study.write(tiny)  # what is missing is left out
    text = (tmp_path / "tables.md").read_text()
    assert "LoRA" not in text.partition("## What the rate does")[0] and "(6 of 7 arms)" in text
    monkeypatch.setattr(study, "PLAIN", "--max_growths=0")
    with pytest.raises(data.UserError, match="full-0.008-0.json"):  # it was made by other words
        tiny.do(named["full"])
