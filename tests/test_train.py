"""The run: options, resuming bitwise, kills, faults, and what a run folder holds.

(What a person types and sees: test_cli.py. What a run learns: test_reference.py.)"""

import dataclasses
import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import BYTES, PLAIN, SCRATCH, TINY, in_fork, old_text, on_step, rows, tiny_gpt, typed

import data
import eval as ev
import grow
import train
from data import UserError
from model import GPT

NEVER = 1e9  # as --min_delta: no loss ever falls so far


def arguments(text, out, *words, **changes):
    """A command line for a run of a second or less; an option that is changed to None is not typed."""
    texts = dict(dataset=text, retain=old_text(text))
    return typed(*words, **{**SCRATCH, **TINY, **texts, **changes, "out": out})


def from_net(folder):
    """Options that start from a network saved there, and not from scratch."""
    tiny_gpt(vocab_size=BYTES).save_pretrained(folder)
    return {**dict.fromkeys(SCRATCH), "init": folder}


def checkpoint(out):
    return data.load_checkpoint(Path(out) / "ckpt.pt")


def stop(step_of_signal):
    """For on_step: one signal comes while this step is computed. (Some steps draw two batches.)"""
    sent = []

    def send(step):
        if step == step_of_signal and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    return send


def steps_of(out, kind):
    return [row["step"] for row in rows(out, kind)]


# ----- a run that was stopped or killed ends as one that was not -----


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def without_clock_and_folder(out):
    """A log without what a clock or a path decides."""
    skip = {"ms", "seconds", "train_seconds", "command", "typed"}
    found = [{key: value for key, value in row.items() if key not in skip} for row in rows(out)]
    found[0]["config"] = {k: v for k, v in found[0]["config"].items() if k not in train.MAY_CHANGE}
    return found


def assert_same_run(one, two):
    """Bitwise: weights, optimizer, scaler, dreams, every number of the log, and the export."""
    a, b = checkpoint(one), checkpoint(two)
    for key in ("step", "model", "model_config", "optimizer", "scaler", "dreams", "flops"):
        assert_same(a[key], b[key])
    assert without_clock_and_folder(one) == without_clock_and_folder(two)
    exports = [(Path(out) / "model/model.safetensors").read_bytes() for out in (one, two)]
    assert exports[0] == exports[1]


VARIANTS = {
    "schedule": {},
    "first growth at 0, distilled on retained rows": dict(
        first_growth=0, kd_weight=1.0, kd_on="retain", kd_rows=2
    ),
    "plateau": dict(trigger="plateau", grow_every=None, patience=2, min_delta=NEVER, freeze="older"),
    "EWC, replay, dropout, fresh blocks": dict(
        freeze="none", ewc_lambda=10.0, ewc_batches=2, replay=0.5, dropout=0.1, block_init="fresh"
    ),
    "dreams, separate teacher, cosine": dict(
        kd_weight=1.0, kd_on="dream", dreams=8, kd_rows=2, lr_schedule="cosine", warmup_steps=2
    ),
    "accumulation, bfloat16": dict(grad_accum=2, batch_size=2, dtype="bfloat16"),
    "scaler, topN": dict(dtype="float16", freeze="top1"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_ends_bitwise_equal(text, tmp_path, monkeypatch, variant):
    """Stopped by a signal before a growth, after it, and between two; resumed each time."""
    train.main(arguments(text, tmp_path / "whole", **VARIANTS[variant]))
    assert len(steps_of(tmp_path / "whole", "event")) == 2
    again = arguments(text, tmp_path / "parts", resume="auto", **VARIANTS[variant])
    for step in (2, 3, 4):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            on_step(patch, stop(step))
            train.main(again)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # it means what it meant before
        assert checkpoint(tmp_path / "parts")["step"] == step + 1
    train.main(again)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def kill_and_resume(argv, out, kills, seed):
    """SIGKILL a run `kills` times at random moments, and then let it end. Returns the steps to which the
    kills left it saved."""
    chance, reached, log = random.Random(seed), [], out / "metrics.jsonl"

    def lines():
        return log.read_bytes().count(b"\n") if log.exists() else 0

    for _ in range(kills):
        enough = lines() + chance.randint(1, 12)
        process = in_fork(train.main, [*argv, "--resume=auto"])
        while process.is_alive() and lines() < enough:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))  # anywhere in a step, a save, an evaluation
        process.kill()
        process.join()
        reached.append(checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0)
    process = in_fork(train.main, [*argv, "--resume=auto"])
    process.join()
    assert process.exitcode == 0
    return reached


def test_a_killed_run_ends_bitwise_equal(text, tmp_path):
    """By SIGKILL, inside saves too; tests/soak.py does this many more times."""
    more = dict(max_steps=40, grow_every=10, max_growths=3, save_every=1, log_every=2)
    whole = in_fork(train.main, arguments(text, tmp_path / "whole", **more))
    whole.join()
    kill_and_resume(arguments(text, tmp_path / "killed", **more), tmp_path / "killed", kills=4, seed=0)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path):
    """(Here: a limit on the size of files.)"""
    resource = pytest.importorskip("resource")
    path = tmp_path / "ckpt.pt"
    data.save_checkpoint(path, {"w": torch.ones(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="ckpt.pt"):
            data.save_checkpoint(path, {"w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(data.load_checkpoint(path)["w"]) == 10 and list(tmp_path.iterdir()) == [path]


# ----- what is saved, and when -----


def test_checkpoint_and_log_are_written_as_the_run_goes(text, tmp_path, monkeypatch):
    """A checkpoint before the first step, so that a full disk is found at once, and one at the end. A row of
    the log is in the file before the next step begins."""
    out, logged, saved = tmp_path / "run", [], []

    def look(step):
        logged.append(len(rows(out, "step")))
        saved.append(checkpoint(out)["step"])

    on_step(monkeypatch, look)
    train.main(arguments(text, out, save_every=5))
    assert logged == list(range(7)) and saved == [0] * 5 + [5] * 2
    assert checkpoint(out)["step"] == 7


def test_the_log_is_written_anew_from_the_checkpoint(text, tmp_path):
    """A cut, lost or longer file ends as it should be."""
    train.main(arguments(text, tmp_path / "run"))
    log = tmp_path / "run/metrics.jsonl"
    whole = without_clock_and_folder(tmp_path / "run")
    for damage in (lambda: log.write_text(""), log.unlink, lambda: log.write_text('{"kind": "step"')):
        damage()
        train.main(arguments(text, tmp_path / "run", "--resume"))
        assert without_clock_and_folder(tmp_path / "run") == whole


def test_dreams_are_sampled_once(text, tmp_path, monkeypatch):
    """A resumed run takes them from its checkpoint: on another machine it would dream something else."""
    dreaming = dict(kd_weight=1.0, kd_on="dream", dreams=8, kd_rows=2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        on_step(patch, stop(4))
        train.main(arguments(text, tmp_path / "run", **dreaming))
    monkeypatch.setattr(GPT, "generate", lambda *args, **more: pytest.fail("it dreams again"))
    train.main(arguments(text, tmp_path / "run", "--resume", **dreaming))
    assert rows(tmp_path / "run", "result")


def test_the_clock_counts_training_and_goes_on_after_a_stop(text, tmp_path, monkeypatch, capsys):
    """On a clock where a step takes 10 s, an evaluation 1,000 s, and a night lies between stop and resume."""
    out, now, evaluate = tmp_path / "run", [0.0], ev.evaluate

    stops = stop(8)

    def step_takes_10_s(step):
        now[0] += 10
        stops(step)

    def evaluation_takes_1000_s(*args):
        now[0] += 1000
        return evaluate(*args)

    on_step(monkeypatch, step_takes_10_s)
    monkeypatch.setattr(ev, "evaluate", evaluation_takes_1000_s)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    # Stopped at step 9: no log line, evaluation or growth is due there.
    options = dict(max_steps=12, log_every=3, grow_every=4, save_every=100)
    with pytest.raises(SystemExit):
        train.main(arguments(text, out, **options))
    awake, night = now[0], 1e6
    now[0] += night
    train.main(arguments(text, out, "--resume", **options))
    (result,) = rows(out, "result")
    assert result["train_seconds"] == 12 * 10
    assert result["seconds"] == now[0] - night > awake
    assert [(row["step"], row["ms"]) for row in rows(out, "step")] == [(s, 10_000) for s in (0, 3, 6, 9)]
    left = [line.split()[-3] for line in capsys.readouterr().out.splitlines() if line.endswith(" min left")]
    assert left == ["1.8", "1.3", "0.8", "0.3"]  # of 11, 8, 5 and 2 steps


def test_the_header_tells_of_the_last_start(text, tmp_path):
    """And not of the process, which may be a program that calls train.main."""
    out = tmp_path / "run with a space"
    for more in ({}, dict(resume="yes", log_every=7, compile="0")):
        argv = arguments(text, out, "keep", max_growths=1, grow_every=None, **more)
        train.main(argv)
        (header,) = rows(out, "header")
        assert shlex.split(header["command"]) == ["python", "train.py", *argv]
    assert header["config"]["log_every"] == 7 and header["config"]["compile"] == "0"


# ----- what is refused on resume, so that no work and no figure is lost -----


def test_resume_refuses_options_that_make_another_run(text, tmp_path):
    options = dict(max_growths=1, kd_weight=1.0, kd_on="retain", kd_rows=2, lr_schedule="cosine")
    train.main(arguments(text, tmp_path / "run", **options))
    with pytest.raises(UserError, match="--resume"):
        train.main(arguments(text, tmp_path / "run", **options))
    changes = dict(lr=0.5, seed=1, batch_size=8, kd_rows=4, freeze="none", max_steps=6)
    for change in [*changes.items(), ("max_steps", 14)]:  # a cosine has one end
        with pytest.raises(UserError, match=change[0]):
            train.main(arguments(text, tmp_path / "run", "--resume", **options | dict([change])))


@pytest.mark.parametrize("what", ["weights", "text"])
def test_resume_refuses_other_weights_and_texts(text, tmp_path, what):
    """Under the same name they must be the same, for batches and losses are functions of them."""
    options = PLAIN | from_net(tmp_path / "net")
    train.main(arguments(text, tmp_path / "run", **options))
    if what == "weights":
        tiny_gpt(vocab_size=BYTES, seed=1).save_pretrained(tmp_path / "net")
    else:
        Path(text).write_text(Path(text).read_text()[::-1])
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    with pytest.raises(UserError, match="restore"):
        train.main(arguments(text, tmp_path / "run", "--resume", **options | {"max_steps": 9}))
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before


def test_a_result_without_its_checkpoint_is_not_overwritten(text, tmp_path):
    out = tmp_path / "run"
    train.main(arguments(text, out))
    before = (out / "model/model.safetensors").read_bytes()
    (out / "ckpt.pt").unlink()
    with pytest.raises(UserError, match="--out"):
        train.main(arguments(text, out, "--resume", lr=1.0))
    (out / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="--out"):
        train.main(arguments(text, out, lr=1.0))
    assert (out / "model/model.safetensors").read_bytes() == before


def test_the_network_of_a_shorter_run_does_not_stand_for_a_longer_one(text, tmp_path, monkeypatch):
    train.main(arguments(text, tmp_path / "run", max_steps=4))
    ev.main([str(tmp_path / "run"), "--prompt=x", "--max_new_tokens=1"])

    def look(step):
        with pytest.raises(UserError, match="not finished"):
            ev.main([str(tmp_path / "run"), "--prompt=x"])

    on_step(monkeypatch, look)
    train.main(arguments(text, tmp_path / "run", "--resume", max_steps=5))


# ----- growth in a run -----


def test_a_growth_that_is_no_identity_stops_the_run(text, tmp_path, monkeypatch):
    insert = grow.insert_block

    def broken(model, *args):
        block = insert(model, *args)
        torch.nn.init.ones_(block.mlp.c_proj.bias)
        return block

    monkeypatch.setattr(grow, "insert_block", broken)
    with pytest.raises(RuntimeError, match="changed the logits"):
        train.main(arguments(text, tmp_path / "run"))
    assert checkpoint(tmp_path / "run")["step"] == 0


FROM_0 = {
    "schedule": (dict(kd_weight=1.0), [0, 3]),
    "plateau": (dict(trigger="plateau", grow_every=None, patience=4, min_delta=NEVER), [0, 4]),
}


@pytest.mark.parametrize("trigger", FROM_0)
def test_with_a_growth_at_step_0_originals_never_train(text, tmp_path, trigger):
    """Whatever the trigger: without its grown blocks the network is the one that the run began with."""
    more, steps = FROM_0[trigger]
    options = from_net(tmp_path / "net") | more
    train.main(arguments(text, tmp_path / "run", first_growth=0, **options))
    assert steps_of(tmp_path / "run", "event") == steps
    begun, grown = (GPT.from_pretrained(tmp_path / name) for name in ("net", "run/model"))
    x = torch.randint(256, (2, 16))
    assert torch.equal(begun(x)[0], grow.version(grown, 0)(x)[0])
    assert not torch.equal(begun(x)[0], grown(x)[0])


def test_fresh_blocks_are_a_function_of_seed_and_step(text, tmp_path):
    """Before the first step, too, where nothing else has set the generator."""
    options = from_net(tmp_path / "net") | dict(
        first_growth=0, block_init="fresh", max_growths=1, max_steps=1
    )
    born = []
    for run, (generator, seed) in enumerate([(1, 0), (2, 0), (1, 3)]):
        torch.manual_seed(generator)
        # At a rate too small to move a weight that is not 0 the export has the block as it was born.
        train.main(arguments(text, tmp_path / f"{run}", **options, grow_every=None, seed=seed, lr=1e-12))
        born.append(GPT.from_pretrained(tmp_path / f"{run}/model").h[2].mlp.c_fc.weight)
    assert torch.equal(born[0], born[1]) and not torch.equal(born[0], born[2])


def test_a_plateau_does_not_see_what_an_old_end_measured(text, tmp_path, monkeypatch):
    """A loss that dips at step 6 is seen by the run that ended there alone: prolonged, it forgets it."""
    now, plateau = [0], dict(trigger="plateau", grow_every=None, patience=5, min_delta=0.1, max_growths=1)
    on_step(monkeypatch, lambda step: now.__setitem__(0, step + 1))
    monkeypatch.setattr(ev, "evaluate", lambda *args: 1.0 if now[0] == 6 else 5.0)
    for steps, words in ((6, []), (14, ["--resume"])):
        train.main(arguments(text, tmp_path / "run", *words, max_steps=steps, eval_every=4, **plateau))
    assert steps_of(tmp_path / "run", "eval") == [0, 4, 6, 8, 12, 14]
    assert steps_of(tmp_path / "run", "event") == [8] and rows(tmp_path / "run", "result")[0]["best"] == 1.0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_step_drops_something_else(tmp_path, dropout):
    """On a text whose windows are all alike, at a rate that moves nothing, only dropout tells two steps
    apart."""
    path = tmp_path / "same.txt"
    path.write_text("a\n" * 2000)
    train.main(arguments(str(path), tmp_path / "run", **PLAIN, dropout=dropout, lr=1e-12))
    assert len({row["loss"] for row in rows(tmp_path / "run", "step")}) == (7 if dropout else 1)


def test_float16_clips_and_logs_the_gradient_that_float32_has(text, tmp_path):
    """Not the scaled one, which is thousands of times as long. The weights stay float32."""
    norms = {}
    for dtype in ("float32", "float16"):
        train.main(arguments(text, tmp_path / dtype, dtype=dtype, lr=1e-6))
        norms[dtype] = [row["norm"] for row in rows(tmp_path / dtype, "step")]
    saved = checkpoint(tmp_path / "float16")
    assert saved["scaler"]["scale"] > 1 and {p.dtype for p in saved["model"].values()} == {torch.float32}
    pairs = [(a, b) for a, b in zip(norms["float32"], norms["float16"]) if b is not None]
    assert len(pairs) > 3  # the first scales may be too large
    for a, b in pairs:
        assert b == pytest.approx(a, rel=0.05)


# ----- faults in training -----

POISON = {  # what is no number from step 5 on, and the options with which the loss has it
    "loss": {},
    "gradient": {},
    "distillation": dict(kd_weight=1.0),
    "EWC": dict(ewc_lambda=1.0, ewc_batches=1),
}


@pytest.mark.parametrize("what", POISON)
def test_nothing_that_is_no_number_gets_into_a_checkpoint(text, tmp_path, monkeypatch, what):
    """In the last step before a save, without a log line or an evaluation there."""
    losses, penalty, calls = grow.Objective.losses, grow.EWC.penalty, []

    def poison(name):
        return float("nan") if name == what and len(calls) > 5 else 1.0

    def poisoned_losses(self, hidden, *args, **more):
        calls.append(1)
        if hidden.requires_grad:
            hidden.register_hook(lambda g: g * poison("gradient"))
        nll, kd = losses(self, hidden, *args, **more)
        return nll * poison("loss"), kd * poison("distillation")

    monkeypatch.setattr(grow.Objective, "losses", poisoned_losses)
    monkeypatch.setattr(grow.EWC, "penalty", lambda *args: penalty(*args) * poison("EWC"))
    rarely = dict(save_every=3, log_every=1000, eval_every=1000)
    with pytest.raises(UserError, match="not finite"):
        train.main(arguments(text, tmp_path / "run", **PLAIN, **rarely, **POISON[what]))
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 3 and all(w.isfinite().all() for w in saved["model"].values())


def test_a_validation_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch):
    """The step's own loss may be finite while the weights that it leaves are not."""
    evaluate, calls = ev.evaluate, []

    def poisoned(*args):
        calls.append(1)
        return float("nan") if len(calls) > 2 else evaluate(*args)

    monkeypatch.setattr(ev, "evaluate", poisoned)
    with pytest.raises(UserError, match="not finite"):
        train.main(arguments(text, tmp_path / "run"))
    assert steps_of(tmp_path / "run", "eval") == [0]


def test_weights_that_are_not_finite_are_refused_before_the_first_step(text, tmp_path):
    options = from_net(tmp_path / "net")
    model = tiny_gpt(vocab_size=BYTES)
    model.h[0].mlp.c_fc.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path / "net")
    with pytest.raises(UserError, match="not finite"):
        train.main(arguments(text, tmp_path / "run", **options))
    assert not (tmp_path / "run/ckpt.pt").exists()


def ended(main, argv, monkeypatch, capsys):
    """What a program says on stderr when it ends with status 1, as a user would start it."""
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with pytest.raises(SystemExit) as e:
        ev.run_main(main)
    assert e.value.code == 1 or isinstance(e.value.code, str)  # which Python prints, and ends with 1
    return f"{e.value.code}{capsys.readouterr().err}"


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
]


@pytest.mark.parametrize("raised", OUT_OF_MEMORY)
def test_out_of_memory_is_known_by_all_its_names(text, tmp_path, monkeypatch, capsys, raised):
    """While it saves, too, where other errors mean a full disk."""

    def fail(*args, **more):
        raise raised

    monkeypatch.setattr(torch, "save", fail)
    said = ended(train.main, arguments(text, tmp_path / "run"), monkeypatch, capsys)
    assert "out of memory" in said and "--batch_size" in said


def test_a_bug_keeps_its_traceback(text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(text, tmp_path / "run")])
    monkeypatch.setattr(train, "train", lambda o: [][1])
    with pytest.raises(IndexError):
        ev.run_main(train.main)


def test_a_folder_that_cannot_be_made_is_found_before_training(text, tmp_path, monkeypatch, capsys):
    on_step(monkeypatch, lambda step: pytest.fail("it trains"))
    assert text in ended(train.main, arguments(text, f"{text}/run"), monkeypatch, capsys)


# ----- options -----

MISUSED = """
    dmeo --grow_evry=5 --max_st=10 --max_steps=ten --max_steps=0 --batch_size=0 --grad_accum=0 --lr=-1
    --lr=nan --weight_decay=-1 --dropout=-1 --seed=-1 --block_size=1 --grow_every=0 --first_growth=-2
    --max_growths=-1 --eval_every=0 --log_every=0 --save_every=0 --replay=-1 --trigger=never
    --block_init=zero --device=tpu --dtype=int8 --compile=yes --lr_schedule=linear
""".split()


@pytest.mark.parametrize("word", MISUSED)
def test_what_argparse_refuses(word, monkeypatch, capsys):
    """Unknown words, wrong types, values out of range or none of the choices."""
    monkeypatch.setattr(train, "train", lambda o: pytest.fail("it went on to train"))
    with pytest.raises(SystemExit) as e:
        train.main([word])
    assert e.value.code == 2 and word.partition("=")[0] in capsys.readouterr().err


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
    ("--init=scratch --n_embd=10 --n_head=3", "n_head"),
    ("--retain=nothing.txt", "nothing.txt"),
]


@pytest.mark.parametrize("words, named", REFUSED)
def test_options_that_cannot_work_together(words, named, monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda *args, **more: pytest.fail("it went to the network"))
    monkeypatch.setattr(train, "train", lambda o: pytest.fail("it went on to train"))
    with pytest.raises(UserError) as e:
        train.main(words.split())
    assert named in str(e.value) and "\n" not in str(e.value)


def test_a_context_beyond_the_networks_is_refused(text, tmp_path):
    with pytest.raises(UserError, match="block_size"):
        train.main(arguments(text, tmp_path / "run", **from_net(tmp_path / "net") | dict(block_size=17)))


def test_options_are_parsed_presets_first():
    o = train.parse(["demo", "replay", "--seed=3", "--lr=1e-4", "--resume"])
    assert (o.init, o.dataset, o.seed, o.lr, o.resume) == ("out/pretrain/model", "code", 3, 1e-4, "yes")
    assert o.replay == train.PRESETS["replay"]["replay"] and o.out == "out/demo-replay-seed=3-lr=0.0001"
    assert dataclasses.replace(train.parse([]), out="") == train.Options()
    assert train.parse(["--lr", "3"]).lr == 3.0


FOLDERS = {  # a preset's is for it alone, or another network would lie where the demo looks for its base
    "": "out/card",
    "pretrain": "out/pretrain",
    "pretrain --device=cpu --save_every=7": "out/pretrain",
    "pretrain demo": "out/pretrain-demo",
    "pretrain --n_layer=4": "out/pretrain-n_layer=4",
    "pretrain --dtype=bfloat16": "out/pretrain",
    "pretrain --n_layer=4 --out=here": "here",
}


@pytest.mark.parametrize("words", FOLDERS)
def test_options_that_decide_what_is_computed_name_the_folder(words):
    assert train.parse(words.split()).out == FOLDERS[words]


def test_the_recipe_of_the_card():
    """The defaults: lr 5e-5, decay 0.01, 8 x 128 tokens, growth at 500, 1000, 1500 of 2000."""
    o = train.Options()
    due = [s for s in range(o.max_steps + 1) if grow.scheduled(s, o.starts_growing, o.grow_every)]
    assert due[: o.max_growths] == [500, 1000, 1500]
    assert (o.lr, o.weight_decay, o.batch_size * o.grad_accum, o.block_size) == (5e-5, 0.01, 8, 128)
    assert (o.init, o.dataset, o.max_steps, o.freeze) == ("gpt2", "wikitext2", 2000, "base")


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse(["--help"])
    printed = capsys.readouterr().out
    assert e.value.code == 0 and all(f"--{f.name}" in printed for f in dataclasses.fields(train.Options))


MACHINES = [  # what is there, what computes bfloat16, processes, the device and the type that are chosen
    ("cpu", "avx512_bf16", 1, "cpu", torch.bfloat16),
    ("cpu", "bf16", 1, "cpu", torch.bfloat16),
    ("cpu", "", 1, "cpu", torch.float32),
    ("cuda", "cuda", 2, "cuda:1", torch.bfloat16),
    ("cuda", "", 2, "cuda:1", torch.float16),
    ("mps", "bf16", 1, "mps", torch.float32),
    ("mps", "", 2, "cpu", torch.float32),  # no backend passes gradients between MPS devices
]


@pytest.mark.parametrize("there, capable, processes, device, dtype", MACHINES)
def test_device_and_dtype_are_chosen(monkeypatch, there, capable, processes, device, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there == "mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: capable == "cuda")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capable: True})
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ev.choose_machine("auto", "auto")[:2] == (torch.device(device), dtype)
    if there != device.partition(":")[0]:
        with pytest.raises(UserError, match=f"--device.*{there}|{there}.*--device"):
            ev.choose_machine(there)
