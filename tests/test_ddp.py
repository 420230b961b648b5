"""Several processes: the same run as one process, to float32 rounding, and bitwise the same on every rank."""

import functools
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
import torch.distributed as dist
from conftest import BYTES, ROOT, SCRATCH, tiny_gpt, write_words

import data
import eval as ev
import train

# Three batches of validation windows, and one of test windows: ranks have unequal parts, or none.
OPTIONS = dict(eval_windows=10, test_windows=3, lr=1e-3, save_every=100)
RUNS = {
    "schedule": dict(grad_accum=2),
    # A loss that must fall by 1e9 never does, so the plateau's growths come after `patience` steps.
    "plateau": dict(trigger="plateau", grow_every=None, patience=2, min_delta=1e9, freeze="older"),
    "keeping": dict(freeze="none", replay=0.25, kd_weight=1.0, kd_on="retain", kd_rows=2, ewc_lambda=10.0),
    "shared": dict.fromkeys(SCRATCH) | dict(init="net", first_growth=0, kd_weight=1.0),  # and mixed
    "compiled": dict(compile="1", grad_accum=2),  # what is run on GPUs
}


def arguments(folder, out, *words, **more):
    if more.get("init") == "net":
        more["init"] = f"{folder}/net"
    return conftest.arguments(write_words(folder), f"{folder}/{out}", *words, **OPTIONS | more)


def be_quick():
    """What is compiled is traced, and run without a compiler."""
    torch.compile = functools.partial(torch.compile, backend="eager")


def alone(_, folder):
    """What one process does: each run, and the first half of another."""
    be_quick()
    for name, more in {**RUNS, "plain": {}}.items():
        train.main(arguments(folder, f"{name}-one", **more))
    train.main(arguments(folder, "continued", max_steps=4))


def together(rank, folder):
    """What each of two processes does: all runs, noting its weights as it goes. They meet in files."""
    be_quick()
    os.environ.update(WORLD_SIZE="2", RANK=str(rank))
    meet, numbers = dist.init_process_group, itertools.count()

    def meet_in_a_file(backend):
        meet(backend, f"file://{folder}/meeting{next(numbers)}", rank=rank, world_size=2)

    dist.init_process_group = meet_in_a_file
    seen, measure = {}, ev.measure

    def noting(nets, *args, **more):  # every rank measures: there it writes down its weights
        model = nets[-1]
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        notes.append([len(model.h), trains, digest.hexdigest()])
        # Two texts at steps 0 and 2, and before and after the growth at 3: the 9th is at step 4.
        if name == "stopped" and rank == 1 and len(notes) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(nets, *args, **more)

    ev.measure = noting
    for name, more in {**RUNS, "stopped": {}, "continued": {"resume": "yes"}}.items():
        notes = seen[name] = []
        try:
            train.main(arguments(folder, name, **more))
        except SystemExit as e:
            seen["status"] = e.code
        if dist.is_initialized():  # a program that ends may leave that to its end
            dist.destroy_process_group()
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with every run by one process (NAME-one) and by two (NAME), and what the two ranks saw."""
    folder = tmp_path_factory.mktemp("ddp")
    tiny_gpt(vocab_size=BYTES).save_pretrained(folder / "net")
    for what, processes in ((alone, 1), (together, 2)):
        torch.multiprocessing.start_processes(what, (str(folder),), processes, start_method="forkserver")
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_close(one, two):
    """Two runs with the same losses, growths, best and weights, to float32 rounding."""
    a, b = (ev.read_run(folder) for folder in (one, two))
    for kind in ("step", "eval", "event"):
        assert [row["step"] for row in a[kind]] == [row["step"] for row in b[kind]] and a[kind]
        for x, y in zip(a[kind], b[kind]):
            for key in x.keys() - {"ms"}:
                close = pytest.approx(y[key], rel=1e-5, abs=1e-6) if type(y[key]) is float else y[key]
                assert x[key] == close, (kind, x["step"], key)
    for text, key in itertools.product(("learn", "retain"), ("base", "grown", "kl", "mixed")):
        x, y = a["result"][text][key], b["result"][text][key]
        assert x == y is None or x == pytest.approx(y, rel=1e-5, abs=1e-6), (text, key)
    assert a["result"]["best"] == pytest.approx(b["result"]["best"], rel=1e-5)
    assert a["result"]["flops"] == b["result"]["flops"]
    a, b = (data.load_checkpoint(Path(folder) / "ckpt.pt")["model"] for folder in (one, two))
    assert a.keys() == b.keys() and not any("module." in key for key in b)
    for key, p in a.items():
        q = b[key]
        if key.endswith("c_attn.bias"):  # softmax does not see the bias of the keys: its gradient is
            p, q = (torch.cat(t.chunk(3)[::2]) for t in (p, q))  # rounding, which AdamW blows up
        # A twentieth of one of AdamW's steps, which magnifies the rounding of gradients that are nearly zero.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=5e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_as_one(runs, name):
    """Who computes which rows must not change what is learned, when it grows, or what is measured. (A block
    appended behind DDP's back would get other gradients on each rank, and nobody would notice.)"""
    folder, (first, second) = runs
    assert_close(folder / f"{name}-one", folder / name)
    assert len(ev.read_run(folder / name)["event"]) == 2
    assert first[name] == second[name]
    assert {layers for layers, _, _ in first[name]} >= {3, 4}  # seen through both growths
    assert len({digest for _, _, digest in first[name]}) > 4  # and they did train


def test_fewer_and_more_processes_go_on_where_others_ended(runs):
    """Batches depend on (seed, step) only and state goes by name. A scheduler may signal one process only:
    all must save the same step."""
    folder, (first, second) = runs
    assert first == second and first["status"] == 128 + signal.SIGTERM
    saved = data.load_checkpoint(folder / "stopped/ckpt.pt")
    assert saved["step"] == 4 and len(saved["model_config"]["generation"]) == 3
    train.main(arguments(folder, "stopped", "--resume"))
    assert_close(folder / "plain-one", folder / "stopped")
    assert_close(folder / "plain-one", folder / "continued")
    assert {layers for layers, _, _ in first["continued"]} == {3, 4}


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_two_gpus)])
def test_torchrun(runs, tmp_path, device):
    """The documented command, start to end: one process prints, and the run is that of one process. Each rank
    keeps its own compiled kernels, which hold choices made by timing. (torch makes these folders.)"""
    folder, _ = runs
    # torch itself sets the first, in this process, once it has compiled
    env = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    env |= {"OMP_NUM_THREADS": "1", "GROWING_GPT_CACHE": str(tmp_path)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = arguments(folder, f"torchrun-{device}", device=device, compile="0")
    run = subprocess.run([*torchrun, str(ROOT / "train.py"), *argv], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| before ") == 1
    assert ev.read_run(folder / f"torchrun-{device}")["header"]["processes"] == 2
    if device == "cpu":
        assert_close(folder / "plain-one", folder / "torchrun-cpu")
    assert (tmp_path / "kernels-0").is_dir() and (tmp_path / "kernels-1").is_dir()


@pytest.mark.parametrize("more, named", [(dict(batch_size=3), "batch_size"), (dict(dropout=0.1), "dropout")])
def test_what_ranks_cannot_share_is_refused(tmp_path, more, named):
    """Other numbers of rows would weigh them differently in the mean, and each rank would drop out others."""
    argv = arguments(tmp_path, "run", **more)
    conftest.refused(lambda: train.check(train.parse(argv), world=2), f"--{named}")
