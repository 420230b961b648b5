"""The run: options, resuming bitwise, kills, signals, faults, and what a run folder holds."""

import dataclasses
import json
import os
import platform
import random
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
    skip = ("ms", "seconds", "train_seconds", "command")
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
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        try:
            train.train(options(text, tmp_path / "parts", resume="auto", **VARIANTS[variant]))
            break
        except SystemExit as e:
            assert e.code == 128 + signal.SIGTERM
            stops += 1
        finally:
            for s, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
                signal.signal(s, handler)
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
    with pytest.raises(UserError, match="at step 7.*--lr"):
        train.train(options(text, tmp_path / "run", max_steps=30, save_every=3, log_every=5))
    saved = data.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert all(torch.isfinite(w).all() for w in saved["model"].values())
    assert saved["step"] == 6


def test_out_of_memory_gives_the_same_global_batch(text, tmp_path, monkeypatch):
    def fail(o):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train", fail)
    arguments = command(options(text, tmp_path / "run", batch_size=8, grad_accum=3))[2:]
    with pytest.raises(UserError, match="--batch_size=4 --grad_accum=6"):
        train.main(arguments)


def test_a_bug_keeps_its_traceback(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda o: [][1])
    with pytest.raises(IndexError):
        ev.run_main(lambda argv: train.main(command(options(text, tmp_path / "run"))[2:]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_found_before_training(text, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to the run folder"):
        train.train(options(text, tmp_path / "run"))


# ----- what a run is made of -----


def test_events_are_exact_and_logged(text, tmp_path):
    train.train(options(text, tmp_path / "run", freeze="base"))
    run = ev.read_run(tmp_path / "run")
    assert [e["step"] for e in run["event"]] == [3, 6, 9]
    for e in run["event"]:
        assert (
            e["identical"]
            and e["learn_after"] == e["learn_before"]
            and e["retain_after"] == e["retain_before"]
        )
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
    pretrained, kept = train.start_model(o), train.grow.original(grown)
    x = torch.randint(256, (2, 16))
    assert torch.equal(pretrained(x)[0], kept(x)[0])
    assert not torch.equal(pretrained(x)[0], grown(x)[0])


# ----- options -----

BAD = [
    ("--grow_evry=5", "did you mean --grow_every"),
    ("--max_steps=ten", "max_steps"),
    ("--max_st=10", "unknown option"),
    ("dmeo", "unknown preset"),
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
    assert run.stderr == "error: unknown option '--lrr=1': did you mean --lr?\n"


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
