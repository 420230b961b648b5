"""What a person types and sees: refusals, words that must be there, signals, and going on after a stop.

(Ranges and choices of train.py's options: test_train.py. Texts and files that are refused: test_data.py.)"""

import os
import re
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    BYTES,
    PLAIN,
    SCRATCH,
    TINY,
    finished,
    old_text,
    on_step,
    program,
    rows,
    table,
    typed,
    write_words,
)

import data
import eval as ev
import grow
import train
from data import UserError
from model import GPT, GPTConfig

PLATEAU = dict(trigger="plateau", grow_every=None, eval_every=3)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two texts, and the folder of a tiny network."""
    folder = tmp_path_factory.mktemp("t")
    learn = write_words(folder)
    torch.manual_seed(0)
    GPT(GPTConfig(BYTES, 16, 2, 16, (0, 0))).save_pretrained(folder / "net")
    return SimpleNamespace(folder=folder, init=folder / "net", dataset=learn, retain=old_text(learn))


def arguments(here, out, *more, **changes):
    """A command line for a run of a second or less; an option that is changed to None is not typed."""
    inputs = dict(init=here.init, dataset=here.dataset, retain=here.retain)
    return typed(*more, **inputs | TINY | changes, out=out)


@pytest.fixture(scope="module")
def run(here):
    """A finished run."""
    train.main(arguments(here, here.folder / "run"))
    return here.folder / "run"


def growths(out):
    return [row["step"] for row in rows(out, "event")]


def refused(main, argv):
    """The one sentence with which `main` refuses `argv`."""
    with pytest.raises(UserError) as e:
        main([str(word) for word in argv])
    assert str(e.value) and "\n" not in str(e.value)
    return str(e.value)


# ----- what is typed wrong -----

MISUSED = [  # what argparse refuses, and the word that it must name
    (train.main, ["--max_steps=2", "demo"], "demo"),  # presets come first
    (train.main, ["card", "--lr=1e-3", "keep"], "keep"),
    (train.main, ["demo", "--resume", "best"], "best"),  # taken for its value
    (train.main, ["--resume=maybe"], "auto"),
    # would do nothing, or less than nothing
    (train.main, ["--kd_temperature=3"], "--kd_weight"),
    (train.main, ["--kd_on=retain"], "--kd_weight"),
    (train.main, ["--ewc_batches=2"], "--ewc_lambda"),
    (train.main, ["--patience=2"], "--trigger=plateau"),
    (train.main, ["--n_layer=2"], "--init=scratch"),
    (train.main, ["--max_steps=0"], "--max_steps"),
    (train.main, ["--lr=nan"], "--lr"),
    (ev.main, [], "names"),
    (ev.main, ["gpt2", "--prom=x"], "--prom"),  # no abbreviations
    (ev.main, ["gpt2", "--dataset=docs", "--split=all"], "val"),
    (ev.main, ["gpt2", "--dataset=docs", "--windows=-1"], "--windows"),
]


@pytest.mark.parametrize("main, argv, named", MISUSED)
def test_what_argparse_refuses_ends_with_status_2(main, argv, named, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv)
    printed = capsys.readouterr()
    assert e.value.code == 2 and named in printed.err and printed.out == ""


REFUSED = [  # what is typed, and the option that must be named
    # not whole rows: never no row at all, never all rows
    (dict(replay=0.2, batch_size=8), "replay"),
    (dict(replay=0.26, batch_size=5, grad_accum=2), "replay"),
    (dict(replay=0.01, batch_size=8), "replay"),
    (dict(replay=0.99, batch_size=8), "replay"),
    # is not here
    (dict(device="cuda"), "device"),
]


@pytest.mark.parametrize("options, named", REFUSED)
def test_options_that_are_refused_together(here, tmp_path, monkeypatch, options, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"--{named}" in refused(train.main, arguments(here, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


ACCEPTED = [
    # 0.28 of 50 rows is 14, though 0.28 * 50 is 14.000000000000002 in floating point
    dict(replay=0.28, batch_size=25, grad_accum=2),
    dict(replay=0.7, batch_size=5, grad_accum=2),
    dict(kd_weight=1, kd_on="generated", kd_rows=2, generated=8, kd_temperature=3),
    dict(ewc_lambda=1, ewc_batches=2),
    dict(max_growths=0, grow_every=3),  # one of a sweep over max_growths
]


@pytest.mark.parametrize("options", ACCEPTED)
def test_options_that_are_accepted(here, tmp_path, options):
    train.main(arguments(here, tmp_path / "run", **{"max_steps": 2} | PLAIN | options))
    assert rows(tmp_path / "run", "result")


def test_a_device_that_is_not_there_is_refused_by_eval(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device" in refused(ev.main, [run, "--prompt=grow", "--device=cuda"])


@pytest.mark.parametrize(
    "main, argv, name",
    [
        (train.main, dict(dataset="nothing.txt"), "nothing.txt"),
        (train.main, dict(init="nowhere"), "nowhere"),
        (train.main, dict(out="nowhere", resume="yes"), "nowhere"),
        (ev.main, ["nowhere"], "nowhere"),
        (ev.main, ["nowhere", "--dataset=nothing.txt"], "nothing.txt"),
    ],
)
def test_a_relative_path_that_failed_is_shown_absolute(here, tmp_path, monkeypatch, main, argv, name):
    monkeypatch.chdir(tmp_path)
    argv = argv if main is ev.main else arguments(here, **{"out": tmp_path / "run"} | argv)
    assert str(tmp_path / name) in refused(main, argv)


# ----- what a run says -----


def test_a_run_says_what_was_typed_and_how_to_go_on(here, tmp_path, capsys):
    """Before it trains, what differs from the preset (its log has all options); at its end, what is next."""
    out = tmp_path / "run"
    train.main(arguments(here, out, **SCRATCH))
    printed = capsys.readouterr().out
    before = printed.partition("step 0")[0].splitlines()
    (line,) = [line for line in before if "--batch_size=4" in line]
    assert "--n_embd=16" in line and "--lr=0.01" in line and "--max_steps=7" in line
    assert not any("--weight_decay" in line for line in before) and "--resume" not in printed
    expected = {"batch_size": 4, "n_embd": 16, "lr": 0.01, "weight_decay": 0.01, "freeze": "base", "seed": 0}
    assert rows(out, "header")[0]["config"].items() >= expected.items()
    end = printed[printed.rindex("\n|") :]  # below the last table
    for needed in (f"{out}/model", f"python eval.py {out}", "--plot", "--prompt"):
        assert needed in end


GROWN = [  # options, at which steps it grows, how many growths of three happened
    (dict(max_steps=6), [3]),  # none at the last step, where a block could never train
    (dict(max_steps=8), [3, 6]),
    (dict(max_steps=10), [3, 6, 9]),
    (dict(PLATEAU, patience=6, min_delta=0), []),
    (dict(PLATEAU, patience=3, min_delta=1e9, max_steps=6), [3]),  # no loss ever falls so far
]


@pytest.mark.parametrize("options, steps", GROWN)
def test_fewer_growths_than_asked_are_said_at_the_end(here, tmp_path, capsys, options, steps):
    train.main(arguments(here, tmp_path / "run", **{"max_growths": 3} | options))
    assert growths(tmp_path / "run") == steps
    assert rows(tmp_path / "run", "result")[0]["layers"] == 2 + len(steps)
    said = f"{len(steps)} of 3 growths happened" in capsys.readouterr().out
    assert said == (len(steps) < 3)


def test_a_run_that_ends_before_its_first_growth_says_so_at_its_start_too(here, tmp_path, capsys):
    """It is a short trial of a longer run, and goes on."""
    train.main(arguments(here, tmp_path / "run", max_steps=2))
    before, _, rest = capsys.readouterr().out.partition("step 0")
    assert re.search("(?<!_)growth", before)  # which is no option's name
    assert "0 of 2 growths happened" in rest and growths(tmp_path / "run") == []


def test_two_blocks_at_one_growth(here, tmp_path, capsys, monkeypatch):
    """A fork whose insert_block inserts two: every count must come from the network, none from "one more"."""
    insert = grow.insert_block

    def insert_two(model, at, *args, **more):
        insert(model, at, *args, **more)
        newest = max(model.config.generation)
        return insert(model, at, *args, **more | {"generation": newest})

    monkeypatch.setattr(grow, "insert_block", insert_two)
    train.main(arguments(here, tmp_path / "run"))
    (header,), (result,) = rows(tmp_path / "run", "header"), rows(tmp_path / "run", "result")
    events = rows(tmp_path / "run", "event")
    assert [(e["layers_before"], e["layers_after"]) for e in events] == [(2, 4), (4, 6)]
    assert sum(e["parameters_added"] for e in events) == result["parameters"] - header["parameters"]
    capsys.readouterr()
    ev.main([str(tmp_path / "run")])
    assert [row["layers"] for row in table(capsys.readouterr().out, "added")] == ["2 -> 4", "4 -> 6"]


# ----- going on -----


def test_more_steps_on_resume_grow_where_one_run_would(here, tmp_path):
    """Though at the old end no block went in, for it could not have trained."""
    train.main(arguments(here, tmp_path / "whole", max_steps=11))
    train.main(arguments(here, tmp_path / "parts", max_steps=6))
    assert growths(tmp_path / "parts") == [3]
    train.main(arguments(here, tmp_path / "parts", "--resume", max_steps=11))
    exports = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert growths(tmp_path / "parts") == [3, 6] and exports[0] == exports[1]


def test_a_resumed_run_keeps_the_scale_of_its_loss(here, tmp_path, monkeypatch):
    """float16 gradients overflow until the scale, which starts at 65,536, has been halved often enough: such
    a step is skipped, and its norm is null, for JSON has no infinity. A resumed run knows the scale that it
    had come to: it skips no step again, and ends where it would have."""
    net = GPT(GPTConfig(BYTES, 16, 2, 8, (0, 0)))
    net.ln_f.weight.data *= 64  # large activations, and so large gradients, in front of the head
    net.wte.weight.data /= 64
    net.save_pretrained(tmp_path / "net")
    options = PLAIN | dict(init=tmp_path / "net", dtype="float16", max_steps=8, lr=1e-6, eval_every=8)

    def skipped(out):
        norms = {row["step"]: row["norm"] for row in rows(out, "step")}
        assert list(norms) == list(range(8))
        return [step for step, norm in norms.items() if norm is None]

    train.main(arguments(here, tmp_path / "whole", **options))
    assert 0 in skipped(tmp_path / "whole") and 7 not in skipped(tmp_path / "whole")
    with monkeypatch.context() as m:
        on_step(m, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
        with pytest.raises(SystemExit):
            train.main(arguments(here, tmp_path / "parts", **options))
    train.main(arguments(here, tmp_path / "parts", "--resume", **options))
    assert skipped(tmp_path / "parts") == skipped(tmp_path / "whole")
    exports = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert exports[0] == exports[1]


def test_a_second_ctrl_c_does_not_wait(here, tmp_path, monkeypatch):
    """The first is noted, and the run stops in order; the next one means what it means to any program."""
    handlers = []

    def interrupt(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            handlers.append(signal.getsignal(signal.SIGINT))

    on_step(monkeypatch, interrupt)
    with pytest.raises(SystemExit) as e:
        train.main(arguments(here, tmp_path / "run"))
    assert e.value.code == 128 + signal.SIGINT
    assert handlers[0] in (signal.SIG_DFL, signal.default_int_handler)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as before


def test_ctrl_c_in_the_final_comparison_loses_nothing(here, run, tmp_path, monkeypatch):
    """All that was trained is saved: --resume does the comparison alone."""
    block_use = ev.block_use

    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return block_use(*args)

    out = tmp_path / "run"
    with monkeypatch.context() as m:
        m.setattr(ev, "block_use", interrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train.main(arguments(here, out))
    assert not rows(out, "result")
    on_step(monkeypatch, lambda step: pytest.fail("it trains again"))
    train.main(arguments(here, out, "--resume"))
    (result,), (uninterrupted,) = rows(out, "result"), rows(run, "result")
    assert result["learn"] == uninterrupted["learn"] and (out / "model").exists()


def test_two_processes_on_one_run(here, tmp_path):
    """The second is refused with status 1 and one sentence; the first goes on, and stops on Ctrl-C, saved."""
    pytest.importorskip("fcntl")
    out, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    argv = arguments(here, out, max_steps=1_000_000, grow_every=500_000, eval_every=1_000_000)
    first = program("train.py", *argv)
    try:
        while not log.exists() or '"kind": "step"' not in log.read_text():
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
        first.send_signal(signal.SIGSTOP)  # it holds the run, and leaves the processor to the second
        second = program("train.py", *argv, "--resume", stderr=subprocess.PIPE)
        trained, refusal = second.communicate(timeout=60)
        (sentence,) = [line for line in refusal.splitlines() if line.startswith("error: ")]
        assert second.returncode == 1 and trained == ""
        assert str(out) in sentence and "Traceback" not in refusal
        first.send_signal(signal.SIGCONT)
        first.send_signal(signal.SIGINT)
        status, printed = finished(first)
    finally:
        first.kill()
        first.wait()
    assert status == 128 + signal.SIGINT and "--resume" in printed
    steps = [row["step"] for row in rows(out, "step")]
    assert steps == list(range(len(steps)))
    assert data.load_checkpoint(out / "ckpt.pt")["step"] == len(steps)
