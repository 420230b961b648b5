"""Every number that a run or eval.py reports, against an oracle that is not ours.

    python -m pytest tests/test_tables.py -q

There are three oracles. First, tables of a log that was written by hand: its numbers are so round that each
cell can be worked out in the head, and the cell stands beside it. Second, Hugging Face's GPT2LMHeadModel for
losses, KL and greedy text, and torch's FlopCounterMode on that network for operations. Third, networks whose
weights were set by hand, so that their answers are known before they are asked.

The program is touched only through train.main, eval.main and the files of a run folder. Tables are read by
the heads of their columns, so a new column or another width changes nothing here."""

import contextlib
import io
import json
import math
import random
import re
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_words
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import data
import eval as ev
import train


def tables(text):
    """All Markdown tables of a text, each a list of rows, each row a dict {head of the column: cell}.

    Where a head stands several times, the second is called "head (2)", the third "head (3)".
    """
    found, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            names = []
            for name in lines[0]:
                seen = sum(known.split(" (")[0] == name for known in names)
                names.append(f"{name} ({seen + 1})" if seen else name)
            # lines[1] is the rule below the heads
            found.append([dict(zip(names, cells)) for cells in lines[2:]])
            lines = []
    return found


def table(text, head):
    """The rows of the first table that has a column of this head."""
    return next(rows for rows in tables(text) if head in rows[0])


def assert_cells(row, **expected):
    """The row has these cells. (It may have more: a table may gain a column.)"""
    assert {head: row[head] for head in expected} == expected


# ------------------------------------------------------------------------------------------------------------
# A log written by hand

CONFIG = dict(init="gpt2", dataset="new", retain="old", block_size=128, max_steps=900, batch_size=8,
              grad_accum=1, lr=1e-3, seed=0, trigger="schedule", grow_every=300, first_growth=300,
              max_growths=2, where="upper", block_init="copy", freeze="older", eval_windows=2)  # fmt: skip

# Two growths, at steps 300 and 600. Under `older` only the newest block trains, so at each growth the
# parameters added are the parameters that train. (Both deltas are impossible in a run, which would stop: here
# they show that the table subtracts.)
GROWN = [
    dict(kind="header", command="python train.py --dataset=new", presets=["keep"], typed={"seed": 3},
         config=CONFIG, versions={"torch": "2"},
         machine=[], processes=1, init_sha256="00", layers=4, parameters=10_000_000, vocab_size=257,
         tokens={"learn": {"train": 5000, "val": 300, "test": 300},
                 "retain": {"train": 6000, "val": 400, "test": 400}}),
    dict(kind="step", step=0, loss=4.25, kd=0.0, ewc=0.0, lr=1e-3, norm=1.0, ms=500.0),
    dict(kind="eval", step=0, learn=4.0, retain=1.0),
    dict(kind="eval", step=100, learn=3.9, retain=1.1),
    dict(kind="eval", step=200, learn=3.5, retain=1.2),
    dict(kind="eval", step=300, learn=3.4, retain=1.3),
    dict(kind="event", step=300, at=3, generation=1, layers_before=4, layers_after=5,
         parameters_added=2_000_000, parameters=12_000_000, trainable=2_000_000, flops=1.5e12,
         tokens=307_200, learn_before=3.4, learn_after=3.65, retain_before=1.3, retain_after=1.3),
    dict(kind="eval", step=400, learn=3.0, retain=1.3),
    dict(kind="eval", step=500, learn=2.9, retain=1.4),
    dict(kind="eval", step=600, learn=2.5, retain=1.4),
    dict(kind="event", step=600, at=2, generation=2, layers_before=5, layers_after=6,
         parameters_added=4_000_000, parameters=16_000_000, trainable=4_000_000, flops=2.25e12,
         tokens=614_400, learn_before=2.5, learn_after=2.0, retain_before=1.4, retain_after=1.4),
    dict(kind="eval", step=700, learn=2.3, retain=1.5),
    dict(kind="eval", step=800, learn=2.2, retain=1.6),
    dict(kind="eval", step=900, learn=2.2, retain=1.6),
    dict(kind="result", layers=6, parameters=16_000_000, trainable=4_000_000, flops=1234.5e12, tokens=921_600,
         best=2.2, train_seconds=5400.0, seconds=5430.0, protocol="Test split.", versions=[0, 2],
         learned=["old", "new"],
         learn=dict(dataset="new", windows=40, base=4.0, grown=2.0, mixed=2.125, kl=0.25),
         retain=dict(dataset="old", windows=20, base=1.0, grown=1.5, mixed=1.0625, kl=0.125)),
]  # fmt: skip
# How much each of its six blocks changes what passes. The first growth ended up at index 4, the second at 2.
USE = [0.5, 0.5, 0.25, 0.5, 0.125, 0.5]

# An ordinary training run without an old text, and one in which the loss on the old text fell.
PLAIN = [
    {**GROWN[0], "config": {**CONFIG, "retain": "none", "max_growths": 0}, "layers": 3,
     "parameters": 9_000_000},
    dict(kind="eval", step=0, learn=3.0, retain=None),
    dict(kind="eval", step=900, learn=2.5, retain=None),
    dict(kind="result", layers=3, parameters=9_000_000, trainable=8_000_000, flops=0.5e12, tokens=921_600,
         best=2.5, train_seconds=30.0, seconds=42.0, protocol="Test split.", versions=[0],
         learned=["new"],
         learn=dict(dataset="new", windows=40, base=3.0, grown=2.5, mixed=None, kl=0.75),
         retain=dict(dataset="none", windows=None, base=None, grown=None, mixed=None, kl=None)),
]  # fmt: skip
KEPT = [
    *PLAIN[:-1],
    {**PLAIN[-1], "learn": dict(dataset="new", windows=40, base=1.5, grown=3.0, mixed=None, kl=0.0625),
     "retain": dict(dataset="old", windows=20, base=2.0, grown=1.75, mixed=None, kl=0.03125)},
]  # fmt: skip


@pytest.fixture(scope="module")
def logs(tmp_path_factory, run):
    """Three run folders, of which only the log is there: {name: folder}."""
    folder = tmp_path_factory.mktemp("logs")
    # Of block_use only the values are written here; whether it lists all blocks or names the grown ones by
    # their generation is taken from a log that the program wrote.
    by_block = isinstance(run.result["block_use"], list)
    grown = USE if by_block else {"1": USE[4], "2": USE[2]}
    plain = USE[:3] if by_block else {}
    written = {"grown": (GROWN, grown), "plain": (PLAIN, plain), "kept": (KEPT, plain)}
    for name, (rows, use) in written.items():
        (folder / name).mkdir()
        lines = [json.dumps(row) for row in [*rows[:-1], {**rows[-1], "block_use": use}]]
        (folder / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return {name: str(folder / name) for name in written}


def printed_by(program, *argv):
    """What train.main or eval.main prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        program([str(word) for word in argv])
    return out.getvalue()


def flat(text):
    """In one line: a sentence may be broken anywhere."""
    return " ".join(text.split())


OF_NEW = {  # of each run, its row on the new text: e^4 = 54.598, e^3 = 20.086, e^2.5 = 12.182, e^2 = 7.389
    "grown": {"loss base": "4.0000", "loss grown": "2.0000", "change": "-2.0000", "loss mixed": "2.1250",
              "change mixed": "-1.8750", "KL(base, grown)": "0.2500", "ppl base": "54.60",
              "ppl grown": "7.39", "windows": "40"},
    "plain": {"loss base": "3.0000", "loss grown": "2.5000", "change": "-0.5000", "loss mixed": "-",
              "change mixed": "-", "KL(base, grown)": "0.7500", "ppl base": "20.09", "ppl grown": "12.18",
              "windows": "40"},
    "kept": {"loss base": "1.5000", "loss grown": "3.0000", "change": "+1.5000", "KL(base, grown)": "0.0625",
             "ppl base": "4.48", "ppl grown": "20.09", "windows": "40"},  # e^1.5 = 4.482
}  # fmt: skip
OF_OLD = {  # and on the old one, where it was measured: e^1 = 2.718, e^1.5 = 4.482, e^1.75 = 5.755
    "grown": {"loss base": "1.0000", "loss grown": "1.5000", "change": "+0.5000", "loss mixed": "1.0625",
              "change mixed": "+0.0625", "KL(base, grown)": "0.1250",
              "ppl base": "2.72", "ppl grown": "4.48", "windows": "20"},
    "kept": {"loss base": "2.0000", "loss grown": "1.7500", "change": "-0.2500", "KL(base, grown)": "0.0312",
             "ppl base": "7.39", "ppl grown": "5.75", "windows": "20"},
}  # fmt: skip
LINES = {  # below the table
    "grown": "grown: 4 -> 6 layers, 10,000,000 -> 16,000,000 parameters, 4,000,000 trainable at the end; "
             "921,600 tokens, 1,234.50 TFLOP; 5430 s in all, 5400 s of them training; forgetting +0.5000 "
             "alone, +0.0625 mixed",
    "plain": "plain: 3 -> 3 layers, 9,000,000 -> 9,000,000 parameters, 8,000,000 trainable at the end; "
             "921,600 tokens, 0.50 TFLOP; 42 s in all, 30 s of them training; forgetting was not measured",
    "kept": "kept: 3 -> 3 layers, 9,000,000 -> 9,000,000 parameters, 8,000,000 trainable at the end; "
            "921,600 tokens, 0.50 TFLOP; 42 s in all, 30 s of them training; forgetting -0.2500",
}  # fmt: skip


@pytest.mark.parametrize("names", [["grown", "plain", "kept"], ["grown"], ["plain"], ["kept"]])
def test_base_against_grown(logs, names):
    """Of several runs, and of one: a row for each text that was measured, the new text first."""
    printed = printed_by(ev.main, *(logs[name] for name in names))
    expected = [("learn: new", name, OF_NEW[name]) for name in names]
    expected += [("retain: old", name, OF_OLD[name]) for name in names if name in OF_OLD]
    for row, (text, name, cells) in zip(table(printed, "change"), expected, strict=True):
        assert_cells(row, text=text, run=name, **cells)
    assert "Test split. " + " ".join(LINES[name] for name in names) in flat(printed)


def test_how_to_go_on_after_a_run(logs):
    """With what was typed, but for the network, the texts and the folder."""
    printed, folder = printed_by(ev.main, logs["grown"]), logs["grown"]
    every = f"\nEvery version on every text: python eval.py {folder} --dataset=old,new --split=test\n"
    assert every in printed
    more = f"--init={folder}/model --dataset=headers --retain=new --out={folder}-headers"
    assert printed.endswith(f"\nLearn one more and keep all: python train.py keep --seed=3 {more}\n")
    assert "Every version" not in printed_by(ev.main, logs["plain"])
    assert "keep all" not in printed_by(ev.main, logs["plain"])
    assert ev.report(ev.read_run(f"{folder}/")) == ev.report(ev.read_run(folder))  # as a shell completes it
    elsewhere = ev.read_run(folder)
    elsewhere["header"]["typed"]["cache_dir"] = "a folder"
    said = ev.report(elsewhere)
    assert f"{every.strip()} --cache_dir='a folder'\n" in said
    assert "--prompt='Once upon a time' --cache_dir='a folder'\n" in said


def test_growths_of_one_run(logs):
    """The part of the table that says what was done, and that it changed nothing."""
    first, second = table(printed_by(ev.main, logs["grown"]), "added")
    assert_cells(first, step="300", layers="4 -> 5", at="3", added="2,000,000", delta="0.25")
    assert_cells(first, **{"loss before": "3.400000", "loss after": "3.650000"})
    assert_cells(second, step="600", layers="5 -> 6", at="2", added="4,000,000", delta="-0.5")
    assert_cells(second, **{"loss before": "2.500000", "loss after": "2.000000"})


def test_scaling_of_one_run(logs):
    """Slopes are in nats per 1,000 steps. The least-squares line through losses a, b, c, d that are 100 steps
    apart falls by (3 (d - a) + (c - b)) / 1000 nats a step, so that its slope is 3 (d - a) + (c - b):

    steps   0 to 300:  4.0, 3.9, 3.5, 3.4    3 * -0.6 - 0.4 = -2.2
    steps 300 to 600:  3.4, 3.0, 2.9, 2.5    3 * -0.9 - 0.1 = -2.8
    steps 600 to 900:  2.5, 2.3, 2.2, 2.2    3 * -0.3 - 0.1 = -1.0

    Gain: from just after a growth to just before the next one (or the end), per million parameters.
    """
    printed = printed_by(ev.main, logs["grown"])
    assert "on 2 windows of the validation split" in flat(printed)  # of the three that its 300 tokens have
    first, second = table(printed, "slope after")
    assert_cells(first, step="300", tokens="307,200", **{
        "TFLOP": "1.50", "slope before": "-2.200", "slope after": "-2.800",
        "gain / M params": "+0.5750",  # (3.65 - 2.5) / 2
        "use": "0.125",
    })  # fmt: skip
    assert_cells(second, step="600", tokens="614,400", **{
        "TFLOP": "2.25", "slope before": "-2.800", "slope after": "-1.000",
        "gain / M params": "-0.0500",  # (2.0 - 2.2) / 4: it got worse
        "use": "0.250",
    })  # fmt: skip


def test_use_is_the_mean_over_the_blocks_of_a_growth(tmp_path):
    """Two blocks at once, at 1; then a third between them, at 2: old, first, second, first, old, old, old."""
    rows = [dict(row) for row in GROWN]
    first, second = (row for row in rows if row["kind"] == "event")
    first.update(at=1, layers_after=6), second.update(at=2, layers_before=6, layers_after=7)
    rows[-1].update(layers=7, block_use=[9.0, 0.5, 0.25, 0.125, 9.0, 9.0, 9.0])
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert [row["use"] for row in table(printed_by(ev.main, tmp_path), "use")] == ["0.312", "0.250"]


def test_frontier_has_a_point_for_each_way_to_predict(logs, tmp_path, monkeypatch):
    """Of the run that kept its base two: the grown network alone, and mixed."""
    figure, drawn = pytest.importorskip("matplotlib.figure").Figure, []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    printed_by(ev.main, *logs.values(), f"--plot={tmp_path / 'runs.png'}")
    frontier = drawn[0].axes[1]
    expected = {"grown": (2.0, 0.5), "grown, mixed": (2.125, 0.0625), "kept": (3.0, -0.25)}
    assert {note.get_text(): note.xy for note in frontier.texts} == expected
    points = [tuple(float(value) for (value,) in line.get_data()) for line in frontier.lines]
    assert sorted(points) == sorted(expected.values())


def test_a_run_without_growth_has_no_row_of_growth(logs):
    heads = {head for rows in tables(printed_by(ev.main, logs["plain"])) for head in rows[0]}
    assert "change" in heads and "added" not in heads and "slope after" not in heads


def test_json(logs):
    grown, plain, kept = json.loads(printed_by(ev.main, *logs.values(), "--json"))
    assert grown["run"] == logs["grown"] and grown["command"] == "python train.py --dataset=new"
    for run, rows in ((grown, GROWN), (plain, PLAIN), (kept, KEPT)):  # the result as it stands in the log
        logged = {key: value for key, value in rows[-1].items() if key not in ("kind", "block_use")}
        assert {key: run[key] for key in logged} == logged
    assert [run["forgetting"] for run in (grown, plain, kept)] == [0.5, None, -0.25]
    assert [run["forgetting_mixed"] for run in (grown, plain, kept)] == [0.0625, None, None]
    assert plain["scaling"] == kept["scaling"] == []
    expected = [  # worked out in test_scaling_of_one_run
        dict(step=300, tokens=307_200, layers=5, parameters=12_000_000, flops=1.5e12, loss_before=3.4,
             loss_after=3.65, slope_before=-2.2, slope_after=-2.8, gain_per_million=0.575, use=0.125),
        dict(step=600, tokens=614_400, layers=6, parameters=16_000_000, flops=2.25e12, loss_before=2.5,
             loss_after=2.0, slope_before=-2.8, slope_after=-1.0, gain_per_million=-0.05, use=0.25),
    ]  # fmt: skip
    for row, values in zip(grown["scaling"], expected, strict=True):
        assert {key: row[key] for key in values} == pytest.approx(values, rel=1e-9)


# ------------------------------------------------------------------------------------------------------------
# A real run: its log, its screen and the card beside its export

V, T, C, HEADS, LAYERS = 257, 16, 16, 2, 2  # a token is a byte; what it learns from is two small texts
BLOCK = 12 * C * C + 13 * C  # parameters of a block: its matrices, and its biases and gains


def network(layers=LAYERS, width=C, heads=HEADS, positions=T):
    """Hugging Face's GPT-2 with plain matrix products in its attention."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads,
                        bos_token_id=V - 1, eos_token_id=V - 1, attn_implementation="eager")  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def load(folder):
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


class Inputs:
    """What the runs start from: the text to learn, another to retain, and a network."""

    def __init__(self, folder):
        self.learn = write_words(folder)
        self.retain = str(folder / "numbers.txt")
        digits = random.Random(1).choices("0123456789", k=9000)
        lines = ["+".join(digits[i : i + 7]) for i in range(0, len(digits), 7)]
        (folder / "numbers.txt").write_text("\n".join(lines))
        self.init = str(folder / "init")
        net = network()
        for p in net.parameters():
            p.data *= 4  # so that it does not say almost the same everywhere
        net.save_pretrained(self.init)

    def argv(self, out, **options):
        """A command line of train.py. An option that is None is not typed."""
        base = dict(init=self.init, dataset=self.learn, retain=self.retain, out=out, block_size=T,
                    batch_size=2, grad_accum=2, lr=1e-2, eval_every=2, eval_windows=3, test_windows=5,
                    log_every=1, device="cpu", dtype="float32", where=1, grow_every=2, max_growths=2,
                    max_steps=5)  # fmt: skip
        typed = {name: value for name, value in {**base, **options}.items() if value is not None}
        return [f"--{name}={value}" for name, value in typed.items()]


class Run:
    """A finished run's folder, its log by kind, and what it printed."""

    def __init__(self, inputs, out, **options):
        self.inputs, self.folder = inputs, out
        began = time.perf_counter()
        self.printed = printed_by(train.main, *inputs.argv(out, **options))
        self.wall = time.perf_counter() - began
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        self.header, self.result = rows[0], rows[-1]
        self.steps = [row for row in rows if row["kind"] == "step"]
        self.evals = [row for row in rows if row["kind"] == "eval"]
        self.events = [row for row in rows if row["kind"] == "event"]
        assert self.header["kind"] == "header" and self.result["kind"] == "result"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """Five steps of 2 x 2 rows, one of the four from the old text; a growth at step 2 and one at step 4."""
    return Run(inputs, tmp_path_factory.mktemp("run") / "run", freeze="base", replay=0.25)


def window_nats(net, tokens, block_size=T, windows=0):
    """Nats and predicted tokens of each of the first windows (0: all), by GPT2LMHeadModel's own loss."""
    nats, counts = [], []
    for begin in range(0, len(tokens), block_size):
        window = torch.from_numpy(tokens[begin : begin + block_size].astype(np.int64))[None]  # (1, T)
        if window.size(1) > 1 and (not windows or len(nats) < windows):
            with torch.no_grad():
                mean = net(window, labels=window).loss.item()
            counts.append(window.size(1) - 1)
            nats.append(mean * counts[-1])
    return np.array(nats), np.array(counts)


def loss_of(net, tokens, block_size=T, windows=0):
    nats, counts = window_nats(net, tokens, block_size, windows)
    return nats.sum() / counts.sum()


def kl_of(base, grown, tokens, windows):
    """Mean over predicted tokens of KL(base || grown), by torch.distributions."""
    x = torch.from_numpy(tokens[: windows * T].astype(np.int64)).view(windows, T)
    with torch.no_grad():
        p, q = (
            torch.distributions.Categorical(logits=net(x).logits[:, :-1].double()) for net in (base, grown)
        )
    return torch.distributions.kl_divergence(p, q).mean().item()


def test_final_comparison_is_of_the_test_splits(run):
    """Losses and KL of the first five windows of each text's test split, before and after."""
    base, grown = load(run.inputs.init), load(run.folder / "model")
    for name, text in (("learn", run.inputs.learn), ("retain", run.inputs.retain)):
        measured, tokens = run.result[name], data.load(text, V, T)["test"]
        assert len(tokens) > 10 * T  # there are more windows than are asked for
        assert measured["dataset"] == text
        assert measured["base"] == pytest.approx(loss_of(base, tokens, windows=5), abs=1e-5)
        assert measured["grown"] == pytest.approx(loss_of(grown, tokens, windows=5), abs=1e-5)
        assert measured["kl"] == pytest.approx(kl_of(base, grown, tokens, 5), abs=1e-5)
        assert (
            abs(measured["grown"] - measured["base"]) > 0.05 and measured["kl"] > 0.05
        )  # else nothing is shown


def test_without_test_windows_the_whole_split_is_compared(inputs, tmp_path):
    run = Run(
        inputs, tmp_path / "run", max_growths=0, grow_every=None, where=None, max_steps=1, test_windows=0
    )
    base, trained = load(inputs.init), load(run.folder / "model")
    for name, text in (("learn", inputs.learn), ("retain", inputs.retain)):
        tokens = data.load(text, V, T)["test"]
        assert run.result[name]["base"] == pytest.approx(loss_of(base, tokens), abs=1e-5)
        assert run.result[name]["grown"] == pytest.approx(loss_of(trained, tokens), abs=1e-5)


def test_first_and_last_evaluation_are_of_the_validation_splits(run):
    """The first three windows, of the network that the run started from and of the one that it ended with."""
    for row, folder in ((run.evals[0], run.inputs.init), (run.evals[-1], run.folder / "model")):
        net = load(folder)
        for name, text in (("learn", run.inputs.learn), ("retain", run.inputs.retain)):
            tokens = data.load(text, V, T)["val"]
            assert row[name] == pytest.approx(loss_of(net, tokens, windows=3), abs=1e-5)
    assert [row["step"] for row in run.evals] == [0, 2, 4, 5]
    assert run.result["best"] == min(row["learn"] for row in run.evals)


def test_parameters_of_the_result_and_of_each_growth(run):
    """At the end the two grown blocks train, and nothing else."""
    start = sum(p.numel() for p in load(run.inputs.init).parameters())
    end = sum(p.numel() for p in load(run.folder / "model").parameters())
    assert start == V * C + T * C + LAYERS * BLOCK + 2 * C and end == start + 2 * BLOCK
    assert (run.header["layers"], run.header["parameters"]) == (2, start)
    assert (run.result["layers"], run.result["parameters"], run.result["trainable"]) == (4, end, 2 * BLOCK)
    first, second = run.events
    assert (first["step"], first["at"], first["layers_before"], first["layers_after"]) == (2, 1, 2, 3)
    assert (second["step"], second["at"], second["layers_before"], second["layers_after"]) == (4, 1, 3, 4)
    assert first["parameters_added"] == second["parameters_added"] == BLOCK
    assert (first["parameters"], first["trainable"]) == (start + BLOCK, BLOCK)
    assert (second["parameters"], second["trainable"]) == (start + 2 * BLOCK, 2 * BLOCK)
    for event in run.events:  # the loss before is the one that was just measured, and after it is the same
        measured = next(row for row in run.evals if row["step"] == event["step"])
        assert event["learn_before"] == event["learn_after"] == measured["learn"]
        assert event["retain_before"] == event["retain_after"] == measured["retain"]


def test_tokens_are_steps_times_rows_times_context(run):
    """2 x 2 rows of 16 tokens a step, the replayed row among them."""
    assert [event["tokens"] for event in run.events] == [2 * 2 * 2 * 16, 4 * 2 * 2 * 16]
    assert run.result["tokens"] == 5 * 2 * 2 * 16


def test_speed_on_the_screen_is_tokens_over_the_logged_time(run):
    said = re.findall(r"^step (\d+)/5 loss .*?([\d,]+) tok/s", run.printed, re.MULTILINE)
    assert [int(step) for step, _ in said] == [row["step"] for row in run.steps] == [0, 1, 2, 3, 4]
    for (_, speed), row in zip(said, run.steps):
        seconds = row["ms"] / 1000
        assert float(speed.replace(",", "")) == pytest.approx(2 * 2 * 16 / seconds, abs=1)
    spent = sum(row["ms"] for row in run.steps) / 1000  # every step is logged
    assert spent == pytest.approx(run.result["train_seconds"], rel=0.2)
    assert 0 < spent < run.result["seconds"] <= run.wall  # by the clock of this test


def test_block_use_is_how_much_a_block_changes_what_passes(run):
    """Mean over predicted tokens of |block(x) - x| / |x|, where x is what reaches GPT2LMHeadModel's block."""
    tokens = data.load(run.inputs.learn, V, T)["test"][: 8 * T]
    x = torch.from_numpy(tokens.astype(np.int64)).view(8, T)
    seen = []
    net = load(run.folder / "model")
    for block in net.transformer.h:
        block.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad():
        net(x)
    use = []
    for before, after in seen:
        after = after[0] if isinstance(after, tuple) else after
        use.append(((after - before).norm(dim=-1) / before.norm(dim=-1))[:, :-1].mean().item())
    logged = run.result["block_use"]
    logged = [logged[i] for i in (1, 2)] if isinstance(logged, list) else [logged["2"], logged["1"]]
    assert logged == pytest.approx(use[1:3], rel=1e-4)  # the second growth went in below the first
    assert min(use[1:3]) > 0


def test_model_card(run):
    """The README.md beside the export says what the log says, in the places where it belongs."""
    card = (run.folder / "model" / "README.md").read_text(encoding="utf-8")
    result, (first, second) = run.result, run.events
    old = result["retain"]
    start, end = run.header["parameters"], result["parameters"]

    for row, event, layers in zip(table(card, "added"), (first, second), ("2 -> 3", "3 -> 4"), strict=True):
        assert_cells(row, step=str(event["step"]), layers=layers, at="1", added=f"{BLOCK:,}", delta="0")
        loss = f"{event['learn_before']:.6f}"
        assert_cells(row, **{"loss before": loss, "loss after": loss})

    for row, name in zip(table(card, "change"), ("learn", "retain"), strict=True):
        measured = result[name]
        assert_cells(row, text=f"{name}: {measured['dataset']}", run="run", **{
            "loss base": f"{measured['base']:.4f}", "loss grown": f"{measured['grown']:.4f}",
            "change": f"{measured['grown'] - measured['base']:+.4f}",
            "ppl base": f"{np.exp(measured['base']):.2f}", "ppl grown": f"{np.exp(measured['grown']):.2f}",
            "KL(base, grown)": f"{measured['kl']:.4f}",
        })  # fmt: skip

    options = {row["option"]: row["value"].strip("'") for row in table(card, "option")}
    said = {"--batch_size": "2", "--lr": "0.01", "--freeze": "base", "--dataset": run.inputs.learn}
    assert {name: options[name] for name in said} == said

    said, forgetting = flat(card), old["grown"] - old["base"]
    assert f"forgetting {forgetting:+.4f}" in said
    assert f"2 -> 4 layers, {start:,} -> {end:,} parameters, {2 * BLOCK:,} trainable at the end" in said
    assert f"{5 * 2 * 2 * 16:,} tokens" in said
    train_tokens = len(data.load(run.inputs.learn, V, T)["train"])
    assert f"learned `{run.inputs.learn}`, of which {train_tokens:,} tokens are for training" in said
    assert "blocks were inserted" in said and "No block" not in said


def test_model_card_without_a_growth(logs):
    card = flat(ev.model_card(ev.read_run(logs["plain"])))
    assert "No block was inserted." in card and "blocks were inserted" not in card


# ------------------------------------------------------------------------------------------------------------
# Operations, counted by torch on Hugging Face's network


def count_flops(rows, layers, trains=None, teacher_rows=0, teacher_layers=LAYERS):
    """Of one micro-step: `rows` rows forward and backward, `teacher_rows` of them forward in a teacher, too.

    `trains` holds the indices of the blocks that train, None if everything does. Losses have no matrix
    product, so the sum of the logits does as well as any.
    """
    net, teacher = network(layers), network(teacher_layers)
    if trains is not None:
        net.requires_grad_(False)
        for i in trains:
            net.transformer.h[i].requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(rows, T, dtype=torch.long)).logits.sum().backward()
        if teacher_rows:
            with torch.no_grad():
                teacher(torch.zeros(teacher_rows, T, dtype=torch.long))
    return counter.get_total_flops()


# options; and for each stretch between growths: its steps, and count_flops' arguments for one micro-step.
# --where=1 puts the first block between the two originals, the second just below the first.
FLOPS = {
    "all train, then only what grew; accumulation, a replayed row": (
        dict(freeze="base", replay=0.25),
        [(2, (2, 2)), (2, (2, 3, [1])), (1, (2, 4, [1, 2]))],
    ),
    "no accumulation; only the newest block trains": (
        dict(freeze="older", grad_accum=1, batch_size=3),
        [(2, (3, 2)), (2, (3, 3, [1])), (1, (3, 4, [1]))],
    ),
    "everything trains": (
        dict(freeze="none"),
        [(2, (2, 2)), (2, (2, 3)), (1, (2, 4))],
    ),
    "a frozen block between two that train": (
        dict(freeze="top1", where=0, max_growths=1),
        [(2, (2, 2, [1])), (3, (2, 3, [0, 2]))],
    ),
    "the head above a frozen network": (
        dict(freeze="base", where=2, first_growth=1, grow_every=3),
        [(1, (2, 2)), (3, (2, 3, [2])), (1, (2, 4, [2, 3]))],
    ),
    "distilled on the batch": (
        dict(freeze="base", kd_weight=1.0),
        [(2, (2, 2, None, 2)), (2, (2, 3, [1], 2)), (1, (2, 4, [1, 2], 2))],
    ),
    "distilled on rows of old text": (
        dict(freeze="base", kd_weight=1.0, kd_on="retain", kd_rows=3, replay=0.25),
        [(2, (5, 2, None, 3)), (2, (5, 3, [1], 3)), (1, (5, 4, [1, 2], 3))],
    ),
    # The originals never train, so the teacher's lower block is the network's, and is not computed again:
    # what is left of the teacher is one block and the head.
    "distilled by its own original blocks": (
        dict(freeze="base", kd_weight=1.0, first_growth=0, max_growths=2, max_steps=3),
        [(0, (2, 2)), (2, (2, 3, [1], 2, 1)), (1, (2, 4, [1, 2], 2, 1))],
    ),
    "distilled by its own original blocks on rows of old text": (
        dict(freeze="older", kd_weight=1.0, kd_on="retain", kd_rows=3, first_growth=0, max_steps=3),
        [(0, (2, 2)), (2, (5, 3, [1], 3, 1)), (1, (5, 4, [1], 3, 1))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOPS)
def test_operations(inputs, tmp_path, case):
    """Logged at each growth and at the end: steps x micro-steps x what torch counts for a micro-step."""
    options, stretches = FLOPS[case]
    options = {"test_windows": 1, "eval_windows": 1, "eval_every": 100, **options}
    run = Run(inputs, tmp_path / "run", **options)
    totals = np.cumsum([steps * options.get("grad_accum", 2) * count_flops(*one) for steps, one in stretches])
    assert [event["flops"] for event in run.events] == totals[:-1].tolist()
    assert run.result["flops"] == totals[-1] > 0
    # Tokens: replayed rows are among those of the batch, and distilled rows are no part of it.
    rows = options.get("grad_accum", 2) * options.get("batch_size", 2)
    ends = np.cumsum([steps for steps, _ in stretches])
    assert [event["tokens"] for event in run.events] == [steps * rows * T for steps in ends[:-1]]
    assert run.result["tokens"] == ends[-1] * rows * T


# ------------------------------------------------------------------------------------------------------------
# eval.py: each option changes what it names


def measured(*argv):
    """Loss and perplexity as printed."""
    printed = printed_by(ev.main, *argv)
    return tuple(float(x) for x in re.search(r"loss ([\d.]+), perplexity ([\d.]+)", printed).groups())


@pytest.mark.parametrize(
    "split, windows, block_size, average, batch_size",
    [
        ("val", None, None, None, None),
        ("test", None, None, None, None),
        ("train", 7, None, None, None),
        ("test", 3, None, None, None),
        ("test", None, 8, None, None),
        ("test", 4, 8, None, None),
        ("test", None, None, "window", None),
        ("test", None, None, "token", 3),
        ("test", None, None, None, 1),
    ],
)
def test_eval_measures_what_its_options_say(run, split, windows, block_size, average, batch_size):
    """Against GPT2LMHeadModel, window by window; what is not given is left to its default."""
    given = dict(split=split, windows=windows, block_size=block_size, average=average, batch_size=batch_size)
    if split == "val":
        del given["split"]  # it is the default
    argv = [f"--{name}={value}" for name, value in given.items() if value is not None]
    tokens = data.load(run.inputs.learn, V, T)[split]
    nats, counts = window_nats(load(run.folder / "model"), tokens, block_size or T, windows or 0)
    expected = (nats / counts).mean() if average == "window" else nats.sum() / counts.sum()
    loss, perplexity = measured(run.folder, f"--dataset={run.inputs.learn}", *argv)
    assert loss == pytest.approx(expected, abs=6e-5)  # four decimals are printed
    assert perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_the_averages_of_that_test_differ(run):
    """The test split ends in a window of other length, so a token's weight is not a window's."""
    tokens = data.load(run.inputs.learn, V, T)["test"]
    assert len(tokens) % T > 1
    nats, counts = window_nats(load(run.folder / "model"), tokens)
    assert abs((nats / counts).mean() - nats.sum() / counts.sum()) > 2e-4


@pytest.mark.parametrize("new", [1, 6, 11])
def test_greedy_text_is_that_of_transformers(run, new):
    """Temperature 0, and also the likeliest token alone: as many new tokens as asked for."""
    prompt = torch.tensor([list(b"grow ")])
    settings = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=V - 1)
    ids = load(run.folder / "model").generate(prompt, max_new_tokens=new, **settings)[0]
    assert len(ids) == 5 + new  # it did not stop before
    expected = bytes(ids.tolist()).decode("utf-8", "replace") + "\n"
    for greedy in (["--temperature=0"], ["--temperature=2", "--top_k=1"]):
        argv = [run.folder, "--prompt=grow ", f"--max_new_tokens={new}", *greedy]
        assert printed_by(ev.main, *argv) == expected


@pytest.fixture(scope="module")
def die(tmp_path_factory):
    """A network that throws a die, whatever came before: a, b, c, d with odds of 8 : 4 : 2 : 1.

    The last norm has gain 0 and the bias (1, 0, 0, 0), so the logit of a token is the first number of its
    embedding, which is the logarithm of its odds.
    """
    net = network(layers=1, width=4, heads=1, positions=64)
    norm, embedding = net.transformer.ln_f, net.transformer.wte
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        embedding.weight[:, 0] = -50.0
        for letter, odds in (("a", 8), ("b", 4), ("c", 2), ("d", 1)):
            embedding.weight[ord(letter), 0] = math.log(odds)
    folder = tmp_path_factory.mktemp("die")
    net.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options, odds",
    [
        (["--temperature=1", "--top_k=0"], (8, 4, 2, 1)),
        (["--temperature=0.5", "--top_k=0"], (64, 16, 4, 1)),  # odds to the power of 1 / temperature
        (["--temperature=2", "--top_k=2"], (math.sqrt(8), 2, 0, 0)),
        (["--temperature=1", "--top_k=3"], (8, 4, 2, 0)),
        (["--temperature=1", "--top_k=1"], (1, 0, 0, 0)),
        (["--temperature=0"], (1, 0, 0, 0)),
        ([], (8**1.25, 4**1.25, 2**1.25, 1)),  # the default temperature is 0.8
    ],
)
def test_temperature_and_top_k_give_the_distribution_that_they_should(die, options, odds):
    thrown = (
        printed_by(ev.main, die, "--prompt=x", "--max_new_tokens=600", *options).strip().removeprefix("x")
    )
    assert len(thrown) == 600 and set(thrown) <= set("abcd")
    for letter, share in zip("abcd", np.array(odds) / sum(odds)):
        sigma = math.sqrt(share * (1 - share) / 600)
        assert abs(thrown.count(letter) / 600 - share) <= 3.5 * sigma + 1e-9


def test_new_tokens_and_seed(die):
    """100 new tokens if not said otherwise; the same seed gives the same text, another another."""
    said = [printed_by(ev.main, die, "--prompt=x", *more) for more in ([], ["--seed=0"], ["--seed=1"])]
    assert [len(text) for text in said] == [1 + 100 + 1] * 3  # the prompt, the text, the end of the line
    assert said[0] == said[1] != said[2]
    defaults = ["--max_new_tokens=100", "--temperature=0.8", "--top_k=50"]
    assert printed_by(ev.main, die, "--prompt=x", *defaults) == said[0]
    assert printed_by(ev.main, die, "--prompt=x", "--temperature=1") != said[0]


# ------------------------------------------------------------------------------------------------------------
# LAMBADA, on a network whose answers are known

LETTERS = "abcdenorstw ."  # what the passages are made of; each has a coordinate of its own
FOLLOWS = {"e": " ", " ": "c", "c": "a", "a": "t", "t": "s", "s": " ", "o": "n", "n": "o"}


@pytest.fixture(scope="module")
def successor(tmp_path_factory):
    """A network whose guess depends on the last letter alone, by FOLLOWS.

    The embedding of a letter is a unit vector of its own. Attention adds nothing. Each letter has a hidden
    unit in the MLP, which is positive only if this letter is there, and then adds the vector of the letter
    that follows, many times as long.
    """
    net = network(layers=1, width=16, heads=1, positions=32)
    block, embedding, code = net.transformer.h[0], net.transformer.wte, {c: i for i, c in enumerate(LETTERS)}
    with torch.no_grad():
        for p in (*block.attn.parameters(), *block.mlp.parameters(), *embedding.parameters()):
            p.zero_()
        net.transformer.wpe.weight.zero_()
        for letter, i in code.items():
            embedding.weight[ord(letter), i] = 1.0
            block.mlp.c_fc.weight[i, i] = 1.0  # (in, out): the normed vector has 3.9 at i and -0.3 elsewhere
            block.mlp.c_fc.bias[i] = -1.0
        for letter, following in FOLLOWS.items():
            block.mlp.c_proj.weight[code[letter], code[following]] = 10.0
    folder = tmp_path_factory.mktemp("successor")
    net.save_pretrained(folder)
    return folder


PASSAGES = {  # passage: is its last word, and the space before it, guessed letter by letter?
    "one cat": True,
    "a cat ate a cat ate a cat ate one cat": True,  # longer than the context
    "see cats": True,
    "one car": False,  # its last letter is not
    "to cat": False,  # nor is this space
    "one oat": False,  # nor this first letter
    "see one cab": False,
}


def test_lambada_on_known_answers(successor, monkeypatch):
    net = load(successor)
    for letter, following in FOLLOWS.items():  # the network is what it is meant to be
        assert net(torch.tensor([[ord(letter)]])).logits[0, -1].argmax().item() == ord(following)
    # LAMBADA is measured in GPT-2's tokens; for this test those are bytes.
    monkeypatch.setattr(data, "GPT2", V)
    monkeypatch.setattr(data, "lambada", lambda: list(PASSAGES))
    monkeypatch.setattr(
        data, "encode", lambda text, *_: np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    )
    nats = 0.0
    for passage in PASSAGES:
        ids = torch.tensor(list(passage.encode())[-32:])
        with torch.no_grad():
            loss = F.cross_entropy(net(ids[None]).logits[0, :-1], ids[1:], reduction="none")  # (T - 1,)
        nats += loss[-1 - len(passage.split()[-1]) :].sum().item()  # the last word and the space before it
    printed = printed_by(ev.main, successor, "--lambada")
    accuracy, perplexity = re.search(r"accuracy ([\d.]+), perplexity ([\d.]+)", printed).groups()
    assert accuracy == f"{3 / 7:.4f}"
    assert float(perplexity) == pytest.approx(math.exp(nats / 7), rel=1e-3)
    assert "(7 passages" in printed
