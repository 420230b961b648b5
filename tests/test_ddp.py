"""Several processes: the same run as one process, to float32 rounding, and bitwise the same on every rank."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, write_words

import data
import eval as ev
import train
from model import GPT, GPTConfig

NEW = dict(init="scratch", tokenizer="bytes", n_layer=2, n_head=2, n_embd=32)
TINY = dict(
    retain="docs", block_size=32, batch_size=4, lr=1e-3, max_steps=16, max_growths=2, eval_every=2,
    eval_windows=10, test_windows=6, log_every=1, save_every=8, device="cpu", dtype="float32", compile="0",
)  # fmt: skip
SCHEDULE = dict(grow_every=5)
# A loss that must fall by 1e9 never does, so the plateau's growths come after `patience` steps.
RUNS = {
    "schedule": dict(**SCHEDULE, grad_accum=2),
    "plateau": dict(trigger="plateau", patience=4, min_delta=1e9, freeze="older"),
    "keeping": dict(
        **SCHEDULE, freeze="none", replay=0.25, kd_weight=1.0, kd_on="retain", kd_rows=2, ewc_lambda=10.0
    ),
    "shared": dict(**SCHEDULE, init="net", first_growth=0, kd_weight=1.0, eval_windows=7),  # and mixed
    "compiled": dict(**SCHEDULE, compile="1", grad_accum=2),  # what is run on GPUs
}
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here")
EVALUATIONS = [(7, "token"), (9, "window"), (1, "token"), (0, "token")]  # windows, average; 0: all of them


def words(folder, text, out, **more):
    start = {"init": f"{folder}/net"} if more.pop("init", None) else NEW
    options = {**start, **TINY, "dataset": text, "out": f"{folder}/{out}", **more}
    return [f"--{k}={v}" for k, v in options.items()]


def network_and_tokens():
    torch.manual_seed(1)
    net = GPT(GPTConfig(data.BYTES, 32, 2, 32, (0,) * 2))
    return net, np.random.default_rng(0).integers(0, 256, 8 * 32 + 5).astype(np.uint16)


def worker(rank, folder, text):
    """What each of the two processes does: all runs, one after the other, noting its weights as it goes."""
    torch.set_num_threads(1)
    os.environ.update(
        WORLD_SIZE="2", RANK=str(rank)
    )  # as torchrun does; but they meet in a file, not at a port
    meet, meetings = dist.init_process_group, itertools.count()

    def meet_in_a_file(backend):
        meet(backend, f"file://{folder}/meeting{next(meetings)}", rank=rank, world_size=2)

    dist.init_process_group = meet_in_a_file
    dist.init_process_group("gloo")
    net, tokens = network_and_tokens()
    seen = {"evaluations": [ev.evaluate(net, tokens, 32, 2, *case) for case in EVALUATIONS]}
    dist.destroy_process_group()
    evaluate = ev.evaluate

    def noting(model, *args):  # every rank evaluates: there it writes down its weights, and how many train
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        notes.append([len(model.h), trains, digest.hexdigest()])
        # Two texts at steps 0, 2 and 4, and before and after the growth at 5: the 11th is at step 6.
        if name == "stopped" and rank == 1 and len(notes) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, *args)

    ev.evaluate = noting
    for name, more in {**RUNS, "stopped": SCHEDULE, "continued": {**SCHEDULE, "resume": "yes"}}.items():
        notes = seen[name] = []
        try:
            train.main(words(folder, text, name, **more))
        except SystemExit as e:
            seen["status"] = e.code
    try:  # each on a disk of its own, of which one has a checkpoint
        train.main(words(folder, text, ("stopped", "nowhere")[rank], **SCHEDULE, resume="auto"))
    except data.UserError as e:
        seen["apart"] = str(e)
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two processes share what may be two cores, and a tiny network is faster on one of them anyway."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, optimize_ddp=True):
        yield  # the trainer's settings must not stay behind
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with every run by one process (ONE) and by two, and what the two ranks saw."""
    folder = tmp_path_factory.mktemp("ddp")
    text = write_words(folder)
    network_and_tokens()[0].save_pretrained(folder / "net")
    for name, more in {**RUNS, "plain": SCHEDULE}.items():
        train.main(words(folder, text, f"{name}-one", **more))
    train.main(words(folder, text, "continued", **SCHEDULE | {"max_steps": 8}))
    torch.multiprocessing.spawn(worker, (str(folder), text), nprocs=2)
    seen = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return folder, text, seen


def assert_close(one, two):
    """Two runs with the same losses, growths, best and weights, to float32 rounding."""
    a, b = (ev.read_run(folder) for folder in (one, two))
    for kind in ("step", "eval", "event"):
        assert [row["step"] for row in a[kind]] == [row["step"] for row in b[kind]] and a[kind]
        for x, y in zip(a[kind], b[kind]):
            for key in x.keys() - {"ms"}:
                close = pytest.approx(y[key], rel=1e-5, abs=1e-6) if type(y[key]) is float else y[key]
                assert x[key] == close, (kind, x["step"], key)
    keys = ["base", "grown", "kl"] + ["mixed"] * (len(a["result"]["versions"]) > 1)
    for text, key in itertools.product(("learn", "retain"), keys):
        expected = pytest.approx(b["result"][text][key], rel=1e-5, abs=1e-6)
        assert a["result"][text][key] == expected, (text, key)
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
    """Who computes which rows must not change what is learned, when it grows, or what is measured."""
    folder, _, _ = runs
    assert_close(folder / f"{name}-one", folder / name)
    assert len(ev.read_run(folder / name)["event"]) == 2


@pytest.mark.parametrize("name", [*RUNS, "stopped", "continued"])
def test_ranks_hold_the_same_weights(runs, name):
    """A block appended behind DDP's back would get other gradients on each rank, and nobody would notice."""
    _, _, (first, second) = runs
    assert first[name] == second[name]
    if name in RUNS:
        assert {layers for layers, _, _ in first[name]} >= {3, 4}  # seen through both growths
        assert len({digest for _, _, digest in first[name]}) > 6  # and they did train


def test_evaluation_is_that_of_one_process(runs):
    """Each window has one owner, so the sum over ranks is exact, whether the batches divide evenly or not."""
    _, _, (first, second) = runs
    net, tokens = network_and_tokens()
    alone = [ev.evaluate(net, tokens, 32, 2, *case) for case in EVALUATIONS]
    assert first["evaluations"] == second["evaluations"] == alone
    assert len(set(alone)) == len(alone)


def test_signal_to_one_rank_stops_all_and_one_process_goes_on(runs, capsys):
    """A scheduler may signal one process only: all must save the same step, and fewer may continue."""
    folder, text, (first, second) = runs
    assert first["status"] == second["status"] == 128 + signal.SIGTERM
    assert data.load_checkpoint(folder / "stopped/ckpt.pt")["step"] == 6
    train.main(words(folder, text, "stopped", **SCHEDULE, resume="yes"))
    assert "resumed at step 6 with 3 layers" in capsys.readouterr().out
    assert_close(folder / "plain-one", folder / "stopped")


def test_two_processes_go_on_where_one_ended(runs):
    """Batches depend on (seed, step) only and state goes by name, so more processes may continue a run."""
    folder, _, (first, _) = runs
    assert_close(folder / "plain-one", folder / "continued")
    assert {layers for layers, _, _ in first["continued"]} == {3, 4}


def test_ranks_that_see_different_checkpoints_are_refused(runs):
    """One would go on where the other begins: the losses would be nobody's."""
    _, _, seen = runs
    assert all("on a disk that all nodes share" in ranks["apart"] for ranks in seen)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_two_gpus)])
def test_torchrun(runs, tmp_path, device):
    """The documented command, start to end: one process prints, and the run is that of one process.

    Each rank keeps its own compiled kernels: they hold choices made by timing, and with another rank's a
    growth might not be bitwise the identity. (It is torch that makes the folders, where it looks for them.)
    """
    folder, text, _ = runs
    argv = words(tmp_path, text, "run", **SCHEDULE, device=device, cache_dir=tmp_path)
    # torch itself sets this, in this process, once it has compiled
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "train.py"), *argv],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("grew 2 -> 3 layers") == run.stdout.count("Summary of") == 1
    assert ev.read_run(tmp_path / "run")["header"]["processes"] == 2
    if device == "cpu":
        assert_close(folder / "plain-one", tmp_path / "run")
    assert (tmp_path / "kernels-0").is_dir() and (tmp_path / "kernels-1").is_dir()


def test_rows_that_do_not_divide_are_refused(text, tmp_path, monkeypatch):
    """Ranks with different numbers of rows would weigh them differently in the mean."""
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "TORCHINDUCTOR_CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(data.UsageError, match="multiple of the 2 processes"):
        train.main(words(tmp_path, text, "run", **SCHEDULE, batch_size=3))


def test_dropout_in_several_processes_is_refused(text, tmp_path, monkeypatch):
    """Each would drop something else."""
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "TORCHINDUCTOR_CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(data.UsageError, match="--dropout=0"):
        train.main(words(tmp_path, text, "run", **SCHEDULE, dropout=0.1))
