"""What a person types and sees: refusals, words that must be there, signals, and going on after a stop.

(Texts and files that are refused: test_strangers.py.)"""

import os
import re
import signal
import subprocess
import time

import pytest
import torch
from conftest import PLAIN, arguments, on_step, program, refused, rows, steps_of, table

import data
import eval as ev
import grow
import train

PLATEAU = dict(trigger="plateau", grow_every=None, eval_every=3)


# ----- what is typed wrong -----

WRONG = """
    dmeo --grow_evry=5 --max_st=10 --max_steps=ten --batch_size=0 --lr=-1 --dropout=-1 --block_size=1
    --grow_every=0 --first_growth=-2 --max_growths=-1 --eval_every=0 --save_every=0 --replay=-1
    --trigger=never --block_init=zero --device=tpu --dtype=int8 --compile=yes --max_steps=0 --lr=nan
""".split()
MISUSED = [  # what argparse refuses, and the word that it must name
    *((train.main, [word], word.partition("=")[0]) for word in WRONG),
    (train.main, ["--max_steps=2", "demo"], "demo"),  # presets come first
    (train.main, ["card", "--lr=1e-3", "keep"], "keep"),
    (train.main, ["demo", "--resume", "best"], "best"),  # taken for its value
    (train.main, ["--resume=maybe"], "auto"),
    (train.main, ["--kd_temperature=3"], "--kd_weight"),
    (train.main, ["--kd_on=retain"], "--kd_weight"),
    (train.main, ["--ewc_batches=2"], "--ewc_lambda"),
    (train.main, ["--patience=2"], "--trigger=plateau"),
    (train.main, ["--n_layer=2"], "--init=scratch"),
    (ev.main, [], "names"),
    (ev.main, ["gpt2", "--prom=x"], "--prom"),  # no abbreviations
    (ev.main, ["gpt2", "--dataset=docs", "--split=all"], "val"),
    (ev.main, ["gpt2", "--dataset=docs", "--windows=-1"], "--windows"),
]


@pytest.mark.parametrize("main, argv, named", MISUSED)
def test_what_argparse_refuses_ends_with_status_2(main, argv, named, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda o: pytest.fail("it went on to train"))
    with pytest.raises(SystemExit) as e:
        main(argv)
    printed = capsys.readouterr()
    assert e.value.code == 2 and named in printed.err and printed.out == ""


REFUSED = [  # before anything is downloaded or computed, and what must be named
    ("--where=middle", "middle"),
    ("--where=13", "12"),
    ("--where=-1", "index"),
    ("--freeze=all", "all"),
    ("--freeze=top13", "top12"),
    ("--freeze=top0", "top12"),
    ("--kd_weight=1 --dropout=0.1", "--dropout=0"),
    ("--kd_weight=1 --kd_on=retain --retain=none", "--retain"),
    ("--ewc_lambda=1 --retain=none", "--retain"),
    ("--replay=0.5 --retain=none", "--retain"),
    # not whole rows: never no row at all, never all rows
    ("--replay=0.2 --batch_size=8", "--replay"),
    ("--replay=0.26 --batch_size=5 --grad_accum=2", "--replay"),
    ("--replay=0.01 --batch_size=8", "--replay"),
    ("--replay=0.99 --batch_size=8", "--replay"),
    ("--init=scratch --n_embd=10 --n_head=3", "n_head"),
    ("--block_size=1025", "1024"),
    ("--retain=nothing.txt", "nothing.txt"),
]


@pytest.mark.parametrize("words, named", REFUSED)
def test_options_that_cannot_work_together(words, named, monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda *args, **more: pytest.fail("it went to the network"))
    monkeypatch.setattr(train, "train", lambda o: pytest.fail("it went on to train"))
    refused(lambda: train.main(words.split()), named)


ACCEPTED = [
    # 0.28 of 50 rows is 14, though 0.28 * 50 is 14.000000000000002 in floating point
    dict(replay=0.28, batch_size=25, grad_accum=2),
    dict(replay=0.7, batch_size=5, grad_accum=2),
    dict(max_growths=0, grow_every=3),  # one of a sweep over max_growths
]


@pytest.mark.parametrize("options", ACCEPTED)
def test_options_that_are_accepted(text, tmp_path, options):
    train.main(arguments(text, tmp_path / "run", **{"max_steps": 2} | PLAIN | options))
    assert rows(tmp_path / "run", "result")


MISSING = [  # what is not there, and what must be named: of a relative path, the absolute one
    (train.main, "--device=cuda", "--device"),
    (train.main, "--dataset=nothing.txt", "{here}/nothing.txt"),
    (train.main, "--init=nowhere", "{here}/nowhere"),
    (train.main, "--out=nowhere --resume", "{here}/nowhere"),
    (ev.main, "gpt2 --prompt=x --device=cuda", "--device"),
    (ev.main, "nowhere", "{here}/nowhere"),
    (ev.main, "nowhere --dataset=nothing.txt", "{here}/nothing.txt"),
]


@pytest.mark.parametrize("main, words, named", MISSING)
def test_what_is_not_there_is_named_and_nothing_is_downloaded(tmp_path, monkeypatch, main, words, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(data, "fetch", lambda *args, **more: pytest.fail("it went to the network"))
    monkeypatch.chdir(tmp_path)
    refused(lambda: main(words.split()), named.format(here=tmp_path))


# ----- what a run says -----


def test_a_run_says_what_was_typed_and_how_to_go_on(text, tmp_path, capsys):
    """Before it trains, what differs from the preset (its log has all options); at its end, what is next."""
    out = tmp_path / "run"
    train.main(arguments(text, out))
    printed = capsys.readouterr().out
    before = printed.partition("step 0")[0].splitlines()
    (line,) = [line for line in before if "--batch_size=4" in line]
    assert "--n_embd=16" in line and "--lr=0.01" in line and "--max_steps=7" in line
    assert not any("--weight_decay" in line for line in before) and "--resume" not in printed
    expected = {"batch_size": 4, "n_embd": 16, "lr": 0.01, "weight_decay": 0.01, "freeze": "base", "seed": 0}
    assert rows(out, "header")[0]["config"].items() >= expected.items()
    assert re.search(r"\nstep 3 loss \d.* \d ms .* tok/s depth 3 \d.* min left\n", printed)  # it has grown
    end = printed[printed.rindex("\n|") :]  # below the last table
    for needed in (f"{out}/model", f"python eval.py {out}", "--plot", "--prompt"):
        assert needed in end


GROWN = [  # options, at which steps it grows, how many growths of three happened
    (dict(max_steps=2), []),
    (dict(max_steps=6), [3]),  # none at the last step, where a block could never train
    (dict(max_steps=8), [3, 6]),
    (dict(max_steps=10), [3, 6, 9]),
    (dict(PLATEAU, patience=6, min_delta=0), []),
    (dict(PLATEAU, patience=3, min_delta=1e9, max_steps=6), [3]),  # no loss ever falls so far
]


@pytest.mark.parametrize("options, steps", GROWN)
def test_fewer_growths_than_asked_are_said(text, tmp_path, capsys, options, steps):
    """At the end; and before the first step, if none can be: a short trial of a longer run goes on."""
    train.main(arguments(text, tmp_path / "run", **{"max_growths": 3} | options))
    assert steps_of(tmp_path / "run", "event") == steps
    assert rows(tmp_path / "run", "result")[0]["layers"] == 2 + len(steps)
    before, _, rest = capsys.readouterr().out.partition("step 0")
    assert ("no growth" in before) == (options.get("max_steps") == 2)
    assert (f"{len(steps)} of 3 growths happened" in rest) == (len(steps) < 3)


def test_two_blocks_at_one_growth(text, tmp_path, capsys, monkeypatch):
    """A fork whose insert_block inserts two: every count must come from the network, none from "one more"."""
    insert = grow.insert_block

    def insert_two(model, at, *args, **more):
        insert(model, at, *args, **more)
        newest = max(model.config.generation)
        return insert(model, at, *args, **more | {"generation": newest})

    monkeypatch.setattr(grow, "insert_block", insert_two)
    train.main(arguments(text, tmp_path / "run"))
    (header,), (result,) = rows(tmp_path / "run", "header"), rows(tmp_path / "run", "result")
    events = rows(tmp_path / "run", "event")
    assert [(e["layers_before"], e["layers_after"]) for e in events] == [(2, 4), (4, 6)]
    assert sum(e["parameters_added"] for e in events) == result["parameters"] - header["parameters"]
    capsys.readouterr()
    ev.main([str(tmp_path / "run")])
    assert [row["layers"] for row in table(capsys.readouterr().out, "added")] == ["2 -> 4", "4 -> 6"]


# ----- going on -----


def test_more_steps_on_resume_grow_where_one_run_would(text, tmp_path):
    """Though at the old end no block went in, for it could not have trained."""
    train.main(arguments(text, tmp_path / "whole", max_steps=11))
    train.main(arguments(text, tmp_path / "parts", max_steps=6))
    assert steps_of(tmp_path / "parts", "event") == [3]
    train.main(arguments(text, tmp_path / "parts", "--resume", max_steps=11))
    exports = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert steps_of(tmp_path / "parts", "event") == [3, 6] and exports[0] == exports[1]


def test_ranks_that_go_on_from_different_checkpoints_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "over_ranks", lambda tensor, op: tensor + (op == train.dist.ReduceOp.MAX))
    refused(lambda: train.main(arguments(text, tmp_path / "run")), "not all processes see the same")


@pytest.mark.parametrize("name, times", [("SIGINT", 1), ("SIGHUP", 2)])
def test_a_signal_stops_a_run_in_order(text, tmp_path, monkeypatch, capsys, name, times):
    """Ctrl-C, of which a second one means what it means to any program; and a closed terminal, which sends
    its signal twice. (SIGTERM: test_train.py.)"""
    number, handlers = getattr(signal, name), []
    ends = (signal.SIG_DFL, signal.default_int_handler)

    def send(step):
        if step == 2:
            for _ in range(times):
                os.kill(os.getpid(), number)
            handlers.append(signal.getsignal(number))

    on_step(monkeypatch, send)
    with pytest.raises(SystemExit) as e:
        train.main(arguments(text, tmp_path / "run"))
    assert e.value.code == 128 + number and (handlers[0] in ends) == (number == signal.SIGINT)
    assert signal.getsignal(number) is ends[number == signal.SIGINT]  # as before
    assert "--resume continues it" in capsys.readouterr().out
    assert data.load_checkpoint(tmp_path / "run/ckpt.pt")["step"] == 3 == len(rows(tmp_path / "run", "step"))


def test_ctrl_c_in_the_final_comparison_loses_nothing(text, tmp_path, monkeypatch):
    """All that was trained is saved: --resume does the comparison alone."""
    block_use = ev.block_use

    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return block_use(*args)

    out, whole = tmp_path / "run", tmp_path / "whole"
    train.main(arguments(text, whole))
    with monkeypatch.context() as m:
        m.setattr(ev, "block_use", interrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train.main(arguments(text, out))
    assert not rows(out, "result")
    on_step(monkeypatch, lambda step: pytest.fail("it trains again"))
    train.main(arguments(text, out, "--resume"))
    (result,), (uninterrupted,) = rows(out, "result"), rows(whole, "result")
    assert result["learn"] == uninterrupted["learn"] and (out / "model").exists()


def test_two_processes_on_one_run(text, tmp_path):
    """The second is refused with status 1 and one sentence; the first goes on, and stops on Ctrl-C, saved."""
    pytest.importorskip("fcntl")
    out, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    argv = arguments(text, out, max_steps=1_000_000, grow_every=500_000, eval_every=1_000_000)
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
        printed, _ = first.communicate(timeout=120)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 128 + signal.SIGINT and "--resume" in printed
    steps = steps_of(out, "step")
    assert steps == list(range(len(steps)))
    assert data.load_checkpoint(out / "ckpt.pt")["step"] == len(steps)
