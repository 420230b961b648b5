"""The run: options, resuming bitwise, kills, faults, and what a run folder holds.

(What a person types and sees: test_cli.py. What a run learns: test_reference.py.)"""

import functools
import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import BYTES, PLAIN, SCRATCH, arguments, in_fork, on_step, refused, rows, steps_of, tiny_gpt

import data
import eval as ev
import grow
import train
from data import UserError
from model import GPT

NEVER = 1e9  # as --min_delta: no loss ever falls so far


def checkpoint(out):
    return data.load_checkpoint(Path(out) / "ckpt.pt")


def stop(step_of_signal):
    """For on_step: one signal comes while this step is computed. (Some steps draw two batches.)"""
    sent = []

    def send(step):
        if step == step_of_signal and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    return send


# ----- a run that was stopped or killed ends as one that was not -----


def without_clock_and_folder(out):
    """A log without what a clock or a path decides."""
    skip = {"ms", "seconds", "train_seconds", "command"}
    found = [{key: value for key, value in row.items() if key not in skip} for row in rows(out)]
    found[0]["config"] = {k: v for k, v in found[0]["config"].items() if k not in train.MAY_CHANGE}
    return found


def assert_same_run(one, two):
    """Bitwise: weights, optimizer, scaler, generated text, every number of the log, and the export."""
    states = [checkpoint(out) for out in (one, two)]
    for key in ("step", "model", "model_config", "optimizer", "scaler", "generated", "flops"):
        torch.testing.assert_close(*(state[key] for state in states), rtol=0, atol=0)
    assert without_clock_and_folder(one) == without_clock_and_folder(two)
    exports = [(Path(out) / "model/model.safetensors").read_bytes() for out in (one, two)]
    assert exports[0] == exports[1]


KEEPING = dict(freeze="none", ewc_lambda=10.0, ewc_batches=2, replay=0.5)
GENERATED = dict(kd_weight=1.0, kd_on="generated", generated=8, kd_rows=2)
VARIANTS = {
    "schedule": {},
    "distilled from step 0": dict(first_growth=0, kd_weight=1.0, kd_on="retain", kd_rows=2),
    "plateau": dict(trigger="plateau", grow_every=None, patience=2, min_delta=NEVER, freeze="older"),
    "EWC, replay, dropout, fresh blocks": KEEPING | dict(dropout=0.1, block_init="fresh"),
    "generated text, separate teacher, cosine": GENERATED | dict(lr_schedule="cosine", warmup_steps=2),
    "accumulation, bfloat16": dict(grad_accum=2, batch_size=2, dtype="bfloat16"),
    "scaler, topN": dict(dtype="float16", freeze="top1"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_ends_bitwise_equal(text, tmp_path, monkeypatch, variant):
    """Stopped by a signal before a growth, after it, and between two; resumed each time. What was
    generated comes from the checkpoint: another machine would generate something else. Steps whose scaled
    gradients overflow are skipped, and their norm is null; the scale that is small enough is saved."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**19)  # too large at first
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    train.main(arguments(text, tmp_path / "whole", **VARIANTS[variant]))
    assert len(steps_of(tmp_path / "whole", "event")) == 2
    *first, last = [row["norm"] for row in rows(tmp_path / "whole", "step")]
    assert (None in first) == (variant == "scaler, topN") and last
    again = arguments(text, tmp_path / "parts", resume="auto", **VARIANTS[variant])
    for step in (2, 3, 4):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            on_step(patch, stop(step))
            train.main(again)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # it means what it meant before
        assert checkpoint(tmp_path / "parts")["step"] == step + 1
        monkeypatch.setattr(GPT, "generate", lambda *args, **more: pytest.fail("it generates again"))
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
    path, limits = tmp_path / "ckpt.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    data.save_checkpoint(path, {"w": torch.ones(10)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        refused(lambda: data.save_checkpoint(path, {"w": torch.ones(100_000)}), "ckpt.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(data.load_checkpoint(path)["w"]) == 10 and list(tmp_path.iterdir()) == [path]


# ----- what is saved, and when -----


def test_checkpoint_and_log_are_written_as_the_run_goes(text, tmp_path, monkeypatch):
    """A checkpoint before the first step, so that a full disk is found at once; a row before the next one."""
    out, seen = tmp_path / "run", []
    on_step(monkeypatch, lambda step: seen.append((len(rows(out, "step")), checkpoint(out)["step"])))
    train.main(arguments(text, out, save_every=5))
    assert seen == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 5), (6, 5)] and checkpoint(out)["step"] == 7
    # The log is written anew from the checkpoint: a lost or cut file ends as it should be.
    whole, log = without_clock_and_folder(out), out / "metrics.jsonl"
    for damage in (log.unlink, lambda: log.write_text('{"kind": "step"')):
        damage()
        train.main(arguments(text, out, "--resume", save_every=5))
        assert without_clock_and_folder(out) == whole


def test_an_evaluation_has_the_loss_and_norm_of_the_step_before(text, tmp_path):
    train.main(arguments(text, tmp_path / "run"))
    steps = {row["step"]: (row["loss"], row["norm"]) for row in rows(tmp_path / "run", "step")}
    first, *later = rows(tmp_path / "run", "eval")
    assert first["loss"] is first["norm"] is None and later
    assert all((row["loss"], row["norm"]) == steps[row["step"] - 1] for row in later)


def on_validation(monkeypatch, change):
    """Replace the loss of a network without versions, whenever a run measures it, by change(loss)."""
    measure = ev.measure

    def changed(nets, *args, **more):
        found = measure(nets, *args, **more)
        return found if more else found | {"losses": [change(found["losses"][0])]}

    monkeypatch.setattr(ev, "measure", changed)


def test_the_clock_counts_training_and_goes_on_after_a_stop(text, tmp_path, monkeypatch):
    """On a clock where a step takes 10 s, an evaluation 1,000 s, and a night lies between stop and resume."""
    out, now, stops = tmp_path / "run", [0.0], stop(8)
    on_step(monkeypatch, lambda step: now.append(now[-1] + 10) or stops(step))
    on_validation(monkeypatch, lambda loss: now.append(now[-1] + 1000) or loss)
    monkeypatch.setattr(time, "perf_counter", lambda: now[-1])
    # Stopped at step 9: no log line, evaluation or growth is due there.
    options = dict(max_steps=12, log_every=3, grow_every=4, save_every=100)
    with pytest.raises(SystemExit):
        train.main(arguments(text, out, **options))
    awake, night = now[-1], 1e6
    now.append(awake + night)
    train.main(arguments(text, out, "--resume", **options))
    (result,) = rows(out, "result")
    assert result["train_seconds"] == 12 * 10
    assert result["seconds"] == now[-1] - night > awake
    assert [(row["step"], row["ms"]) for row in rows(out, "step")] == [(s, 10_000) for s in (0, 3, 6, 9)]


# ----- what is refused on resume, so that no work and no figure is lost -----


def test_resume_refuses_options_that_make_another_run(text, tmp_path):
    options = dict(max_growths=1, kd_weight=1.0, kd_on="retain", kd_rows=2, lr_schedule="cosine")
    train.main(arguments(text, tmp_path / "run", **options))
    refused(lambda: train.main(arguments(text, tmp_path / "run", **options)), "--resume")
    changes = dict(lr=0.5, seed=1, batch_size=8, kd_rows=4, freeze="none", max_steps=6)
    for change in [*changes.items(), ("max_steps", 14)]:  # a cosine has one end
        with pytest.raises(UserError, match=change[0]):
            train.main(arguments(text, tmp_path / "run", "--resume", **options | dict([change])))
    # A result that has lost its checkpoint, and then its log, is not overwritten.
    for lost, words in (("ckpt.pt", ["--resume"]), ("metrics.jsonl", [])):
        (tmp_path / "run" / lost).unlink()
        with pytest.raises(UserError, match="--out"):
            train.main(arguments(text, tmp_path / "run", *words, **options))


def test_resume_refuses_other_weights_and_texts(text, tmp_path):
    """Under the same name they must be the same, for batches and losses are functions of them."""
    tiny_gpt(vocab_size=BYTES).save_pretrained(tmp_path / "net")
    options = PLAIN | dict.fromkeys(SCRATCH) | {"init": tmp_path / "net"}
    train.main(arguments(text, tmp_path / "run", **options))
    before, words = (tmp_path / "run/ckpt.pt").read_bytes(), Path(text).read_text()
    for seed, now, named in ((1, words, "net"), (0, words[::-1], "text")):
        tiny_gpt(vocab_size=BYTES, seed=seed).save_pretrained(tmp_path / "net")
        Path(text).write_text(now)
        with pytest.raises(UserError, match=f"{named} .*restore"):
            train.main(arguments(text, tmp_path / "run", "--resume", **options | {"max_steps": 9}))
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before


# ----- growth in a run -----


def test_a_growth_that_is_no_identity_stops_the_run(text, tmp_path, monkeypatch):
    insert, ones = grow.insert_block, torch.nn.init.ones_
    monkeypatch.setattr(grow, "insert_block", lambda *args: ones(insert(*args).mlp.c_proj.bias))
    with pytest.raises(RuntimeError, match="changed the logits"):
        train.main(arguments(text, tmp_path / "run"))
    assert checkpoint(tmp_path / "run")["step"] == 0


def test_a_plateau_does_not_see_what_an_old_end_measured(text, tmp_path, monkeypatch):
    """A loss that dips at step 6 is seen by the run that ended there alone: prolonged, it forgets it."""
    now, plateau = [0], dict(trigger="plateau", grow_every=None, patience=5, min_delta=0.1, max_growths=1)
    on_step(monkeypatch, lambda step: now.__setitem__(0, step + 1))
    on_validation(monkeypatch, lambda loss: 1.0 if now[0] == 6 else 5.0)
    for steps, words in ((6, []), (14, ["--resume"])):
        train.main(arguments(text, tmp_path / "run", *words, max_steps=steps, eval_every=4, **plateau))
    assert steps_of(tmp_path / "run", "eval") == [0, 4, 6, 8, 12, 14]
    assert steps_of(tmp_path / "run", "event") == [8] and rows(tmp_path / "run", "result")[0]["best"] == 1.0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_step_drops_something_else(tmp_path, dropout):
    """With windows that are all alike, at a rate that moves nothing, only dropout tells two steps apart."""
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
    assert all(b == pytest.approx(a, rel=0.05) for a, b in pairs)


@pytest.mark.parametrize("init", ["copy", "fresh"])
def test_a_run_inserts_what_block_init_says(text, tmp_path, init):
    """After a step too small to move a float32: the block below, or another."""
    growth = dict(first_growth=0, max_growths=1, grow_every=None, max_steps=1, lr=1e-12)
    train.main(arguments(text, tmp_path / "run", block_init=init, **growth))
    model = GPT.from_pretrained(tmp_path / "run" / "model")
    at = model.config.generation.index(1)
    below, block = (model.h[i].attn.c_attn.weight for i in (at - 1, at))
    assert torch.equal(below, block) == (init == "copy")


# ----- faults in training -----


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_that_is_no_number_gets_into_a_checkpoint(text, tmp_path, monkeypatch, what):
    """In the last step before a save, without a log line or an evaluation there."""
    losses, calls = grow.Objective.losses, []

    def poisoned(self, hidden, y):
        calls.append(1)
        factors = {what: float("nan") if len(calls) > 5 else 1.0}
        hidden.register_hook(lambda g: g * factors.get("gradient", 1.0))
        nll, kd = losses(self, hidden, y)
        return nll * factors.get("loss", 1.0), kd

    monkeypatch.setattr(grow.Objective, "losses", poisoned)
    rarely = dict(save_every=3, log_every=1000, eval_every=1000)
    refused(lambda: train.main(arguments(text, tmp_path / "run", **PLAIN, **rarely)), "not finite")
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 3 and all(w.isfinite().all() for w in saved["model"].values())


def test_a_validation_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch):
    """The step's own loss may be finite while the weights that it leaves are not."""
    losses = iter([4.0, 4.0, float("nan"), 4.0])  # of two texts, at steps 0 and 2
    on_validation(monkeypatch, lambda loss: next(losses))
    refused(lambda: train.main(arguments(text, tmp_path / "run")), "not finite")
    assert steps_of(tmp_path / "run", "eval") == [0]


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
]


@pytest.mark.parametrize("raised", OUT_OF_MEMORY)
def test_out_of_memory_is_known_by_all_its_names(text, tmp_path, monkeypatch, raised):
    """While it saves, too, where other errors mean a full disk."""
    monkeypatch.setattr(torch, "save", Mock(side_effect=raised))
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(text, tmp_path / "run")])
    with pytest.raises(SystemExit, match="out of memory.*--batch_size"):
        ev.run_main(train.main)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(IndexError):
        ev.run_main(lambda argv: argv[0])


def test_a_folder_that_cannot_be_made_is_found_before_training(text, monkeypatch):
    on_step(monkeypatch, lambda step: pytest.fail("it trains"))
    with pytest.raises((UserError, OSError), match=text):
        train.main(arguments(text, f"{text}/run"))


# ----- options -----

FOLDERS = {  # a preset's is for it alone, or another network would lie where the demo looks for its base
    "": "out/card",
    "--max_steps=9": "out/card",  # a longer run is the same run, but not under a cosine
    "pretrain": "out/pretrain",
    "pretrain --device=cpu --save_every=7": "out/pretrain",
    "pretrain demo": "out/pretrain-demo",
    "pretrain --n_layer=4": "out/pretrain-n_layer=4",
    "pretrain --lr=1 --n_layer=4": "out/pretrain-n_layer=4-lr=1.0",  # in one order, however they are typed
    "pretrain --max_steps=9": "out/pretrain-max_steps=9",
    "pretrain --n_layer=4 --out=here": "here",
}


def test_options_that_decide_what_is_computed_name_the_folder():
    assert {words: train.parse(words.split()).out for words in FOLDERS} == FOLDERS


def test_options_are_parsed_presets_first():
    argv = ["demo", "replay", "--seed=3", "--lr", "1e-4", "--resume", "--dataset=my text"]
    o = train.parse(argv)
    assert (o.init, o.dataset, o.seed, o.lr, o.resume) == ("out/pretrain/model", "my text", 3, 1e-4, "yes")
    assert o.replay == train.PRESETS["replay"]["replay"] and o.retain == "docs"
    argv.remove("--resume")  # the command makes the run again
    assert shlex.split(o.command) == ["python", "train.py", *argv]


def test_the_recipe_of_the_card():
    """The defaults: lr 5e-5, decay 0.01, 8 x 128 tokens, growth at 500, 1000, 1500 of 2000."""
    o = train.Options()
    due = [s for s in range(o.max_steps + 1) if grow.scheduled(s, o.starts_growing, o.grow_every)]
    assert due[: o.max_growths] == [500, 1000, 1500]
    assert (o.lr, o.weight_decay, o.batch_size * o.grad_accum, o.block_size) == (5e-5, 0.01, 8, 128)
    assert (o.init, o.dataset, o.max_steps, o.freeze) == ("gpt2", "wikitext2", 2000, "base")


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
    assert ev.choose_machine("auto", "auto") == (torch.device(device), dtype)
