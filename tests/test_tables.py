"""Every number that a run or eval.py reports, against an oracle that is not ours.

First, tables of a log that was written by hand: its numbers are so round that each cell can be worked out in
the head. Second, Hugging Face's GPT2LMHeadModel for losses, KL and greedy text, and torch's FlopCounterMode
on that network for operations. Third, networks whose weights were set by hand, so that their answers are
known before they are asked. (Tables are read by the heads of their columns: one more changes nothing here.)
"""

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import BYTES, rows, table, tiny_gpt, typed, write_words
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import data
import eval as ev
import train
from model import GPT

# ----- Logs written by hand -----

CONFIG = dict(
    init="gpt2", dataset="new", retain="old", block_size=128, max_steps=900, batch_size=8, grad_accum=1,
    lr=1e-3, seed=0, trigger="schedule", grow_every=300, first_growth=300, max_growths=2, eval_windows=2,
)  # fmt: skip
HEADER = dict(
    kind="header", command="python train.py --dataset=new", presets=[], typed={"dataset": "new"},
    config=CONFIG, versions={"torch": "2"}, machine=[], processes=1, init_sha256="00", vocab_size=257,
    tokens={"learn": {"train": 5000, "val": 300, "test": 300},
            "retain": {"train": 6000, "val": 400, "test": 400}},
)  # fmt: skip
VALIDATION = {  # step: learn, retain
    0: (4.0, 1.0), 100: (3.9, 1.1), 200: (3.5, 1.2), 300: (3.4, 1.3), 400: (3.0, 1.3), 500: (2.9, 1.4),
    600: (2.5, 1.4), 700: (2.3, 1.5), 800: (2.2, 1.6), 900: (2.2, 1.6),
}  # fmt: skip
# Both growths change the loss, which is impossible in a run: here it shows that the table subtracts. The
# first is of two blocks, and the second goes in between them, so that a growth's use is a mean.
GROWN = [
    {**HEADER, "layers": 4, "parameters": 10_000_000},
    dict(kind="step", step=0, loss=4.25, kd=0.0, ewc=0.0, lr=1e-3, norm=1.0, ms=500.0),
    *(dict(kind="eval", step=step, learn=new, retain=old) for step, (new, old) in VALIDATION.items()),
    dict(kind="event", step=300, at=3, generation=1, layers_before=4, layers_after=6,
         parameters_added=6_000_000, parameters=16_000_000, trainable=2_000_000, flops=1.5e12,
         tokens=307_200, learn_before=3.4, learn_after=3.65, retain_before=1.3, retain_after=1.3),
    dict(kind="event", step=600, at=4, generation=2, layers_before=6, layers_after=7,
         parameters_added=3_000_000, parameters=19_000_000, trainable=4_000_000, flops=2.25e12,
         tokens=614_400, learn_before=2.5, learn_after=2.0, retain_before=1.4, retain_after=1.4),
    dict(kind="result", layers=7, parameters=19_000_000, trainable=4_000_000, flops=1234.5e12, tokens=921_600,
         best=2.2, train_seconds=5400.0, seconds=5430.0, protocol="Test split.", versions=[0, 2],
         block_use=[9.0, 9.0, 9.0, 0.5, 0.25, 0.125, 9.0],
         learn=dict(dataset="new", windows=40, base=4.0, grown=2.0, mixed=2.125, kl=0.25),
         retain=dict(dataset="old", windows=20, base=1.0, grown=1.5, mixed=1.0625, kl=0.125)),
]  # fmt: skip
# An ordinary training run without an old text.
PLAIN = [
    {**HEADER, "config": CONFIG | {"retain": "none", "max_growths": 0}, "layers": 3, "parameters": 9_000_000},
    dict(kind="eval", step=0, learn=3.0, retain=None),
    dict(kind="eval", step=900, learn=2.5, retain=None),
    dict(kind="result", layers=3, parameters=9_000_000, trainable=8_000_000, flops=0.5e12, tokens=921_600,
         best=2.5, train_seconds=30.0, seconds=42.0, protocol="Test split.", versions=[0],
         block_use=[0.5, 0.5, 0.25],
         learn=dict(dataset="new", windows=40, base=3.0, grown=2.5, mixed=None, kl=0.75),
         retain=dict(dataset="none", windows=None, base=None, grown=None, mixed=None, kl=None)),
]  # fmt: skip


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two run folders, of which only the log is there: {name: folder}."""
    folders = {name: tmp_path_factory.mktemp("logs") / name for name in ("grown", "plain")}
    for folder, log in zip(folders.values(), (GROWN, PLAIN)):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folders


@pytest.fixture
def printed_by(capsys):
    """What train.main or eval.main prints."""

    def call(program, *words, **options):
        capsys.readouterr()
        program(typed(*words, **options))
        return capsys.readouterr().out

    return call


def flat(text):
    """In one line: a sentence may be broken anywhere."""
    return " ".join(text.split())


def has(row, *pairs, **more):
    """Whether the row has these cells, {head: cell}. (It may have more: a table may gain a column.)"""
    return row.items() >= dict(*pairs, **more).items()


ROWS = {  # of a run: new text, old text
    "grown": {"before": "4.0000 1.0000", "grown alone": "2.0000 1.5000", "grown mixed": "2.1250 1.0625"},
    "plain": {"before": "3.0000 -", "plain alone": "2.5000 -"},
}
SUMMARIES = {  # below the table; e^4 = 54.598, e^2 = 7.389, e^3 = 20.086, e^2.5 = 12.182
    "grown": "4 -> 7 layers, 10,000,000 -> 19,000,000 parameters, 4,000,000 of them trained at the end; "
    "921,600 tokens, 1,234.50 TFLOP; 5430 s in all, 5400 s of them training. "
    "Perplexity of the new text 54.60 -> 7.39, KL(before, alone) 0.2500. "
    "Above 0 the old text is forgotten: grown +0.5000 alone, +0.0625 mixed.",
    "plain": "0.50 TFLOP; 42 s in all, 30 s of them training. Perplexity of the new text 20.09 -> 12.18",
}


@pytest.mark.parametrize("names", [["grown", "plain"], ["grown"], ["plain"]])
def test_before_and_after(logs, names, printed_by):
    """Of several runs, and of one: a row for each way to predict, each figure once."""
    printed = printed_by(ev.main, *(logs[name] for name in names))
    new, *old = ("new text: new", "old text: old") if "grown" in names else ("new text: new",)
    expected = [(label, cells.split()) for name in names for label, cells in ROWS[name].items()]
    for row, (label, cells) in zip(table(printed, new), expected, strict=True):
        assert has(row, zip(["nats per token", new, *old], [label, *cells]))
    assert "Test split." in printed and all(SUMMARIES[name] in flat(printed) for name in names)
    assert ("slope" in printed) == (names == ["grown"])


def test_growths_of_one_run(logs, printed_by):
    """Slopes are in nats per 1,000 steps. The least-squares line through losses a, b, c, d that are 100 steps
    apart falls by (3 (d - a) + (c - b)) / 1000 nats a step, so that its slope is 3 (d - a) + (c - b):

    steps   0 to 300:  4.0, 3.9, 3.5, 3.4    3 * -0.6 - 0.4 = -2.2
    steps 300 to 600:  3.4, 3.0, 2.9, 2.5    3 * -0.9 - 0.1 = -2.8
    steps 600 to 900:  2.5, 2.3, 2.2, 2.2    3 * -0.3 - 0.1 = -1.0

    Gain: from just after a growth to just before the next (or the end), per million parameters that train.
    """
    printed = printed_by(ev.main, logs["grown"])
    assert "on 2 windows of the validation split" in flat(printed)  # of the three that its 300 tokens have
    first, second = table(printed, "slope after")
    assert has(first, step="300", layers="4 -> 6", at="3", tokens="307,200", TFLOP="1.50", use="0.312")
    assert has(first, {"loss before": "3.400000", "loss after": "3.650000"}, delta="0.25")
    assert has(first, {"slope before": "-2.200", "slope after": "-2.800"}, added="6,000,000")
    assert first["gain / M params"] == "+0.5750"  # (3.65 - 2.5) / 2
    assert has(second, step="600", layers="6 -> 7", at="4", tokens="614,400", TFLOP="2.25", use="0.250")
    assert has(second, {"loss before": "2.500000", "loss after": "2.000000"}, delta="-0.5")
    assert has(second, {"slope before": "-2.800", "slope after": "-1.000"}, added="3,000,000")
    assert second["gain / M params"] == "-0.0500"  # (2.0 - 2.2) / 4: it got worse


def test_frontier_has_a_point_for_each_way_to_predict(logs, tmp_path, monkeypatch):
    """Two of the run that kept its base, the grown network alone and mixed; none without an old text."""
    figure, drawn = pytest.importorskip("matplotlib.figure").Figure, []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    ev.main(typed(*logs.values(), plot=tmp_path / "runs.png"))
    *texts, frontier = drawn[0].axes
    expected = {"grown": (2.0, 0.5), "grown, mixed": (2.125, 0.0625)}
    assert {note.get_text().strip(): note.xy for note in frontier.texts} == expected
    names = [sorted(note.get_text().strip() for note in text.texts) for text in texts]
    assert names == [["grown", "plain"], ["grown"]]  # each line is named where it ends
    assert [line.get_markevery() for line in texts[1].lines] == [[3, 6]]  # and growths are marked
    alone = tmp_path / "alone"  # grown, without an old text
    alone.mkdir()
    log = [row | dict.fromkeys([key for key in row if key.startswith("retain_")]) for row in GROWN[:-1]]
    log = [row | {"retain": None} if row["kind"] == "eval" else row for row in log]
    log.append(GROWN[-1] | {"retain": PLAIN[-1]["retain"]})
    (alone / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    ev.main(typed(alone, plot=tmp_path / "alone.png"))
    assert not drawn[1].axes[1].lines
    points = [tuple(float(value) for (value,) in line.get_data()) for line in frontier.lines]
    assert sorted(points) == sorted(expected.values())


# ----- A real run: its log, its screen and the card beside its export -----

T, C, HEADS_OF_ATTENTION, LAYERS = 16, 16, 2, 2
BLOCK = 12 * C * C + 13 * C  # parameters of a block: its matrices, and its biases and gains


def network(layers=LAYERS):
    """Hugging Face's GPT-2 with plain matrix products in its attention."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=BYTES, n_positions=T, n_embd=C, n_layer=layers, n_head=HEADS_OF_ATTENTION,
                        bos_token_id=256, eos_token_id=256, attn_implementation="eager")  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def load(folder):
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What the runs start from: the text to learn, another to retain, and a network."""
    folder = tmp_path_factory.mktemp("inputs")
    digits = random.Random(1).choices("0123456789", k=9000)
    lines = ["+".join(digits[i : i + 7]) for i in range(0, len(digits), 7)]
    (folder / "numbers.txt").write_text("\n".join(lines))
    net = network()
    for p in net.parameters():
        p.data *= 4  # so that it does not say almost the same everywhere
    net.save_pretrained(folder / "init")
    return dict(init=folder / "init", dataset=write_words(folder), retain=folder / "numbers.txt")


OPTIONS = dict(
    block_size=T, batch_size=2, grad_accum=2, lr=1e-2, eval_every=2, eval_windows=3, test_windows=5,
    log_every=1, device="cpu", dtype="float32", where=1, grow_every=2, max_growths=2, max_steps=5,
)  # fmt: skip


class Run:
    """A finished run's folder and its log by kind."""

    def __init__(self, inputs, out, **options):
        self.folder = out
        self.names = {"learn": str(inputs["dataset"]), "retain": str(inputs["retain"])}
        train.main(typed(**{**inputs, **OPTIONS, **options, "out": out}))
        self.steps, self.evals, self.events = (rows(out, kind) for kind in ("step", "eval", "event"))
        (self.header,), (self.result,) = rows(out, "header"), rows(out, "result")


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """Five steps of 2 x 2 rows, one of the four from the old text; a growth at step 2 and one at step 4."""
    return Run(inputs, tmp_path_factory.mktemp("run") / "run", freeze="base", replay=0.25)


def loss_of(net, tokens, block_size=T, windows=0):
    """Nats per predicted token on the first windows (0: all), by GPT2LMHeadModel's own loss."""
    nats, counts = [], []
    for begin in range(0, len(tokens), block_size):
        window = torch.from_numpy(tokens[begin : begin + block_size].astype(np.int64))[None]  # (1, T)
        if window.size(1) > 1 and (not windows or len(nats) < windows):
            with torch.no_grad():
                mean = net(window, labels=window).loss.item()
            counts.append(window.size(1) - 1)
            nats.append(mean * counts[-1])
    return sum(nats) / sum(counts)


@torch.no_grad()
def kl_of(base, grown, tokens, windows):
    """Mean over predicted tokens of KL(base || grown), by torch.distributions."""
    x = torch.from_numpy(tokens[: windows * T].astype(np.int64)).view(windows, T)
    p, q = (torch.distributions.Categorical(logits=net(x).logits[:, :-1].double()) for net in (base, grown))
    return torch.distributions.kl_divergence(p, q).mean().item()


def test_final_comparison_is_of_the_test_splits(run, inputs):
    """Losses and KL of the first five windows of each text's test split, before and after."""
    base, grown = load(inputs["init"]), load(run.folder / "model")
    for name, text in run.names.items():
        measured, tokens = run.result[name], data.load(text, BYTES, T)["test"]
        assert len(tokens) > 10 * T  # there are more windows than are asked for
        assert (measured["dataset"], measured["windows"]) == (text, 5)
        assert measured["base"] == pytest.approx(loss_of(base, tokens, windows=5), abs=1e-5)
        assert measured["grown"] == pytest.approx(loss_of(grown, tokens, windows=5), abs=1e-5)
        assert measured["kl"] == pytest.approx(kl_of(base, grown, tokens, 5), abs=1e-5)
        assert abs(measured["grown"] - measured["base"]) > 0.05 < measured["kl"]  # else nothing is shown
    tokens = data.load(run.names["learn"], BYTES, T)["test"]
    use = ev.block_use(GPT.from_pretrained(run.folder / "model"), tokens, T)  # test_eval.py checks that
    assert run.result["block_use"] == pytest.approx(use, rel=1e-4) and min(use) > 0


def test_parameters_and_tokens_of_the_result_and_of_each_growth(run, inputs):
    """At the end the two grown blocks train, and nothing else. The replayed row counts as any other."""
    start = sum(p.numel() for p in load(inputs["init"]).parameters())
    end = sum(p.numel() for p in load(run.folder / "model").parameters())
    assert start == BYTES * C + T * C + LAYERS * BLOCK + 2 * C and end == start + 2 * BLOCK
    assert (run.header["layers"], run.header["parameters"]) == (2, start)
    result = [run.result[key] for key in ("layers", "parameters", "trainable", "tokens")]
    assert result == [4, end, 2 * BLOCK, 5 * 2 * 2 * T]
    for k, event in enumerate(run.events, 1):
        expected = dict(
            step=2 * k, at=1, generation=k, layers_before=k + 1, layers_after=k + 2, parameters_added=BLOCK,
            parameters=start + k * BLOCK, trainable=k * BLOCK, tokens=2 * k * 2 * 2 * T,
        )  # fmt: skip
        assert {key: event[key] for key in expected} == expected
        # The loss before is the one that was just measured, and after it is the same.
        measured = next(row for row in run.evals if row["step"] == event["step"])
        assert event["learn_before"] == event["learn_after"] == measured["learn"]
        assert event["retain_before"] == event["retain_after"] == measured["retain"]


def test_model_card(run):
    """The README.md beside the export has the tables of the log and the size of the text."""
    card = (run.folder / "model" / "README.md").read_text(encoding="utf-8")
    assert ev.tables(ev.read_run(run.folder)) in card
    assert f"{len(data.load(run.names['learn'], BYTES, T)['train']):,} tokens" in flat(card)


# ----- Operations, counted by torch on Hugging Face's network -----


def count_flops(rows, layers, trains=None, teacher_rows=0, teacher_layers=LAYERS):
    """Of one micro-step: `rows` rows forward and backward, `teacher_rows` of them forward in a teacher, too.
    `trains` has the indices of the blocks that train, None if everything does. Losses have no matrix product,
    so the sum of the logits does as well as any."""
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
    "base": (dict(freeze="base", replay=0.25), [(2, (2, 2)), (2, (2, 3, [1])), (1, (2, 4, [1, 2]))]),
    "none": (dict(freeze="none", grad_accum=1, batch_size=3), [(2, (3, 2)), (2, (3, 3)), (1, (3, 4))]),
    "top1": (dict(freeze="top1", where=0, max_growths=1), [(2, (2, 2, [1])), (3, (2, 3, [0, 2]))]),
    "the head above a frozen network": (
        dict(freeze="base", where=2, first_growth=1, grow_every=3),
        [(1, (2, 2)), (3, (2, 3, [2])), (1, (2, 4, [2, 3]))],
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
}


@pytest.mark.parametrize("case", FLOPS)
def test_operations(inputs, tmp_path, case):
    """Logged at each growth and at the end: steps x micro-steps x what torch counts for a micro-step."""
    options, stretches = FLOPS[case]
    run = Run(inputs, tmp_path, **{"test_windows": 1, "eval_windows": 1, "eval_every": 100, **options})
    accum = options.get("grad_accum", 2)
    totals = np.cumsum([steps * accum * count_flops(*one) for steps, one in stretches])
    assert [event["flops"] for event in run.events] == totals[:-1].tolist()
    assert run.result["flops"] == totals[-1] > 0
    # Tokens: replayed rows are among those of the batch, and distilled rows are no part of it.
    ends = np.cumsum([steps for steps, _ in stretches]) * accum * options.get("batch_size", 2) * T
    assert [event["tokens"] for event in run.events] == ends[:-1].tolist()
    assert run.result["tokens"] == ends[-1]


# ----- eval.py: each option changes what it names -----

MEASURED = [{}, dict(split="train", windows=7), dict(split="test", block_size=8, windows=40)]


@pytest.mark.parametrize("options", MEASURED)
def test_eval_measures_what_its_options_say(run, options, printed_by):
    """Against GPT2LMHeadModel, window by window; what is not given is left to its default."""
    tokens = data.load(run.names["learn"], BYTES, T)[options.get("split", "val")]
    how = options.get("block_size", T), options.get("windows", 0)
    expected = loss_of(load(run.folder / "model"), tokens, *how)
    printed = printed_by(ev.main, run.folder, dataset=run.names["learn"], **options)
    (row,) = table(printed, "perplexity")
    assert float(row[run.names["learn"]]) == pytest.approx(expected, abs=6e-5)  # four decimals are printed
    assert float(row["perplexity"]) == pytest.approx(math.exp(expected), rel=1e-4)


def die(*odds):
    """A network that throws a die, whatever came before: a, b, c, d with these odds. The last norm has gain 0
    and bias (1, 0, 0, 0), so a token's logit is the first number of its embedding: the log of its odds."""
    net = tiny_gpt((0,), BYTES, n_embd=4)
    with torch.no_grad():
        net.ln_f.weight.zero_()
        net.ln_f.bias.copy_(torch.eye(4)[0])
        net.wte.weight[:, 0] = -50.0
        net.wte.weight[list(b"abcd"), 0] = torch.tensor(odds).log()
    return net.eval()


FAIR, LOADED = (8.0, 4.0, 2.0, 1.0), (1.0, 1.0, 1.0, 12.0)  # both add up to 15


def assert_thrown(text, odds):
    assert len(text) > 300 and set(text) <= set("abcd")
    for letter, share in zip("abcd", np.array(odds) / sum(odds)):
        sigma = math.sqrt(share * (1 - share) / len(text))
        assert abs(text.count(letter) / len(text) - share) <= 3.5 * sigma + 1e-9


def test_temperature_top_k_and_seed(tmp_path, printed_by):
    """100 new tokens if not said otherwise; the same seed gives the same text, another another."""
    die(*FAIR).save_pretrained(tmp_path)
    for options, odds in (
        (dict(temperature=0.5, top_k=0), (64, 16, 4, 1)),  # odds to the power of 1 / temperature
        (dict(temperature=2, top_k=2), (math.sqrt(8), 2, 0, 0)),
        ({}, (8**1.25, 4**1.25, 2**1.25, 1)),  # the default temperature is 0.8
    ):
        text = printed_by(ev.main, tmp_path, prompt="x", max_new_tokens=400, **options)
        assert_thrown(text.removeprefix("x").removesuffix("\n"), odds)
    said = [printed_by(ev.main, tmp_path, prompt="x", **more) for more in ({}, dict(seed=0), dict(seed=1))]
    assert [len(text) for text in said] == [1 + 100 + 1] * 3  # the prompt, the text, the end of the line
    assert said[0] == said[1] != said[2]


def odds_of_two(prompt):
    """Of the byte behind a prompt, by two dice mixed: half as Bayes' rule says, half as a hidden Markov model
    does that draws its die anew with probability 5%; each as far as it has predicted the prompt."""
    dice, tokens = np.array([FAIR, LOADED]) / 15, ["abcd".index(letter) for letter in prompt[1:]]
    bayes, state = np.full(2, 0.25), np.full(2, 0.25)
    for token in tokens:
        bayes, state = bayes * dice[:, token], state * dice[:, token]
        state = 0.95 * state + 0.05 * state.sum() / 2
    return (bayes + state) @ dice


@pytest.mark.parametrize("prompt", ["x", "xabaabaaa", "xdd"])
@pytest.mark.parametrize("options, power", [({"temperature": 1}, 1), ({"temperature": 0.5}, 2)])
def test_two_dice_mixed_are_thrown_as_they_should(prompt, options, power):
    """The first byte is predicted by nobody; temperature acts on the mixture."""
    dice = [die(*FAIR), die(*LOADED)]
    thrown = [ev.sample(dice, prompt, 1, top_k=0, seed=seed, **options)[-1] for seed in range(400)]
    assert_thrown("".join(thrown), odds_of_two(prompt) ** power)
