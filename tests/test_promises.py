"""What the program promises whoever uses it, a sentence a test: in numbers, in growing, in words.

Each test is marked with the sentence that it holds the program to. They touch the program only through
train.main, eval.main, its files and its public names."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
import torch.nn.functional as F
from conftest import DEVICES, ROOT, needs_cuda, write_words
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2LMHeadModel

import data
import eval as ev
import grow
import train
from data import UsageError, UserError
from model import GPT, GPTConfig


def promised(sentence):
    return pytest.mark.promise(sentence)


# ----- what the tests share -----

BYTES = 257  # ids of the bytes tokenizer
TINY = dict(
    block_size=16, batch_size=4, lr=1e-2, max_steps=7, grow_every=3, max_growths=2, eval_every=2, log_every=1,
    eval_windows=4, test_windows=4, device="cpu", dtype="float32",
)  # fmt: skip
SCRATCH = dict(init="scratch", tokenizer="bytes", n_layer=2, n_head=2, n_embd=16)
PLAIN = dict(max_growths=0, grow_every=None)  # an ordinary training run
PLATEAU = dict(trigger="plateau", grow_every=None, patience=2, eval_every=1)
NEVER = 1e9  # as --min_delta: no loss ever falls so far, so a plateau is due after `patience` steps


@pytest.fixture
def tmp_path(tmp_path_factory):
    """A folder whose name holds no word that a test looks for: messages and tables name folders."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two texts, the folder of a tiny network, a finished run, and one that was stopped before its end."""
    folder = tmp_path_factory.mktemp("t")
    learn = write_words(folder)
    old = folder / "old.txt"
    old.write_text("\n".join(f"the {i} of {i * i} was kept" for i in range(900)))
    torch.manual_seed(0)
    GPT(GPTConfig(BYTES, 16, 2, 16, (0, 0))).save_pretrained(folder / "net")
    shared = SimpleNamespace(learn=learn, old=str(old), net=str(folder / "net"), run=str(folder / "run"))
    train.main(arguments(shared, shared.run))
    shared.unfinished = str(shutil.copytree(shared.run, folder / "stopped"))
    shutil.rmtree(folder / "stopped" / "model")
    log = folder / "stopped" / "metrics.jsonl"
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["kind"] != "result"]
    log.write_text("\n".join(lines) + "\n")
    return shared


def arguments(here, out, **changes):
    """A command line for a run of a second or less; an option that is changed to None is not typed."""
    options = {"init": here.net, "dataset": here.learn, "retain": here.old, **TINY, "out": out, **changes}
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def refused(main, argv, *says, kind=UserError):
    """The one sentence with which `main` refuses `argv`. It must match every pattern of `says`."""
    try:
        main(argv)
    except UserError as e:
        sentence, status = str(e), e.status
    except Exception as e:
        pytest.fail(f"a traceback instead of a sentence: {e!r}")
    else:
        pytest.fail("it was not refused")
    assert status == kind.status or kind is UserError, sentence
    assert "\n" not in sentence
    for pattern in says:
        assert re.search(pattern, sentence, re.I), f"not {pattern!r} in: {sentence}"
    return sentence


def constant(name):
    raise ValueError(f"{name} is not JSON")  # json.loads takes NaN and Infinity unless told otherwise


def rows(out, kind):
    """The rows of one kind in a run's metrics.jsonl."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=constant) for line in lines]
    return [row for row in parsed if row["kind"] == kind]


def growths(out):
    return [row["step"] for row in rows(out, "event")]


def said(capsys):
    """What was printed since the last call, on both streams, as one text."""
    printed = capsys.readouterr()
    return printed.out + printed.err


def windows(tokens, block_size, count):
    """The first `count` whole windows of a split, (count, T) int64."""
    return torch.tensor(tokens[: count * block_size].astype("int64")).view(count, block_size)


# ----- numbers: precision -----


@pytest.fixture(scope="module")
def bfloat16_run(here, tmp_path_factory):
    """A run under bfloat16 autocast from a network whose logits lie around -95, as GPT-2's do.

    There bfloat16 steps by 0.5. The offset is made by one channel, which the final norm sets to 10 whatever
    comes in, and which every row of the head multiplies by -9.5. (The positions take it out of the blocks.)
    """
    folder = tmp_path_factory.mktemp("t")
    torch.manual_seed(0)
    net = GPT(GPTConfig(BYTES, 16, 2, 16, (0, 0)))
    with torch.no_grad():
        net.wte.weight.normal_(std=0.5)
        net.wte.weight[:, 0], net.wpe.weight[:, 0] = -9.5, 9.5
        net.ln_f.weight[0], net.ln_f.bias[0] = 0.0, 10.0
    net.save_pretrained(folder / "net")
    changes = dict(
        init=folder / "net", dtype="bfloat16", max_growths=1, lr=3e-3, eval_windows=40, test_windows=40
    )
    train.main(arguments(here, folder / "run", **changes))
    return folder


def float32_head(folder, idx):
    """transformers' log-probabilities (B, T, V): blocks under bfloat16 autocast, the head in float32."""
    net = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            hidden = net.transformer(idx).last_hidden_state
        return F.linear(hidden.float(), net.transformer.wte.weight).log_softmax(-1)


def loss_of(log_p, idx):
    """Mean nats of every token but the first of each window."""
    return -log_p[:, :-1].gather(-1, idx[:, 1:, None]).mean().item()


IN_FLOAT32 = "Logits, loss and KL of every published figure in float32 (the blocks may stay under autocast)."


@promised(IN_FLOAT32)
@pytest.mark.parametrize("figure", ["base", "grown", "kl"])
def test_tables_have_float32_logits_under_bfloat16(here, bfloat16_run, figure):
    test = data.load(here.learn, BYTES, 16)["test"]
    idx = windows(test, 16, 40)
    base, grown = (float32_head(bfloat16_run / name, idx) for name in ("net", "run/model"))
    kl = (base.exp() * (base - grown)).sum(-1)[:, :-1].mean().item()
    expected = {"base": loss_of(base, idx), "grown": loss_of(grown, idx), "kl": kl}
    (result,) = rows(bfloat16_run / "run", "result")
    # rounding inside the blocks moves the losses by less than this, and rounding of logits by ten times it
    tolerance = 0.05 * kl if figure == "kl" else 1e-3
    assert result["learn"][figure] == pytest.approx(expected[figure], abs=tolerance)


@promised(IN_FLOAT32)
def test_validation_has_float32_logits_under_bfloat16(here, bfloat16_run):
    """The last evaluation is of the network that was exported."""
    idx = windows(data.load(here.learn, BYTES, 16)["val"], 16, 40)
    expected = loss_of(float32_head(bfloat16_run / "run/model", idx), idx)
    assert rows(bfloat16_run / "run", "eval")[-1]["learn"] == pytest.approx(expected, abs=1e-3)


@promised("Name the precision truthfully.")
def test_tables_say_that_blocks_are_in_bfloat16_and_logits_in_float32(bfloat16_run, capsys):
    ev.main([str(bfloat16_run / "run")])
    printed = capsys.readouterr().out
    assert "bfloat16" in printed and re.search(r"(?<!b)float32", printed)


def test_tables_of_a_float32_run_name_no_other_precision(here, capsys):
    ev.main([here.run])
    printed = capsys.readouterr().out
    assert "float32" in printed and "bfloat16" not in printed


@needs_cuda
@promised("Name the precision truthfully (TF32 is not float32).")
def test_tf32_is_named(here, tmp_path, capsys):
    train.main(arguments(here, tmp_path / "run", device="cuda"))
    assert "TF32" in capsys.readouterr().out


@promised("eval.py has --dtype and --device by train.py's rule; its losses equal the run's table to 1e-6.")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_eval_measures_what_the_run_measured(here, bfloat16_run, tmp_path, monkeypatch, dtype):
    """At equal dtype and windows: RUN/model, measured by eval.py, against the run's result row."""
    machine = dict(dtype=dtype, device="auto" if dtype == "auto" else "cpu")
    out = tmp_path / "run"
    train.main(arguments(here, out, init=bfloat16_run / "net", max_growths=1, **machine))
    measured, evaluate = [], ev.evaluate_together

    def noted(*args):
        measured.append(evaluate(*args)[0])
        return measured[-1:] * 2

    monkeypatch.setattr(ev, "evaluate_together", noted)
    protocol = ["--split=test", "--block_size=16", "--batch_size=4", "--windows=4"]
    protocol += [f"--{name}={value}" for name, value in machine.items()]
    ev.main([str(out / "model"), f"--dataset={here.learn}", *protocol])
    (result,) = rows(out, "result")
    assert measured == [pytest.approx(result["learn"]["grown"], abs=1e-6)]


# ----- numbers: memory, windows, time -----


class LogitMemory(TorchDispatchMode):
    """Watches every operation and remembers the most bytes that float32 tensors of V columns ever held."""

    def __init__(self, V, weights):
        super().__init__()
        self.V, self.peak, self.alive = V, 0, {}
        self.weights = {
            p.untyped_storage().data_ptr() for p in weights
        }  # the head's own matrix has V columns

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            if (
                isinstance(t, torch.Tensor)
                and t.dtype == torch.float32
                and t.dim() > 1
                and t.size(-1) == self.V
            ):
                memory = t.untyped_storage()
                if memory.data_ptr() not in self.weights:  # views of one tensor count once
                    reference = StorageWeakRef(memory)
                    self.alive[reference.cdata] = reference, memory.nbytes()
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return results


@promised("The comparison of base and grown holds at most 4 float32 logit matrices at a time instead of 7, "
          "one rule for all devices.")  # fmt: skip
@pytest.mark.parametrize("versions", [1, 2, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_comparison_holds_at_most_four_logit_matrices(device, versions):
    B, T, V = 4, 16, 263  # nothing else has 263 columns
    torch.manual_seed(0)
    base, grown = (GPT(GPTConfig(V, T, 2, 8, (0,))).to(device) for _ in range(2))
    if versions > 1:
        grown = GPT(GPTConfig(V, T, 2, 8, tuple(range(versions)), versions=tuple(range(versions)))).to(device)
        base = grow.version(grown, versions - 2)
    tokens = torch.randint(V, (3 * B * T,)).numpy().astype("uint16")
    with LogitMemory(V, [*base.parameters(), *grown.parameters()]) as memory:
        ev.compare(base, grown, tokens, T, B)
    matrices = memory.peak / (B * T * V * 4)
    assert 0 < matrices <= 4


@pytest.fixture(scope="module")
def many_windows(here, tmp_path_factory):
    """A run that may use 60 windows a text, and a retained text whose test split has fewer."""
    folder = tmp_path_factory.mktemp("t")
    short = folder / "short.txt"
    short.write_text("\n".join(f"line {i} of few" for i in range(700)))
    train.main(arguments(here, folder / "run", retain=short, test_windows=60))
    ids = len(data.load(str(short), BYTES, 16)["test"])
    # the last window may be short, but one token alone predicts nothing
    return folder / "run", -(-ids // 16) - (ids % 16 == 1)


TEXT_WINDOWS = "Each text's row says how many windows it used."


@promised(TEXT_WINDOWS)
def test_result_says_how_many_windows_each_text_used(many_windows):
    run, few = many_windows
    (result,) = rows(run, "result")
    assert few < 60
    assert result["learn"].get("windows") == 60 and result["retain"].get("windows") == few
    assert result["learn"]["mixed"] is None and result["retain"]["mixed"] is None  # for what comes next


@promised(TEXT_WINDOWS)
def test_table_says_how_many_windows_each_text_used(many_windows, capsys):
    run, few = many_windows
    ev.main([str(run)])
    cells = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    for text, count in (("learn", 60), ("retain", few)):
        assert any(row[1].startswith(text) and str(count) in row for row in cells if len(row) > 3), text


@promised(TEXT_WINDOWS)
def test_a_text_that_was_not_measured_has_nulls(here, tmp_path):
    train.main(arguments(here, tmp_path / "run", retain="none"))
    (result,) = rows(tmp_path / "run", "result")
    unknown = dict.fromkeys(("windows", "base", "grown", "mixed", "kl"))
    assert result["retain"] == {"dataset": "none", **unknown}


@promised("--test_windows defaults to 2,500 a text.")
def test_default_of_test_windows(here, tmp_path):
    train.main(arguments(here, tmp_path / "run", test_windows=None, max_steps=1, **PLAIN))
    (header,) = rows(tmp_path / "run", "header")
    assert header["config"]["test_windows"] == 2500


@promised("Progress and time left are shown while base and grown are compared.")
def test_progress_of_the_comparison_is_shown(here, tmp_path, monkeypatch, capsys):
    """With clocks that run fast, as if every batch took long: a comparison of a second needs no progress."""
    now = [time.time()]

    def later():
        now[0] += 5.0
        return now[0]

    for clock in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, clock, later)
    compare = ev.compare

    def marked(*args, **more):
        print("COMPARISON", flush=True)
        print("COMPARISON", file=sys.stderr, flush=True)
        result = compare(*args, **more)
        return result

    monkeypatch.setattr(ev, "compare", marked)
    train.main(arguments(here, tmp_path / "run", test_windows=60))
    printed = capsys.readouterr()
    during = "".join(
        stream.partition("COMPARISON")[2].partition("\n| ")[0] for stream in (printed.out, printed.err)
    )
    assert re.search(r"\d+ ?(/|of) ?\d+|\d ?%", during) and re.search(r"\bleft\b", during)


# ----- numbers: replay, gain, options, resume -----


@promised("A --replay that is not whole rows is refused with the nearest that is.")
@pytest.mark.parametrize(
    "replay, batch_size, grad_accum, nearest",
    [
        (0.2, 8, 1, "0.25"),
        (0.3, 4, 1, "0.25"),
        (0.26, 5, 2, "0.3"),
        (0.62, 4, 2, "0.625"),
        (0.01, 8, 1, "0.125"),
        (0.99, 8, 1, "0.875"),  # never no row at all, never all rows
    ],
)
def test_replay_of_part_of_a_row_is_refused(here, tmp_path, replay, batch_size, grad_accum, nearest):
    rows_asked = dict(replay=replay, batch_size=batch_size, grad_accum=grad_accum)
    argv = arguments(here, tmp_path / "run", max_steps=1, **PLAIN, **rows_asked)
    refused(train.main, argv, "--replay", rf"(?<![\d.]){re.escape(nearest)}(?!\d)", kind=UsageError)


@pytest.mark.parametrize("replay, batch_size", [(0.7, 5), (0.1, 5), (0.25, 2), (0.5, 1), (0.28, 25)])
def test_replay_of_whole_rows_is_accepted(here, tmp_path, replay, batch_size):
    """0.28 of 50 rows is 14, though 0.28 * 50 is 14.000000000000002 in floating point."""
    more = dict(replay=replay, batch_size=batch_size, grad_accum=2)
    train.main(arguments(here, tmp_path / "run", max_steps=1, **PLAIN, **more))


def test_nearest_replay_is_accepted_as_it_was_said(here, tmp_path):
    """A third has no last digit."""
    more = dict(batch_size=3, max_steps=1, **PLAIN)
    sentence = refused(train.main, arguments(here, tmp_path / "run", replay=0.3, **more))
    nearest = re.search(r"give --replay=(\S+)", sentence)[1]
    train.main(arguments(here, tmp_path / "run", replay=nearest, **more))


@promised("Gain is per million parameters that trained.")
@pytest.mark.parametrize("freeze", ["none", "base"])
def test_gain_is_per_million_parameters_that_trained(here, tmp_path, capsys, freeze):
    """After the last of two growths: all parameters train, or the two grown blocks do."""
    train.main(arguments(here, tmp_path / "run", freeze=freeze))
    said(capsys)
    ev.main([str(tmp_path / "run"), "--json"])
    (printed,) = json.loads(capsys.readouterr().out, parse_constant=constant)
    weights = load_file(tmp_path / "run/model/model.safetensors")
    # the two growths went in at different places, but all blocks are equally large
    block = sum(w.numel() for name, w in weights.items() if name.startswith("h.0."))
    trained = 2 * block if freeze == "base" else sum(w.numel() for w in weights.values())
    fell = rows(tmp_path / "run", "event")[-1]["learn_after"] - rows(tmp_path / "run", "eval")[-1]["learn"]
    assert printed["scaling"][-1]["gain_per_million"] == pytest.approx(fell / (trained / 1e6))


@promised("The card's table shows the options of the last start.")
def test_model_card_shows_the_options_of_the_last_start(here, tmp_path):
    train.main(arguments(here, tmp_path / "run", max_steps=5))
    train.main([*arguments(here, tmp_path / "run", max_steps=8, log_every=3), "--resume"])
    card = (tmp_path / "run/model/README.md").read_text()
    assert re.search(r"--max_steps\W+8\b", card) and re.search(r"--log_every\W+3\b", card)
    assert not re.search(r"--max_steps\W+5\b", card)


LONGER = {  # growing options, old end, new end; at the old end there is an evaluation that no one else makes
    "schedule": (dict(), 5, 11),
    "schedule due at the old end": (dict(), 6, 11),
    "plateau": (dict(trigger="plateau", grow_every=None, patience=5, min_delta=NEVER, eval_every=4), 6, 26),
}


@pytest.mark.parametrize("case", [
    "schedule", "schedule due at the old end",
    pytest.param("plateau", marks=promised("More max_steps on resume: growths fall where they would have "
                                           "without the stop, or it is refused.")),
])  # fmt: skip
def test_more_steps_on_resume_grow_where_one_run_would(here, tmp_path, case):
    more, old_end, new_end = LONGER[case]
    train.main(arguments(here, tmp_path / "whole", **{**more, "max_steps": new_end}))
    train.main(arguments(here, tmp_path / "parts", **{**more, "max_steps": old_end}))
    try:
        train.main([*arguments(here, tmp_path / "parts", **{**more, "max_steps": new_end}), "--resume"])
    except UserError as e:
        assert "--max_steps" in str(e)
    else:
        whole, parts = (
            [(e["step"], e["at"]) for e in rows(tmp_path / o, "event")] for o in ("whole", "parts")
        )
        assert whole == parts and len(whole) == 2


# ----- growth -----

LAST_STEP = "No block is inserted at the last step, where it can never train."
FEWER = "Fewer growths than asked are said at the end (1 of 3 growths happened: ...)."


@promised(LAST_STEP)
@pytest.mark.parametrize("more", [dict(), dict(PLATEAU, patience=3, eval_every=3, min_delta=NEVER)])
def test_no_growth_at_the_last_step(here, tmp_path, more):
    train.main(arguments(here, tmp_path / "run", **{**more, "max_steps": 6}))
    assert growths(tmp_path / "run") == [3]
    (result,) = rows(tmp_path / "run", "result")
    assert result["layers"] == 3


@promised(LAST_STEP)
def test_no_run_ends_with_an_untrained_block(here, tmp_path):
    """A first growth that is due at the last step: refused, or a run without growth."""
    try:
        train.main(arguments(here, tmp_path / "run", max_steps=3))
    except UsageError as e:
        assert "--grow_every" in str(e) or "--max_steps" in str(e)
    else:
        assert growths(tmp_path / "run") == []


@promised(FEWER)
@pytest.mark.parametrize("happened, more", [
    (1, dict(max_steps=6)), (2, dict(max_steps=8)), (0, dict(PLATEAU, patience=6)),
])  # fmt: skip
def test_fewer_growths_than_asked_are_said_at_the_end(here, tmp_path, capsys, happened, more):
    train.main(arguments(here, tmp_path / "run", **{"max_growths": 3, **more}))
    printed = said(capsys)
    last_step = [match.start() for match in re.finditer(r"^step \d+/\d+", printed, re.M)][-1]
    assert re.search(rf"\b{happened} of 3 growths happened: \w", printed[last_step:])
    assert len(growths(tmp_path / "run")) == happened


def test_all_growths_that_were_asked_need_no_word(here, tmp_path, capsys):
    train.main(arguments(here, tmp_path / "run"))
    assert "growths happened" not in said(capsys) and growths(tmp_path / "run") == [3, 6]


@promised("insert_block follows the model's dtype.")
@pytest.mark.parametrize("init", ["copy", "fresh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inserted_block_has_the_dtype_of_the_model(dtype, init):
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, 16, 2, 8, (0, 0))).to(dtype).eval()
    idx = torch.randint(61, (2, 16))
    with torch.no_grad():
        before = model(idx)[0]
        block = grow.insert_block(model, 1, init)
        assert {p.dtype for p in block.parameters()} == {dtype}
        assert torch.equal(model(idx)[0], before)
    assert block.attn.c_attn.weight.any()  # it is the identity because of its projections alone


def test_two_blocks_at_one_growth(here, tmp_path, capsys, monkeypatch):
    """A fork whose insert_block inserts two: every count must come from the network, none from "one more"."""
    insert = grow.insert_block

    def insert_two(model, at, *args, **more):
        insert(model, at, *args, **more)
        block = insert(model, at, *args, **more)
        *_, newest = sorted(model.config.generation)
        generation = (g - (g == newest) for g in model.config.generation)  # both are of one generation
        model.config.generation = tuple(generation)
        return block

    monkeypatch.setattr(grow, "insert_block", insert_two)
    train.main(arguments(here, tmp_path / "run"))
    (header,), (result,) = rows(tmp_path / "run", "header"), rows(tmp_path / "run", "result")
    events = rows(tmp_path / "run", "event")
    assert [(e["layers_before"], e["layers_after"]) for e in events] == [(2, 4), (4, 6)]
    assert sum(e["parameters_added"] for e in events) == result["parameters"] - header["parameters"]
    said(capsys)
    ev.main([str(tmp_path / "run")])
    assert "2 -> 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "patience, first_growth, expected", [(4, 6, [6, 10]), (2, 5, [5, 7]), (3, 7, [7, 10])]
)
def test_plateau_counts_before_its_first_growth(here, tmp_path, patience, first_growth, expected):
    """The loss never falls enough, so that patience is over long before the first growth is allowed."""
    more = dict(PLATEAU, patience=patience, first_growth=first_growth, min_delta=NEVER, max_steps=12)
    train.main(arguments(here, tmp_path / "run", **more))
    assert growths(tmp_path / "run") == expected


# ----- options that would do nothing -----

WITHOUT_KD = "Refused if typed: kd_temperature, kd_on, kd_rows, dreams without kd_weight."
WITHOUT_PLATEAU = "Refused if typed: patience, min_delta without a plateau; grow_every with one."
WITH_FOLDER = "Refused if typed: n_layer, n_head, n_embd, tokenizer with a folder."
TOO_LATE = "Refused: a plateau whose first_growth is beyond the last step."
NO_GROWTH = "An option that was typed and would do nothing in this run is refused by name."
# fmt: off
REFUSED = [  # what is typed, the option that must be named, the sentence
    (dict(kd_temperature=3), "kd_temperature", WITHOUT_KD),
    (dict(kd_on="retain"), "kd_on", WITHOUT_KD),
    (dict(kd_rows=2), "kd_rows", WITHOUT_KD),
    (dict(dreams=8), "dreams", WITHOUT_KD),
    (dict(kd_weight=1, kd_on="train", kd_rows=2), "kd_rows", WITHOUT_KD),
    (dict(kd_weight=1, kd_on="retain", dreams=8), "dreams", WITHOUT_KD),
    (dict(patience=2), "patience", WITHOUT_PLATEAU),
    (dict(min_delta=0.1), "min_delta", WITHOUT_PLATEAU),
    (dict(PLATEAU, grow_every=3), "grow_every", WITHOUT_PLATEAU),
    (dict(ewc_batches=2), "ewc_batches", "Refused if typed: ewc_batches without ewc_lambda."),
    (dict(n_layer=2), "n_layer", WITH_FOLDER),
    (dict(n_head=2), "n_head", WITH_FOLDER),
    (dict(n_embd=16), "n_embd", WITH_FOLDER),
    (dict(tokenizer="bytes"), "tokenizer", WITH_FOLDER),
    (dict(lr=0), "lr", "Refused if typed: lr 0."),
    (dict(retain="DATASET"), "retain", "Refused if typed: retain = dataset."),
    (dict(PLATEAU, first_growth=7), "first_growth", TOO_LATE),
    (dict(PLATEAU, first_growth=9), "first_growth", TOO_LATE),
    (dict(PLAIN, where="top"), "where", NO_GROWTH),
    (dict(PLAIN, block_init="fresh"), "block_init", NO_GROWTH),
    (dict(PLAIN, freeze="older"), "freeze", NO_GROWTH),
    (dict(PLAIN, grow_every=3), "grow_every", NO_GROWTH),
    (dict(PLAIN, first_growth=3), "first_growth", NO_GROWTH),
    (dict(PLAIN, trigger="plateau"), "trigger", NO_GROWTH),
    (dict(max_growths=1, first_growth=0, grow_every=3), "grow_every", NO_GROWTH),
    (dict(PLATEAU, max_growths=1, first_growth=0), "patience", NO_GROWTH),
]
# fmt: on


@pytest.mark.parametrize("typed, option", [
    pytest.param(typed, option, marks=promised(sentence), id="-".join(map(str, [option, *typed.values()])))
    for typed, option, sentence in REFUSED
])  # fmt: skip
def test_option_that_would_do_nothing_is_refused(here, tmp_path, typed, option):
    typed = {name: here.learn if value == "DATASET" else value for name, value in typed.items()}
    refused(train.main, arguments(here, tmp_path / "run", **typed), rf"--{option}\b", kind=UsageError)
    assert not (tmp_path / "run").exists()


ACCEPTED = {
    "distilled on the batch": dict(kd_weight=1, kd_temperature=3),
    "distilled on old rows": dict(kd_weight=1, kd_on="retain", kd_rows=2),
    "distilled on dreams": dict(kd_weight=1, kd_on="dream", kd_rows=2, dreams=8),
    "plateau": dict(PLATEAU, min_delta=0.1, first_growth=4),
    "EWC": dict(ewc_lambda=1, ewc_batches=2, freeze="none"),
    "some originals frozen without growth": dict(PLAIN, freeze="top1"),
    "network from scratch": SCRATCH,
    "one growth": dict(max_growths=1, grow_every=3),
    "one growth at its own step": dict(max_growths=1, first_growth=2, grow_every=None),
    "a plateau that is not asked": dict(
        PLATEAU, max_growths=1, first_growth=0, patience=None, min_delta=None
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_option_that_does_something_is_accepted(here, tmp_path, name):
    train.main(arguments(here, tmp_path / "run", **ACCEPTED[name]))
    assert rows(tmp_path / "run", "result")


@promised("An EWC that the freeze makes zero is said when it happens.")
def test_ewc_that_the_freeze_makes_zero_is_said(here, tmp_path, capsys):
    train.main(arguments(here, tmp_path / "run", ewc_lambda=1, ewc_batches=2, freeze="base"))
    grew = said(capsys).partition("grew 2 -> 3")[2].splitlines()
    lines = [line for line in grew if "ewc" in line.lower() and " lr " not in line]  # no log line of a step
    assert any(re.search("zero|nothing|no longer|frozen|never|no effect| 0", line, re.I) for line in lines)


# ----- command lines that a careful person would answer -----

ANSWER = "Each gets the answer a careful person would give"


@promised(f"A preset after an option: {ANSWER}.")
@pytest.mark.parametrize("argv", [["--max_steps=2", "demo"], ["card", "--lr=1e-3", "demo"]])
def test_preset_after_an_option(argv):
    refused(train.main, argv, r"\bdemo\b", "preset", "first|before|begin", kind=UsageError)


@promised(f"`--demo`: {ANSWER}.")
def test_preset_typed_as_an_option(here):
    refused(train.main, ["--demo"], r"preset|train\.py demo", r"(?<!-)\bdemo\b", kind=UsageError)


def test_resume_with_a_word_behind_it():
    """It is taken for its value."""
    answer = "none of no, yes, auto"
    refused(train.main, ["demo", "--resume", "best"], r"\bbest\b", answer, kind=UsageError)


@pytest.mark.parametrize("value", ["maybe", "1", "True"])
def test_resume_takes_yes_no_auto_or_nothing(value):
    refused(
        train.main, [f"--resume={value}"], "--resume", r"\byes\b", r"\bno\b", r"\bauto\b", kind=UsageError
    )


@promised("`--resume --lr=...` (another run: say which folder differs).")
def test_resume_with_another_option_names_both_folders(here, tmp_path, monkeypatch):
    """The folder's name comes from the options, so another option looks for a run in another folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(here.net, "net")
    shutil.copy(here.learn, "a.txt")
    options = ["--init=net", "--dataset=a.txt", "--retain=none", "--block_size=16", "--max_growths=0"]
    short = ["--max_steps=2", "--device=cpu"]  # what names no folder
    train.main([*options, *short])
    (made,) = [path.name for path in (tmp_path / "out").iterdir()]
    sentence = refused(train.main, [*options, "--lr=0.02", *short, "--resume"], "lr=0.02", kind=UsageError)
    assert re.search(re.escape(made) + r"(?![\w=-]|\.\d)", sentence), f"{made} is not named in: {sentence}"


@promised(f"A data set name that is also a folder here: {ANSWER}.")
def test_data_set_name_that_is_also_a_folder(here, tmp_path, monkeypatch, capsys):
    """Say which is taken, and how to name the other."""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    shutil.copy(here.learn, "docs")
    answer = ""
    try:
        train.main(arguments(here, tmp_path / "run", dataset="docs", max_steps=1, **PLAIN))
    except UserError as e:
        answer = str(e)
    assert re.search(r"(?<![\w.])\./docs", answer + said(capsys))


def test_folder_is_named_by_its_path(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    shutil.copy(here.learn, "docs")
    train.main(arguments(here, tmp_path / "run", dataset="./docs", max_steps=1, **PLAIN))
    (header,) = rows(tmp_path / "run", "header")
    assert header["tokens"]["learn"]["train"] == len(data.load(here.learn, BYTES, 16)["train"])


@promised(f"A text of one line: {ANSWER}.")
def test_text_of_one_line(here, tmp_path):
    """Texts are cut at line ends; this one has none. It is cut elsewhere, or refused for that reason."""
    path = tmp_path / "one.txt"
    path.write_text(Path(here.learn).read_text().replace("\n", " "))
    try:
        train.main(arguments(here, tmp_path / "run", dataset=path, max_steps=1, **PLAIN))
    except UserError as e:
        assert str(path) in str(e) and re.search(r"\blines?\b", str(e)), e
    else:
        (header,) = rows(tmp_path / "run", "header")
        assert all(count >= 2 for count in header["tokens"]["learn"].values())


@promised(f"An empty folder, a folder of .rst: {ANSWER}.")
@pytest.mark.parametrize("files", [[], ["a.rst", "b.rst"]])
def test_folder_without_a_text_that_is_read(here, tmp_path, files):
    """Say what is read; "too short" is not what is wrong with it."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in files:
        shutil.copy(here.learn, folder / name)
    sentence = refused(
        train.main, arguments(here, tmp_path / "run", dataset=folder), str(folder), r"\.txt", r"\.md"
    )
    assert "too short" not in sentence


SEVERAL = f"Several runs in eval.py of which one is unfinished (show the others): {ANSWER}."


@promised(SEVERAL)
@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize("order", [0, 1])
def test_an_unfinished_run_among_several(here, capsys, more, order):
    """The others are shown on stdout, whole; the unfinished one is named on stderr."""
    runs = [here.run, here.unfinished, here.run]
    answer = ""
    try:
        ev.main([*runs[order:][:2], *more])
    except UserError as e:
        answer = str(e)  # would be printed on stderr
    printed = capsys.readouterr()
    (result,) = rows(here.run, "result")
    if more:
        assert printed.out, "nothing is shown"
        (shown,) = json.loads(printed.out, parse_constant=constant)
        assert shown["learn"]["grown"] == result["learn"]["grown"]
    assert more or f"{result['learn']['grown']:.4f}" in printed.out
    answer += printed.err
    assert here.unfinished in answer and "finish" in answer


def test_an_unfinished_run_alone_is_refused(here):
    refused(ev.main, [here.unfinished], here.unfinished, "finish", "--resume")


@promised(f"RUN where RUN/model is meant in --init: {ANSWER}.")
def test_init_with_a_run_instead_of_its_model(here, tmp_path, capsys):
    try:
        train.main(arguments(here, tmp_path / "run", init=here.run, max_steps=1, **PLAIN))
    except UserError as e:
        assert f"{here.run}/model" in str(e), e
    else:
        (header,) = rows(tmp_path / "run", "header")
        assert header["layers"] == 4 and f"{here.run}/model" in said(capsys)


@promised(f"Sampling from an unfinished run: {ANSWER}.")
def test_sampling_from_an_unfinished_run(here):
    refused(ev.main, [here.unfinished, "--prompt=grow"], here.unfinished, "finish", "--resume")


@promised("A bad --plot path (before the tables).")
@pytest.mark.parametrize("name", ["nowhere/plot.png", "plot.nope"])
def test_bad_plot_path_is_said_before_the_tables(here, tmp_path, capsys, name):
    pytest.importorskip("matplotlib")
    said(capsys)
    refused(ev.main, [here.run, f"--plot={tmp_path / name}"], re.escape(str(tmp_path / name)))
    assert capsys.readouterr().out == ""


@promised(f"--json and --plot with --dataset: {ANSWER}.")
@pytest.mark.parametrize("typed", ["--json", "--plot=plot.png"])
def test_options_of_tables_with_a_dataset(here, tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    option = typed.partition("=")[0]
    argv = [here.run, f"--dataset={here.learn}", "--windows=2", typed]
    refused(ev.main, argv, option, kind=UsageError)


ABSOLUTE = {
    "dataset": (train.main, dict(dataset="nothing.txt"), "nothing.txt"),
    "retain": (train.main, dict(retain="nothing.txt"), "nothing.txt"),
    "init": (train.main, dict(init="nowhere"), "nowhere"),
    "resume": (train.main, dict(out="nowhere", resume="yes"), "nowhere"),
    "eval": (ev.main, ["nowhere"], "nowhere"),
    "eval dataset": (ev.main, ["nowhere", "--dataset=nothing.txt"], "nothing.txt"),
}


@promised("Absolute paths where a relative one failed.")
@pytest.mark.parametrize("case", ABSOLUTE)
def test_relative_path_that_failed_is_shown_absolute(here, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    main, typed, name = ABSOLUTE[case]
    argv = typed if main is ev.main else arguments(here, **{"out": tmp_path / "run", **typed})
    refused(main, argv, re.escape(str(tmp_path / name)))


# ----- without a network -----


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache folder, as an option, and a network that answers nothing."""

    def unreachable(*args, **more):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", unreachable)
    yield f"--cache_dir={tmp_path / 'cache'}"
    data.set_cache_dir(os.environ["GROWING_GPT_CACHE"])  # that of the other tests


@promised("The no-network message begins with what to do.")
@pytest.mark.parametrize("missing", ["weights", "data set"])
def test_no_network_message_begins_with_what_to_do(here, tmp_path, offline, missing):
    changes = dict(init="gpt2") if missing == "weights" else dict(dataset="wikitext2")
    sentence = refused(train.main, [*arguments(here, tmp_path / "run", **changes), offline])
    start = " ".join(sentence.split()[:8])
    assert re.search(r"\b(put|run|copy|place|download|connect|give|get|try)\b", start, re.I), start


@promised("The no-network message begins with what to do.")
def test_no_tokenizer_message_begins_with_what_to_do(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    net = GPT(GPTConfig(50257, 2, 1, 2, (0,)))
    with pytest.raises(UserError) as e:
        net.save_pretrained(tmp_path / "net")
    start = " ".join(str(e.value).split()[:8])
    assert re.search(r"\b(put|run|copy|place|download|connect|give|get|try)\b", start, re.I), start


@promised("WebText's val and test are one text: tokenise once.")
def test_webtext_is_tokenised_once(here, tmp_path, monkeypatch, offline):
    """Files of the published sizes, put by hand: each text must go through the tokenizer one time."""
    (tmp_path / "cache").mkdir()
    repeats = 180_000
    for split, size in (("valid", 13_622_302), ("test", 13_478_245)):
        line = json.dumps({"text": f"{split} of the web\n" * repeats})
        three = (line + "\n") * 3
        (tmp_path / f"cache/webtext.{split}.jsonl").write_text(three + line.ljust(size - len(three)))
    counts, encode = [], data.encode
    monkeypatch.setattr(data, "encode", lambda text, *args: counts.append(len(text)) or encode(text, *args))
    train.main([*arguments(here, tmp_path / "run", retain="webtext", max_steps=1, **PLAIN), offline])
    valid, test = (4 * repeats * len(f"{split} of the web\n") for split in ("valid", "test"))
    assert valid + test <= sum(counts) < valid + test + 100_000  # the rest is the small text that is learned


# ----- checkpoints, locks, interruptions -----


@promised("An old ckpt.pt is refused: which format is read, and that model/ can be given to --init.")
@pytest.mark.parametrize("version", [1, 2])
def test_old_checkpoint_is_refused(here, tmp_path, version):
    """It is not damaged: it is of another time, and its result can still be used."""
    shutil.copytree(here.run, tmp_path / "run")
    torch.save({"version": version, "step": 7, "model": {}, "optimizer": {}}, tmp_path / "run/ckpt.pt")
    argv = [*arguments(here, tmp_path / "run"), "--resume"]
    sentence = refused(train.main, argv, "ckpt.pt", "format|version", r"\bmodel\b", "--init")
    assert "damaged" not in sentence


TWO = "Two processes on one --out: the second is refused (flock on RUN/lock), not interleaved."
OTHER = "process|running|in use|locked"  # how the one that is refused may say why


@promised(TWO)
def test_second_process_on_a_run_is_refused(here, tmp_path):
    """Two real processes. The second must say why it does not start, and the first goes on undisturbed."""
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    changes = dict(max_steps=1_000_000, eval_every=1_000_000, log_every=20, grow_every=500_000)
    command = [sys.executable, str(ROOT / "train.py"), *arguments(here, out, **changes)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = subprocess.Popen(command, **pipes)
    second = subprocess.Popen([*command, "--resume"], **pipes)
    try:
        second.send_signal(signal.SIGSTOP)  # until the first is under way
        assert any(line.startswith("step 20/") for line in first.stdout), "the first process did not train"
        second.send_signal(signal.SIGCONT)
        trains = any(line.startswith("step ") for line in second.stdout)  # else read to its end
        assert not trains, "the second process trains, too"
        assert second.wait() in (1, 2) and first.poll() is None
        refusal = second.stderr.read()
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    (sentence,) = [line for line in refusal.splitlines() if line.startswith("error: ")]
    assert re.search(OTHER, sentence) and str(out) in sentence and "Traceback" not in refusal
    steps = [row["step"] for row in rows(out, "step")]
    assert steps == sorted(set(steps))


HOLD = """
import fcntl, sys
f = open(sys.argv[1], "w")
fcntl.flock(f, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


@promised(TWO)
def test_lock_is_respected_and_released_by_a_kill(here, tmp_path):
    """The lock of a process that was killed is no lock: nothing is left to clean up by hand."""
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    out.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, out / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        refused(train.main, arguments(here, out), OTHER, re.escape(str(out)))
    finally:
        holder.kill()
        holder.communicate()
    train.main(arguments(here, out))
    assert rows(out, "result")


@promised(TWO)
def test_lock_is_held_from_the_first_evaluation_to_the_comparison(here, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    held = []

    def noting(measure):
        def note(*args, **more):
            with open(tmp_path / "run" / "lock", "a") as f:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(True)
                else:
                    held.append(False)
            return measure(*args, **more)

        return note

    monkeypatch.setattr(ev, "evaluate", noting(ev.evaluate))
    monkeypatch.setattr(ev, "compare", noting(ev.compare))
    train.main(arguments(here, tmp_path / "run"))
    assert len(held) > 3 and all(held)
    with open(tmp_path / "run" / "lock", "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


@promised("Where the system has no flock, one sentence says so.")
def test_system_without_locks_is_told(here, tmp_path):
    program = "import sys; sys.modules['fcntl'] = None; sys.path.insert(0, sys.argv[1]); import train"
    program += "; train.main(sys.argv[2:])"
    argv = arguments(here, tmp_path / "run", max_steps=1, **PLAIN)
    done = subprocess.run([sys.executable, "-c", program, ROOT, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [
        line for line in (done.stdout + done.stderr).splitlines() if re.search(r"\block|two processes", line)
    ]
    assert len(lines) == 1


@pytest.fixture
def interrupted(here, tmp_path, monkeypatch, capsys):
    """A run to which Ctrl-C comes in the final comparison: its folder, and all it said."""
    compare, times = ev.compare, []

    def interrupt(*args, **more):
        times.append(1)
        if len(times) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return compare(*args, **more)

    monkeypatch.setattr(ev, "compare", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    answer = ""
    try:
        train.main(arguments(here, tmp_path / "run"))
    except (KeyboardInterrupt, SystemExit):
        pass
    except UserError as e:
        answer = str(e)
    finally:
        signal.signal(signal.SIGINT, handler)
    return tmp_path / "run", answer + said(capsys)


@promised("Ctrl-C in the final comparison says that the run is saved and --resume redoes the tables.")
def test_interrupted_comparison_says_how_to_get_the_tables(interrupted):
    run, answer = interrupted
    assert not rows(run, "result")
    last = answer[answer.rindex("validation:") :]
    assert re.search(r"\bsaved\b", last) and "--resume" in last


def test_interrupted_comparison_is_redone(here, interrupted, capsys):
    run, _ = interrupted
    assert not rows(run, "result")
    train.main([*arguments(here, run), "--resume"])
    (result,), (uninterrupted,) = rows(run, "result"), rows(here.run, "result")
    assert result["learn"] == uninterrupted["learn"] and (run / "model").exists()


# ----- other people's files -----


def save_changed(here, folder, change):
    """The tiny network in Hugging Face's format, after change({name: tensor}); returns the good tensors."""
    shutil.copytree(here.net, folder)
    good = load_file(folder / "model.safetensors")
    changed = {name: tensor.clone() for name, tensor in good.items()}
    change(changed)
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return good


def add_masks(kind):
    mask = torch.ones(16, 16, dtype=torch.uint8).tril().view(1, 1, 16, 16).to(kind)
    return lambda tensors: tensors.update({f"h.{i}.attn.bias": mask.clone() for i in range(2)})


HF_LOADS = "Hugging Face checkpoints with uint8 or bool causal masks or bfloat16 weights load."


@pytest.mark.parametrize("kind", [
    pytest.param(torch.uint8, marks=promised(HF_LOADS)), pytest.param(torch.bool, marks=promised(HF_LOADS)),
    torch.float32, torch.float16,
])  # fmt: skip
def test_causal_masks_of_any_kind_are_left_out(here, tmp_path, kind):
    good = save_changed(here, tmp_path / "net", add_masks(kind))
    model = GPT.from_pretrained(tmp_path / "net")
    assert torch.equal(model.wte.weight, good["wte.weight"])
    assert torch.equal(model.h[1].mlp.c_fc.weight, good["h.1.mlp.c_fc.weight"].t())


@promised(HF_LOADS)
def test_bfloat16_weights_load(here, tmp_path):
    def halve(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    good = save_changed(here, tmp_path / "net", halve)
    model = GPT.from_pretrained(tmp_path / "net")
    for name, p in model.named_parameters():
        stored = good[name].t() if ".c_" in name and p.dim() == 2 else good[name]
        assert p.dtype == torch.float32 and torch.equal(p, stored.bfloat16().float()), name


@promised("An untied head is refused.")
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_untied_head_is_refused(here, tmp_path, prefix):
    """Leaving it out would load another network, without a word."""

    def untie(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"] + 0.1

    save_changed(here, tmp_path / "net", untie)
    with pytest.raises(UserError) as e:
        GPT.from_pretrained(tmp_path / "net")
    assert "lm_head" in str(e.value) and "damaged" not in str(e.value)


def test_tied_head_is_read(here, tmp_path):
    good = save_changed(
        here, tmp_path / "net", lambda t: t.update({"lm_head.weight": t["wte.weight"].clone()})
    )
    assert torch.equal(GPT.from_pretrained(tmp_path / "net").wte.weight, good["wte.weight"])


DAMAGED = '"damaged" is said only of what is damaged.'


@promised(DAMAGED)
@pytest.mark.parametrize("kind", [torch.int8, torch.int64])
def test_weights_of_an_unknown_kind_are_not_damaged(here, tmp_path, kind):
    save_changed(
        here, tmp_path / "net", lambda tensors: tensors.update({"wte.weight": tensors["wte.weight"].to(kind)})
    )
    with pytest.raises(UserError, match="model.safetensors") as e:
        GPT.from_pretrained(tmp_path / "net")
    assert "damaged" not in str(e.value)


@promised(DAMAGED)
@pytest.mark.parametrize("key, value", [("activation_function", "relu"), ("layer_norm_epsilon", 1e-6)])
def test_another_architecture_is_not_damaged(here, tmp_path, key, value):
    shutil.copytree(here.net, tmp_path / "net")
    path = tmp_path / "net/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=key) as e:
        GPT.from_pretrained(tmp_path / "net")
    assert "damaged" not in str(e.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_files_are_called_damaged(here, tmp_path, name):
    shutil.copytree(here.net, tmp_path / "net")
    raw = (tmp_path / "net" / name).read_bytes()
    (tmp_path / "net" / name).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=f"{name}.*damaged"):
        GPT.from_pretrained(tmp_path / "net")


STRICT = "metrics.jsonl is strict JSON."


@promised(STRICT)
def test_log_of_a_scaled_run_is_strict_json(here, tmp_path):
    """The first scales are too large: those steps are skipped, and have no gradient norm.

    A gain of 30 in the final norm makes the blocks' gradients large: times 65,536 they are infinite."""
    net = GPT.from_pretrained(here.net)
    with torch.no_grad():
        net.ln_f.weight.fill_(30)
    net.save_pretrained(tmp_path / "net")
    train.main(arguments(here, tmp_path / "run", init=tmp_path / "net", dtype="float16", max_steps=12))
    try:
        norms = [row["norm"] for row in rows(tmp_path / "run", "step")]
    except ValueError as e:
        pytest.fail(str(e))
    assert norms[0] is None and norms[-1] > 0


def test_log_of_a_run_is_strict_json(here):
    for kind in ("header", "step", "eval", "event", "result"):
        assert rows(here.run, kind)


# ----- what a user expects -----


@pytest.fixture(scope="module")
def output(here, tmp_path_factory):
    """What a run prints on stdout, and its folder. Its network is from scratch, which takes more options."""
    out = tmp_path_factory.mktemp("t") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(arguments(here, out, **SCRATCH))
    return printed.getvalue(), out


@promised("Each log line has the time left.")
def test_each_log_line_has_the_time_left(output):
    lines = [line for line in output[0].splitlines() if re.match(r"step \d+/\d+ .*\blr ", line)]
    assert len(lines) == 7 and all(re.search(r"\d+ ?(s|min|h|:\d+).*\bleft\b", line) for line in lines)


@promised("The option dump is one short line of what differs from the preset.")
def test_option_dump_is_what_differs_from_the_preset(output):
    before_training = output[0].partition("step 0/")[0].splitlines()
    (dump,) = [line for line in before_training if "--batch_size=4" in line]
    assert "--n_embd=16" in dump and "--lr=0.01" in dump and "--max_steps=7" in dump
    for same in ("weight_decay", "grad_clip", "kd_temperature", "freeze", "resume", "seed", "dropout"):
        assert not any(f"--{same}" in line for line in before_training), same
    assert sum("--n_embd" in line for line in before_training) == 1


def test_whole_set_of_options_is_in_the_log(output):
    (header,) = rows(output[1], "header")
    expected = {"batch_size": 4, "n_embd": 16, "lr": 0.01, "weight_decay": 0.01, "freeze": "base", "seed": 0}
    assert header["config"].items() >= expected.items()


@promised("A run ends with where things are and how to go on (tables, --plot, --prompt).")
def test_run_ends_with_where_things_are_and_how_to_go_on(output):
    printed, out = output
    end = printed[printed.rindex("\n|") :].partition("\n")[2].partition("\n")[2]  # below the last table
    for needed in (f"{out}/model", f"eval.py {out}", "--plot", "--prompt"):
        assert needed in end, needed
