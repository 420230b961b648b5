"""The run: options, resuming bitwise, kills, signals, faults, and what a run folder holds."""

import dataclasses
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, old_text

import data
import eval as ev
import grow
import train
from data import UsageError, UserError
from model import GPT, GPTConfig

TINY = dict(
    init="scratch", tokenizer="bytes", n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, lr=1e-2,
    max_steps=12, grow_every=3, max_growths=3, eval_every=2, eval_windows=4, test_windows=4, log_every=1,
    save_every=2, device="cpu", dtype="float32",
)  # fmt: skip
EXACT = ("model", "optimizer", "scaler", "step", "flops", "dreams", "options", "init_sha256", "model_config")


def options(text, out, **more):
    merged = {**TINY, "dataset": text, "retain": old_text(text), "out": str(out), **more}
    if merged.get("trigger") == "plateau":
        del merged["grow_every"]  # a plateau has no use for it
    return train.Options(**merged)


def command(o):
    changed = {f.name: getattr(o, f.name) for f in dataclasses.fields(o) if getattr(o, f.name) != f.default}
    return [sys.executable, str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in changed.items())]


def rows(out):
    """metrics.jsonl without what a clock or a path decides."""
    skip = ("ms", "seconds", "train_seconds", "command", "typed")
    parsed = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    for row in parsed:
        if row["kind"] == "header":
            row["config"] = {k: v for k, v in row["config"].items() if k not in train.MAY_CHANGE}
    return [{k: v for k, v in row.items() if k not in skip} for row in parsed]


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(one, two):
    """Bitwise: weights, optimizer, scaler, dreams, every logged number, and the export."""
    a, b = (data.load_checkpoint(Path(out) / "ckpt.pt") for out in (one, two))
    for c in (a, b):
        c["options"] = {k: v for k, v in c["options"].items() if k not in train.MAY_CHANGE}
    for key in EXACT:
        assert_same(a[key], b[key])
    assert rows(one) == rows(two)
    exports = [(Path(out) / "model" / "model.safetensors").read_bytes() for out in (one, two)]
    assert exports[0] == exports[1]


# ----- resuming -----

VARIANTS = {
    "schedule": {},
    "first growth at 0, distilled on retained rows": dict(
        first_growth=0, kd_weight=1.0, kd_on="retain", kd_rows=2
    ),
    "plateau": dict(trigger="plateau", patience=2, min_delta=0.5, freeze="older"),
    "EWC, replay, dropout, fresh blocks": dict(
        freeze="none", ewc_lambda=10.0, ewc_batches=2, replay=0.5, dropout=0.1, block_init="fresh"
    ),
    "dreams, separate teacher, cosine": dict(
        kd_weight=1.0, kd_on="dream", dreams=8, kd_rows=2, lr_schedule="cosine", warmup_steps=2
    ),
    "accumulation, bfloat16": dict(grad_accum=2, batch_size=2, dtype="bfloat16"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_ends_bitwise_equal(text, tmp_path, variant, monkeypatch):
    """Stop at every third step by a signal, resume each time: the end is that of the uninterrupted run."""
    train.train(options(text, tmp_path / "whole", **VARIANTS[variant]))
    assert len(ev.read_run(tmp_path / "whole")["event"]) == 3

    real = data.batch

    def interrupted(tokens, block_size, rows, step, seed):
        if step and step % 3 == 2 and not (tmp_path / f"stopped{step}").exists():
            (tmp_path / f"stopped{step}").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return real(tokens, block_size, rows, step, seed)

    monkeypatch.setattr(data, "batch", interrupted)
    stops = 0
    while True:
        status = train.train(options(text, tmp_path / "parts", resume="auto", **VARIANTS[variant]))
        if not status:
            break
        assert status == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # Ctrl-C means what it meant before
        stops += 1
    assert stops >= 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def kill_and_resume(o, whole, kills, seed):
    """SIGKILL the run `kills` times at random moments, resuming each time; return where it had got to."""
    clock, reached = random.Random(seed), []
    out = Path(o.out)
    o = dataclasses.replace(o, resume="auto")
    while len(reached) < kills:
        process = subprocess.Popen(command(o), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = (out / "metrics.jsonl").stat().st_size if (out / "metrics.jsonl").exists() else 0
        while process.poll() is None:  # wait until it trains, so that kills hit steps, saves and exports
            size = (out / "metrics.jsonl").stat().st_size if (out / "metrics.jsonl").exists() else 0
            if size != begun:
                break
            time.sleep(0.002)
        time.sleep(clock.uniform(0, 0.6))
        process.kill()
        process.wait()
        saved = (out / "ckpt.pt").exists()
        reached.append(data.load_checkpoint(out / "ckpt.pt")["step"] if saved else 0)
    subprocess.run(command(o), check=True, capture_output=True)
    assert_same_run(whole, out)
    return reached


def test_killed_run_ends_bitwise_equal(text, tmp_path):
    """SIGKILL at random moments, inside saves too; tests/soak.py does this many more times."""
    o = options(text, tmp_path / "whole", max_steps=40, grow_every=10, save_every=1, log_every=2)
    subprocess.run(command(o), check=True, capture_output=True)
    o = dataclasses.replace(o, out=str(tmp_path / "killed"))
    assert len(kill_and_resume(o, tmp_path / "whole", kills=4, seed=0)) == 4


def test_interrupted_save_leaves_the_previous_checkpoint(tmp_path):
    """A full disk (here: a limit on file size) is one sentence, and the checkpoint before it stays whole."""
    script = (
        "import resource, sys, torch; sys.path.insert(0, sys.argv[1]); import data\n"
        "path = sys.argv[2] + '/ckpt.pt'\n"
        "data.save_checkpoint(path, {'w': torch.ones(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: data.save_checkpoint(path, {'w': torch.ones(100_000)})\n"
        "except data.UserError as e: print(e)\n"
        "print(len(data.load_checkpoint(path)['w']))"
    )
    run = subprocess.run([sys.executable, "-c", script, ROOT, tmp_path], capture_output=True, text=True)
    assert "cannot write" in run.stdout and "--resume" in run.stdout, run.stderr
    assert run.stdout.endswith("10\n")


def test_signal_saves_and_says_how_to_go_on(text, tmp_path):
    o = options(text, tmp_path / "run", max_steps=100_000, eval_every=1000)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(command(o), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 20/") or (
                line.startswith("step") and "resumed" not in line and o.resume == "yes"
            ):
                break
        process.send_signal(number)
        rest = process.communicate()[0]
        assert process.returncode == status
        assert "--resume" in rest
        o = dataclasses.replace(o, resume="yes")


def test_resume_refuses_another_run(text, tmp_path):
    o = options(text, tmp_path / "run")
    train.train(o)
    with pytest.raises(UsageError, match="--resume"):
        train.train(o)
    with pytest.raises(UsageError, match="--lr=0.01"):
        train.train(dataclasses.replace(o, resume="yes", lr=0.5))
    with pytest.raises(UsageError, match="--max_steps=12"):
        train.train(dataclasses.replace(o, resume="yes", max_steps=6))
    saved = data.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    data.save_checkpoint(
        tmp_path / "run" / "ckpt.pt", saved | {"init_sha256": "0" * 64}
    )  # as if --init had changed
    with pytest.raises(UserError, match="other weights"):
        train.train(dataclasses.replace(o, resume="yes"))
    data.save_checkpoint(tmp_path / "run" / "ckpt.pt", saved)
    with pytest.raises(UsageError, match="nothing to resume"):
        train.train(options(text, tmp_path / "none", resume="yes"))
    train.train(dataclasses.replace(o, resume="yes", max_steps=14, batch_size=2, grad_accum=2, log_every=7))
    assert ev.read_run(tmp_path / "run")["result"]["tokens"] == 14 * 4 * 16


def test_log_is_written_anew_from_the_checkpoint(text, tmp_path):
    """The log is the state, and the checkpoint holds it: a cut, lost or longer file ends as it should be."""
    o = options(text, tmp_path / "run", max_steps=4, grow_every=3)
    train.train(o)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = rows(o.out)
    for damage in (lambda: path.write_text(""), path.unlink, lambda: path.write_text('{"kind": "step"')):
        damage()
        train.train(dataclasses.replace(o, resume="yes"))
        assert rows(o.out) == whole


def on_step(monkeypatch, act):
    """Call act(step) where the run draws the batch of a step."""
    batch = data.batch

    def batch_and_act(tokens, block_size, rows, step, seed):
        act(step)
        return batch(tokens, block_size, rows, step, seed)

    monkeypatch.setattr(data, "batch", batch_and_act)


def argv(o, *more):
    return [*command(o)[2:], *more]


def test_checkpoint_and_log_are_written_as_the_run_goes(text, tmp_path, monkeypatch):
    """A checkpoint before the first step, so that a full disk is found at once, and one at the end. A row of
    the log is in the file before the next step begins."""
    out, logged, saved = tmp_path / "run", [], []

    def look(step):
        logged.append(sum(row["kind"] == "step" for row in rows(out)))
        saved.append(data.load_checkpoint(out / "ckpt.pt")["step"])

    on_step(monkeypatch, look)
    train.main(argv(options(text, out, max_steps=8, save_every=5)))
    assert logged == list(range(8))
    assert saved == [0, 0, 0, 0, 0, 5, 5, 5]
    assert data.load_checkpoint(out / "ckpt.pt")["step"] == 8


def test_clock_counts_training_only_and_goes_on_after_a_stop(text, tmp_path, monkeypatch, capsys):
    """On a clock where a step takes 10 s, an evaluation 1,000 s, and a night lies between stop and resume."""
    out, now, evaluate = tmp_path / "run", [0.0], ev.evaluate

    def step_takes_10_s(step):
        now[0] += 10
        if step == 8 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluation_takes_1000_s(*args):
        now[0] += 1000
        return evaluate(*args)

    on_step(monkeypatch, step_takes_10_s)
    monkeypatch.setattr(ev, "evaluate", evaluation_takes_1000_s)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    # Stopped at step 9: no log line, evaluation or growth is due there.
    o = options(text, out, log_every=3, eval_every=2, grow_every=4, max_growths=2, save_every=100)
    with pytest.raises(SystemExit):
        train.main(argv(o))
    awake, night = now[0], 1e6
    now[0] += night
    train.main(argv(o, "--resume"))
    result = ev.read_run(out)["result"]
    assert result["train_seconds"] == 12 * 10
    assert result["seconds"] == now[0] - night > awake
    steps = [row for row in rows(out) if row["kind"] == "step"]
    timed = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["ms"] for row in timed if row["kind"] == "step"] == [10_000] * len(steps)
    assert [row["step"] for row in steps] == [0, 3, 6, 9]
    left = [line.split()[-2] for line in capsys.readouterr().out.splitlines() if line.endswith(" left")]
    assert left == ["0:01:50", "0:01:20", "0:00:50", "0:00:20"]  # 11, 8, 5 and 2 steps


def test_dreams_are_sampled_once(text, tmp_path, monkeypatch):
    """A resumed run takes them from its checkpoint: on another machine it would dream something else."""
    o = options(text, tmp_path / "run", kd_weight=1.0, kd_on="dream", dreams=8, kd_rows=2)
    train.main(argv(o))
    result = rows(o.out)[-1]
    monkeypatch.setattr(train.GPT, "generate", lambda *args, **more: pytest.fail("it dreams again"))
    train.main(argv(o, "--resume"))
    assert rows(o.out)[-1] == result


def test_resume_refuses_what_would_change_the_run(text, tmp_path):
    """Other rows or another seed do; the same rows in smaller pieces do not; a cosine has one end."""
    distilled = dict(kd_weight=1.0, kd_on="retain", kd_rows=2, lr_schedule="cosine")
    o = options(text, tmp_path / "run", **distilled)
    train.main(argv(o))
    rows = "kd_rows x grad_accum 2"
    for change, named in (({"kd_rows": 4}, f"{rows} .now 4"), ({"seed": 1}, "--seed=0"),
                          ({"batch_size": 8}, "batch_size x grad_accum 4 .now 8"),
                          ({"max_steps": 14}, "--max_steps=12"),
                          ({"batch_size": 2, "grad_accum": 2}, f"{rows} .now 4")):  # fmt: skip
        with pytest.raises(UsageError, match=named):
            train.main(argv(dataclasses.replace(o, **change), "--resume"))
    smaller = dict(batch_size=2, grad_accum=2, kd_rows=1, log_every=7)
    again = argv(dataclasses.replace(o, **smaller), "--resume")
    train.main(again)
    header = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert header["config"].items() >= smaller.items()


def test_header_has_the_command_of_the_last_start(text, tmp_path):
    """And not that of the process, which may be a program that calls train.main."""
    o = options(text, tmp_path / "run with a space")
    for more in ([], ["--resume=yes", "--compile=0"]):
        train.main(["replay", *argv(o, *more)])
        command = ev.read_run(o.out)["header"]["command"]
        assert shlex.split(command) == ["python", "train.py", "replay", *argv(o, *more)]


def test_a_result_without_its_checkpoint_is_not_overwritten(text, tmp_path):
    o = options(text, tmp_path / "run")
    train.main(argv(o))
    model = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "ckpt.pt").unlink()
    with pytest.raises(UsageError, match="result without ckpt.pt"):
        train.main(argv(o, "--resume"))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match="result without ckpt.pt"):
        train.main(argv(o))
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == model


FROM_FOLDER = dict(tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768)  # the defaults: they are not typed


def test_weights_that_change_while_it_trains_are_no_base_to_compare_with(text, tmp_path, monkeypatch):
    """The run is saved; with the right weights back it ends."""

    def save(seed):
        torch.manual_seed(seed)
        train.GPT(train.GPTConfig(257, 16, 2, 16, (0, 0))).save_pretrained(tmp_path / "net")

    save(0)
    o = options(text, tmp_path / "run", init=str(tmp_path / "net"), **FROM_FOLDER)
    on_step(monkeypatch, lambda step: save(1))
    with pytest.raises(UserError, match="has changed since the run started: restore it and --resume"):
        train.main(argv(o))
    save(0)
    train.main(argv(o, "--resume"))
    assert ev.read_run(o.out)["result"]


def test_fresh_blocks_are_a_function_of_seed_and_step(text, tmp_path):
    """Before the first step, too, where nothing else has set the generator."""
    train.GPT(train.GPTConfig(257, 16, 2, 16, (0, 0))).save_pretrained(tmp_path / "net")
    more = dict(init=str(tmp_path / "net"), first_growth=0, block_init="fresh", **FROM_FOLDER)
    exports = []
    for run, (generator, seed) in enumerate([(1, 0), (2, 0), (1, 3)]):
        torch.manual_seed(generator)
        # A rate too small to move a weight that is not 0, so that the export has the block as it was born.
        o = options(text, tmp_path / f"{run}", seed=seed, lr=1e-12, max_steps=1, max_growths=1,
                    grow_every=500, **more)  # fmt: skip
        train.main(argv(o))
        exports.append(train.GPT.from_pretrained(tmp_path / f"{run}" / "model").h[2].mlp.c_fc.weight)
    assert torch.equal(exports[0], exports[1]) and not torch.equal(exports[0], exports[2])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_step_drops_something_else(tmp_path, dropout):
    """On a text whose windows are all alike, and at a rate that moves nothing, only dropout tells two steps
    apart."""
    path = tmp_path / "same.txt"
    path.write_text("a\n" * 2000)
    o = options(str(path), tmp_path / "run", dropout=dropout, lr=1e-12, max_steps=6, max_growths=0,
                grow_every=500)  # fmt: skip
    train.main(argv(o))
    losses = {row["loss"] for row in rows(o.out) if row["kind"] == "step"}
    assert len(losses) == (6 if dropout else 1)


def test_plateau_with_first_growth_0_grows_at_once(text, tmp_path):
    """Before anything trains, whatever the patience; then the new block has its patience."""
    more = dict(trigger="plateau", first_growth=0, patience=4, min_delta=1e9, max_growths=2)
    o = options(text, tmp_path / "run", **more)
    train.main(argv(o))
    assert [e["step"] for e in ev.read_run(o.out)["event"]] == [0, 4]
    grown = train.GPT.from_pretrained(tmp_path / "run" / "model")
    grown.config.versions = (0, 2)
    x = torch.randint(256, (2, 16))
    assert torch.equal(train.start_model(o)(x)[0], grow.version(grown, 0)(x)[0])


def test_plateau_does_not_see_what_an_old_end_measured(text, tmp_path, monkeypatch):
    """A loss that dips at step 6 is seen by the run that ended there alone: prolonged, it forgets it."""
    now, stuck = [0], dict(trigger="plateau", patience=5, min_delta=0.1, eval_every=4, max_growths=1)
    on_step(monkeypatch, lambda step: now.__setitem__(0, step + 1))
    monkeypatch.setattr(ev, "evaluate", lambda *args: 1.0 if now[0] == 6 else 5.0)
    o = options(text, tmp_path / "run", max_steps=6, **stuck)
    train.main(argv(o))
    train.main(argv(dataclasses.replace(o, max_steps=14), "--resume"))
    run = ev.read_run(o.out)
    assert [e["step"] for e in run["eval"]] == [0, 4, 6, 8, 12, 14] and run["result"]["best"] == 1.0
    assert [e["step"] for e in run["event"]] == [8]


# ----- the demo's base -----


@pytest.mark.parametrize("other", [None, "torch", "text", "steps", "precision", "lr"])
def test_a_base_that_was_made_otherwise_is_refused(tmp_path, monkeypatch, other):
    """The demo's figures are those of one base: of these options, this torch and this Python's text."""
    monkeypatch.chdir(tmp_path)
    base, out = train.Options(**train.PRESETS["pretrain"]), tmp_path / train.PRETRAINED
    train.GPT(train.GPTConfig(257, 128, 4, 128, (0,) * 4)).save_pretrained(out / "model")
    text = data.sha256(data.load("docs", 257, 128).values())
    config = dataclasses.asdict(base) | {"lr": 1.0 if other == "lr" else base.lr}
    config["max_steps"] += other == "steps"
    config["dtype"] = "bfloat16" if other == "precision" else base.dtype
    header = {
        "kind": "header", "config": config,
        "versions": {"torch": "1.0" if other == "torch" else torch.__version__},
        "sha256": {"learn": "00" if other == "text" else text},
    }  # fmt: skip
    (out / "metrics.jsonl").write_text(json.dumps(header) + "\n")
    started = []
    monkeypatch.setattr(train, "train", started.append)
    if other is None:
        train.main(["demo"])
        assert [o.dataset for o in started] == ["code"]
    else:
        with pytest.raises(UsageError, match=f"out/pretrained was made with (--)?{other}[= ].*delete it"):
            train.main(["demo"])
        assert not started


def test_a_base_that_is_there_does_not_mind_how_many_processes_there_are(monkeypatch):
    """Its own batch size was a matter of the run that made it."""
    monkeypatch.setattr(train.Path, "exists", lambda path: True)
    monkeypatch.setattr(train, "check", lambda o, world: pytest.fail("it is not trained again"))
    monkeypatch.setattr(ev, "read_run", lambda out: sys.exit("read"))
    with pytest.raises(SystemExit, match="read"):
        train.pretrain(train.parse(["demo"]), 3)


# ----- faults in training -----


def test_non_finite_loss_stops_and_keeps_the_checkpoint(text, tmp_path, monkeypatch):
    """NaN from step 7 on: the run names the step where it saw it, and the checkpoint is from before."""
    real = grow.Objective.losses

    def poisoned(self, hidden, target, y):
        nll, kd = real(self, hidden, target, y)
        calls.append(1)
        return nll * float("nan") if len(calls) > 7 else nll, kd

    calls = []
    monkeypatch.setattr(grow.Objective, "losses", poisoned)
    with pytest.raises(UserError, match="at or before step 7: .*--lr"):
        train.train(options(text, tmp_path / "run", max_steps=30, save_every=3, log_every=5))
    saved = data.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert all(torch.isfinite(w).all() for w in saved["model"].values())
    assert saved["step"] == 6


POISON = {  # what becomes no number, and the options with which the loss has it
    "distillation": dict(kd_weight=1.0, dtype="float16"),
    "EWC": dict(ewc_lambda=1.0, ewc_batches=1, dtype="float16"),
    "gradient": {},
}


@pytest.mark.parametrize("what", POISON)
def test_nothing_that_is_no_number_gets_into_a_checkpoint(text, tmp_path, monkeypatch, what):
    """In the last step before a save, without a log line or an evaluation there. (In float16 the gradients
    of single steps may be infinite, and only the loss tells.)"""
    losses, penalty, calls = grow.Objective.losses, grow.EWC.penalty, []

    def poisoned_losses(self, hidden, target, y):
        calls.append(1)
        if what == "gradient" and len(calls) == 9:
            hidden.register_hook(lambda g: g * float("inf"))
        nll, kd = losses(self, hidden, target, y)
        return nll, kd * float("nan") if what == "distillation" and len(calls) == 9 else kd

    def poisoned_penalty(self, model):
        return penalty(self, model) * (float("nan") if what == "EWC" and len(calls) == 9 else 1)

    monkeypatch.setattr(grow.Objective, "losses", poisoned_losses)
    monkeypatch.setattr(grow.EWC, "penalty", poisoned_penalty)
    o = options(text, tmp_path / "run", save_every=3, log_every=1000, eval_every=1000, max_growths=0,
                grow_every=500, **POISON[what])  # fmt: skip
    with pytest.raises(UserError, match="at or before step 8: "):
        train.main(argv(o))
    saved = data.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert saved["step"] == 6 and all(torch.isfinite(w).all() for w in saved["model"].values())


def test_out_of_memory_gives_the_same_global_batch(text, tmp_path, monkeypatch):
    def fail(o):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train", fail)
    arguments = command(options(text, tmp_path / "run", batch_size=8, grad_accum=3))[2:]
    with pytest.raises(UserError, match="--batch_size=4 --grad_accum=6"):
        train.main(arguments)
    arguments = command(options(text, tmp_path / "run", batch_size=1))[2:]
    with pytest.raises(UserError, match="use a smaller --block_size in a new run"):
        train.main(arguments)
    arguments = command(options(text, tmp_path / "run", dropout=0.1))[2:]
    with pytest.raises(UserError, match="the same global batch .*: --batch_size=2 --grad_accum=2$"):
        train.main(arguments)


@pytest.mark.parametrize("raised", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
])  # fmt: skip
def test_out_of_memory_is_known_by_all_its_names(text, tmp_path, monkeypatch, raised, capsys):
    def fail(*args, **more):
        raise raised

    with pytest.raises(SystemExit):  # where nothing better is known, as in eval.py
        ev.run_main(fail)
    assert capsys.readouterr().err == "error: out of memory: use a smaller model or --batch_size\n"
    monkeypatch.setattr(torch, "save", fail)  # and no disk is full
    with pytest.raises(
        UserError, match="out of memory: the same .*: --batch_size=2 --grad_accum=2 --resume=auto"
    ):
        train.main(command(options(text, tmp_path / "run"))[2:])


def test_the_time_left_may_be_very_long(text, tmp_path, monkeypatch):
    on_step(monkeypatch, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    o = options(text, tmp_path / "run", max_steps=10**17, max_growths=0, grow_every=500)
    assert train.train(o) == 128 + signal.SIGTERM


def test_with_dropout_a_run_goes_on_with_the_same_micro_steps(text, tmp_path):
    """A mask is drawn for each of them."""
    o = options(text, tmp_path / "run", dropout=0.1, max_steps=4, max_growths=0, grow_every=500)
    train.main(argv(o))
    with pytest.raises(UsageError, match="--batch_size=4 .*--grad_accum=1"):
        train.main(argv(dataclasses.replace(o, batch_size=2, grad_accum=2), "--resume"))


def test_the_network_of_a_shorter_run_does_not_stand_for_a_longer_one(text, tmp_path, monkeypatch):
    """Neither while it runs nor if its export fails."""
    o = options(text, tmp_path / "run", max_steps=8)
    train.main(argv(o))
    save, o = train.GPT.save_pretrained, dataclasses.replace(o, max_steps=10)

    def fail(*args):
        with pytest.raises(UserError, match="not finished"):
            ev.main([o.out, "--prompt=x"])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.GPT, "save_pretrained", fail)
    with pytest.raises(UserError, match="cannot write .*model"):
        train.main(argv(o, "--resume"))
    monkeypatch.setattr(train.GPT, "save_pretrained", save)
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(log[:-1]))  # as while it trains
    train.GPT(train.GPTConfig(257, 16, 2, 16, (0,))).save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(UserError, match="not finished"):
        ev.main([o.out, "--prompt=x"])


def test_a_bug_keeps_its_traceback(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda o: [][1])
    with pytest.raises(IndexError):
        ev.run_main(lambda argv: train.main(command(options(text, tmp_path / "run"))[2:]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_found_before_training(text, tmp_path):
    o = options(text, tmp_path / "run")
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=f"cannot write to {o.out} .*--out"):
        train.train(o)


# ----- what a run is made of -----


def test_events_are_exact_and_logged(text, tmp_path):
    train.train(options(text, tmp_path / "run", freeze="base"))
    run = ev.read_run(tmp_path / "run")
    assert [e["step"] for e in run["event"]] == [3, 6, 9]
    for e in run["event"]:
        assert e["learn_after"] == e["learn_before"] and e["retain_after"] == e["retain_before"]
        assert e["layers_after"] == e["layers_before"] + 1
    steps = [row["step"] for row in run["step"]]
    assert steps == list(range(12))


def test_a_growth_that_is_no_identity_stops_the_run(text, tmp_path, monkeypatch):
    real = train.grow.insert_block

    def broken(model, *args):
        block = real(model, *args)
        torch.nn.init.ones_(block.mlp.c_proj.bias)
        return block

    o = options(text, tmp_path / "run")
    train.check(o)
    monkeypatch.setattr(train.grow, "insert_block", broken)
    with pytest.raises(RuntimeError, match="changed the logits"):
        train.train(o)


def test_originals_never_train_from_step_zero(text, tmp_path):
    """--first_growth=0: the network without its grown blocks is still the one the run began with."""
    o = options(text, tmp_path / "run", first_growth=0, kd_weight=1.0, kd_on="train")
    train.train(o)
    grown = train.GPT.from_pretrained(tmp_path / "run" / "model")
    grown.config.versions = (0, max(grown.config.generation))  # a new network is no version by itself
    pretrained, kept = train.start_model(o), grow.version(grown, 0)
    x = torch.randint(256, (2, 16))
    assert torch.equal(pretrained(x)[0], kept(x)[0])
    assert not torch.equal(pretrained(x)[0], grown(x)[0])


# ----- options -----

BAD = [
    ("--grow_evry=5", "did you mean --grow_every"),
    ("--max_steps=ten", "max_steps"),
    ("--max_st=10", "unknown word"),
    ("dmeo", "did you mean demo"),
    ("--grow_every=0", "--grow_every=0 must be at least 1"),
    ("--grow_every=3000", "after --max_steps"),
    ("--first_growth=-2", "--first_growth"),
    ("--max_growths=-1", "--max_growths"),
    ("--max_steps=0", "--max_steps"),
    ("--batch_size=0", "--batch_size"),
    ("--grad_accum=0", "--grad_accum"),
    ("--lr=-1", "--lr"),
    ("--lr=nan", "--lr"),
    ("--lr=inf", "--lr"),
    ("--weight_decay=-1", "--weight_decay"),
    ("--dropout=1", "--dropout"),
    ("--replay=1", "--replay"),
    ("--replay=0.01", "--replay=0.01"),
    ("--replay=0.5 --retain=none", "--retain"),
    ("--seed=-1", "--seed"),
    ("--block_size=1", "--block_size"),
    ("--block_size=1025", "over the model's 1024"),
    ("--eval_every=0", "--eval_every"),
    ("--log_every=0", "--log_every"),
    ("--save_every=0", "--save_every"),
    ("--trigger=never", "schedule, plateau"),
    ("--trigger=plateau --eval_every=500", "plateau needs evaluations"),
    ("--trigger=plateau --patience=2000", "plateau needs evaluations"),
    ("--patience=0", "--patience"),
    ("--where=middle", "--where"),
    ("--where=13", "0 to 12"),
    ("--where=-1", "0 to 12"),
    ("--freeze=all", "--freeze"),
    ("--freeze=top13", "top12"),
    ("--freeze=top0", "top12"),
    ("--block_init=zero", "copy, fresh"),
    ("--kd_on=both", "train, retain, dream"),
    ("--kd_temperature=0", "--kd_temperature"),
    ("--kd_weight=1 --kd_on=retain --retain=none", "--retain"),
    ("--kd_weight=1 --dropout=0.1", "--dropout=0"),
    ("--ewc_lambda=1 --first_growth=0", "would weigh nothing"),
    ("--ewc_lambda=1 --retain=none", "--retain"),
    ("--init=nowhere", "no model in"),
    ("--init=scratch --n_embd=10 --n_head=3", "multiple of n_head"),
    ("--dataset=nothing.txt", "no data set 'nothing.txt', and no file"),
    ("--dataset=none", "--dataset"),
    ("--retain=nothing.txt", "no data set 'nothing.txt', and no file"),
    ("--device=tpu", "auto, cpu, cuda, mps"),
    ("--dtype=int8", "float32"),
    ("--compile=yes", "auto, 0, 1"),
    ("--resume=maybe", "no, yes, auto"),
    ("--tokenizer=words", "gpt2, bytes"),
    ("--lr_schedule=linear", "constant, cosine"),
]


@pytest.mark.parametrize("bad, says", BAD)
def test_bad_options_are_refused_in_one_sentence(bad, says, monkeypatch):
    """Before anything is downloaded or computed, and with exit status 2."""
    monkeypatch.setattr(data, "fetch", lambda *args, **kwargs: pytest.fail("it went to the network"))
    monkeypatch.setattr(train, "train", lambda o: pytest.fail("it went on to train"))
    with pytest.raises(UserError, match=".") as e:
        train.main(bad.split())
    assert says in str(e.value) and "\n" not in str(e.value)


def test_exit_status_and_one_line_on_stderr():
    run = subprocess.run([sys.executable, ROOT / "train.py", "--lrr=1"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    says = "error: unknown word '--lrr=1': did you mean --lr? presets come first, then --option=value "
    assert run.stderr == f"{says}(see python train.py --help)\n"


def test_options_are_parsed_presets_first():
    o = train.parse(["demo", "replay", "--seed=3", "--lr=1e-4", "--resume"])
    assert (o.init, o.dataset, o.seed, o.lr, o.resume) == ("out/pretrained/model", "code", 3, 1e-4, "yes")
    assert o.replay == train.PRESETS["replay"]["replay"]
    assert o.out == "out/demo-replay-seed=3-lr=0.0001"
    assert train.parse([]).out == "out/card"
    assert dataclasses.replace(train.parse(["card"]), out="") == train.Options()
    long = train.parse([f"--dataset={'x' * 300}"])
    assert len(long.out) < 130


def test_card_recipe():
    """The defaults are the card's: lr 5e-5, decay 0.01, 8 x 128 tokens, growth at 500, 1000, 1500 of 2000."""
    o = train.Options()
    due = [s for s in range(o.max_steps + 1) if grow.scheduled(s, o.starts_growing, o.grow_every)]
    assert due[: o.max_growths] == [500, 1000, 1500]
    assert (o.lr, o.weight_decay, o.batch_size * o.grad_accum, o.block_size) == (5e-5, 0.01, 8, 128)
    assert (o.init, o.dataset, o.max_steps, o.freeze) == ("gpt2", "wikitext2", 2000, "base")


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{f.name}" in text for f in dataclasses.fields(train.Options))


CHOICES = [  # device, what it can do, --dtype, what is chosen and why
    ("cpu", {"avx512_bf16": True}, "auto", "bfloat16: native here"),
    ("cpu", {"bf16": True}, "auto", "bfloat16: native here"),
    ("cpu", {}, "auto", "float32: no native bfloat16"),
    ("cpu", {}, "bfloat16", "bfloat16: asked for"),
    ("cuda", {"cuda": True}, "auto", "bfloat16: native here"),
    ("cuda", {}, "auto", "float16: no native bfloat16"),
    ("mps", {"bf16": True}, "auto", "float32: autocast is not used on mps"),
]


@pytest.mark.parametrize("kind, capable, dtype, choice", CHOICES)
def test_device_and_dtype_are_chosen_and_said(monkeypatch, kind, capable, dtype, choice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: "cuda" in capable)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device, chosen, said = ev.choose_machine("auto", dtype)
    assert device == torch.device("cuda:1" if kind == "cuda" else kind)
    assert said[:2] == [f"device {device}: the fastest that torch sees", f"dtype {choice}"]
    assert str(chosen)[6:] == choice.split(":")[0]


def test_float16_scales_its_loss(text, tmp_path):
    """Through a growth and back from a checkpoint; the weights stay float32."""
    o = options(text, tmp_path / "run", dtype="float16", max_steps=7)
    train.train(o)
    saved = data.load_checkpoint(Path(o.out) / "ckpt.pt")
    assert saved["scaler"]["scale"] > 1 and len(saved["model_config"]["generation"]) == 4
    steps = [row for row in rows(o.out) if row["kind"] == "step"]
    assert len(steps) == 7 and all(torch.tensor(row["norm"]).isfinite() for row in steps[1:])
    assert {p.dtype for p in saved["model"].values()} == {torch.float32}


def test_float16_logs_and_clips_the_gradient_that_float32_has(text, tmp_path):
    """Not the scaled one, which is thousands of times as long."""
    norms = []
    for dtype in ("float32", "float16"):
        o = options(text, tmp_path / dtype, dtype=dtype, lr=1e-6, max_growths=0, grow_every=500)
        train.main(argv(o))
        norms.append([row["norm"] for row in rows(o.out) if row["kind"] == "step"])
    pairs = [(a, b) for a, b in zip(*norms) if b is not None]  # the first scales may be too large
    assert len(pairs) > 6
    for a, b in pairs:
        assert b == pytest.approx(a, rel=0.05)


RESIDENT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, eval as ev

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20

if sys.argv[2] == "keep":
    ev.keep_freed_memory()
before = megabytes()
x = torch.ones(2**26)  # 256 MB
del x
print(megabytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")
def test_freed_memory_is_kept():
    def left(how):
        run = [sys.executable, "-c", RESIDENT, ROOT, how]
        return int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)

    assert left("keep") > 200 and left("return") < 50


def test_signal_in_the_last_evaluation_stops_before_the_tables(text, tmp_path, monkeypatch, capsys):
    """A signal is noticed after what was measured when it came, too: the run stops there, saved."""
    evaluate, sent = ev.evaluate, []

    def interrupted(*args):
        if len(ev.read_run(tmp_path / "run")["step"]) == 12 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return evaluate(*args)

    monkeypatch.setattr(ev, "evaluate", interrupted)
    o = options(text, tmp_path / "run")
    assert train.train(o) == 130 and "stopped at step 12" in capsys.readouterr().out
    assert data.load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 12
    monkeypatch.setattr(ev, "evaluate", evaluate)
    assert train.train(dataclasses.replace(o, resume="yes")) is None


def test_an_option_without_its_value():
    with pytest.raises(UsageError, match="--lr: expected one argument"):
        train.parse(["--lr"])
    assert train.parse(["--lr", "3"]).lr == train.parse(["--lr=3"]).lr == 3.0


def test_the_folder_of_a_preset_is_for_the_preset_alone():
    """Or another network would lie where the demo looks for its base."""
    assert train.parse(["pretrain"]).out == train.parse(["pretrain", "--device=cpu"]).out == train.PRETRAINED
    assert train.parse(["pretrain", "demo"]).out == "out/pretrain-demo"
    assert train.parse(["pretrain", "--n_layer=4"]).out == "out/pretrain-n_layer=4"
    assert train.parse(["pretrain", "--n_layer=4", "--out=here"]).out == "here"
    assert train.parse(["pretrain", "--dtype=bfloat16"]).out == "out/pretrain"


def test_a_text_that_changed_is_refused_on_resume(text, tmp_path):
    """Batches are a function of the text, too: under the same name it must be the same."""
    train.train(options(text, tmp_path / "run", max_steps=4))
    path = Path(text)
    path.write_text(path.read_text()[::-1])
    with pytest.raises(UserError, match="not the text that .* was started with"):
        train.train(options(text, tmp_path / "run", max_steps=6, resume="yes"))


def test_a_validation_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch):
    """The step's own loss may be finite while the weights that it leaves are not."""
    evaluate, calls = ev.evaluate, []

    def poisoned(*args):
        calls.append(1)
        return float("nan") if len(calls) > 4 else evaluate(*args)

    monkeypatch.setattr(ev, "evaluate", poisoned)
    with pytest.raises(UserError, match="not finite at or before step 3: .*--lr"):
        train.train(options(text, tmp_path / "run", grow_every=6))
    assert [row["step"] for row in ev.read_run(tmp_path / "run")["eval"]] == [0, 2]


def test_weights_that_are_not_finite_are_refused_before_the_first_step(text, tmp_path):
    model = GPT(GPTConfig(data.BYTES, 16, 2, 16, (0,)))
    model.h[0].mlp.c_fc.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path / "init")
    with pytest.raises(UserError, match="the losses of .*init are not finite"):
        train.train(options(text, tmp_path / "run", init=str(tmp_path / "init"), max_growths=0))
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_a_scaler_hides_no_loss_that_is_not_finite(text, tmp_path, monkeypatch):
    """It skips the step, so the weights stay as they were and the next loss is finite again. The program
    does not wait for every loss; it stops where it reads the next one, here before a save."""
    real, calls = grow.Objective.losses, []

    def poisoned(self, hidden, target, y):
        nll, kd = real(self, hidden, target, y)
        calls.append(1)
        return nll * float("nan") if len(calls) == 4 else nll, kd

    monkeypatch.setattr(grow.Objective, "losses", poisoned)
    o = options(text, tmp_path / "run", dtype="float16", log_every=100, eval_every=100, max_growths=0)
    with pytest.raises(UserError, match="not finite at or before step 3: "):
        train.train(o)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_beside_it(tmp_path):
    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device.*another --out"):
        data.save_checkpoint(tmp_path / "ckpt.pt", {"x": Unwritable()})
    assert not list(tmp_path.iterdir())
