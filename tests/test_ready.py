"""Ready for a GPU, as far as it can be tested without one.

A step launches its work and never waits for a result; nothing is made on the CPU by mistake, which the
`meta` device, where such a tensor meets no partner, turns into an error; work that takes a launch for each
of hundreds of tensors is done for all of them at once."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import old_text, write_words
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as ev
import grow
import train
from data import UserError
from model import GPT, GPTConfig

BYTES = 257


def options(folder, **more):
    text = write_words(folder)
    tiny = dict(init="scratch", tokenizer="bytes", n_layer=2, n_head=2, n_embd=16, dataset=text,
                retain=old_text(text), block_size=16, batch_size=4, lr=1e-3, max_steps=12, grow_every=4,
                max_growths=2, eval_every=100, eval_windows=4, test_windows=4, log_every=100, device="cpu",
                dtype="float32", out=str(folder / "run"))  # fmt: skip
    return train.Options(**tiny | more)


aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default,
         aten.masked_select.default}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Refuses every operation whose result the program would have to wait for."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in WAITS, f"{operation} waits for the device"
        self.seen += 1
        return operation(*args, **(kwargs or {}))


STEPS = {
    "plain": {},
    "distilled": dict(kd_weight=1.0),
    "distilled on old text": dict(kd_weight=1.0, kd_on="retain", kd_rows=2, first_growth=0),
    "EWC": dict(ewc_lambda=10.0, ewc_batches=2, freeze="none"),
    "scaler": dict(dtype="float16"),
    "accumulation": dict(grad_accum=2),
    "dropout": dict(dropout=0.1),
    "not clipped": dict(grad_clip=0.0),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits(name, tmp_path, monkeypatch):
    """From when its batch is there to the top of the loop: through growths, of a whole run."""
    mode, inside, steps = NoWaiting(), [], []
    micro_batches, gather = train.micro_batches, train.gather

    def enter(*args):
        batches = micro_batches(*args)
        inside.append(mode.__enter__())
        steps.append(args)
        return batches

    def leave(*args):  # the first thing that the loop does is to ask for signals
        if inside:
            inside.pop().__exit__(None, None, None)
        return gather(*args)

    monkeypatch.setattr(train, "micro_batches", enter)
    monkeypatch.setattr(train, "gather", leave)
    try:
        train.train(options(tmp_path, **STEPS[name]))
    finally:
        while inside:
            inside.pop().__exit__(None, None, None)
    assert len(steps) == 12 and mode.seen > 12 * 50


def test_the_test_above_can_fail():
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(()).item()


@pytest.mark.parametrize("policy", ["base", "older", "none", "top1"])
@pytest.mark.parametrize("teacher", ["none", "shared", "separate"])
def test_growing_and_a_step_make_nothing_on_the_cpu(policy, teacher, monkeypatch):
    """On `meta`, where a tensor made on the CPU by mistake raises."""
    adamw = torch.optim.AdamW  # the fused one does not know this device
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **more: adamw(*args, **more))
    with torch.device("meta"):
        model = GPT(GPTConfig(BYTES, 16, 2, 16, (0, 0)))
        separate = GPT(GPTConfig(BYTES, 16, 2, 16, (0, 0)))
        x, y = (torch.zeros(4, 16, dtype=torch.long) for _ in range(2))
    optimizer = grow.make_optimizer(model, 1e-3, 0.1)
    for at, init in ((2, "copy"), (1, "fresh")):
        block = grow.insert_block(model, at, init)
        grow.freeze(model, policy)
        nets = {"none": None, "shared": grow.original(model), "separate": separate.requires_grad_(False)}
        objective = grow.Objective(model, nets[teacher], 2.0)
        optimizer = grow.make_optimizer(model, 1e-3, 0.1, optimizer)
        for rows in (4, 3) if teacher != "none" else (4,):  # distilled on the batch, and on a row of its own
            nll, kd = objective(x, y[:rows])
            (nll + kd).backward()
            norm = torch.nn.utils.clip_grad_norm_(grow.trainable(model), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert {t.device.type for t in (nll, kd, norm, *block.parameters())} == {"meta"}


def test_ewc_is_computed_for_all_parameters_at_once():
    """Forward and backward in as many launches for 4 blocks as for 1."""

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.seen += operation not in (aten.detach.default, aten.view.default, aten.alias.default)
            return operation(*args, **(kwargs or {}))

    launches = []
    for layers in (1, 4):
        model = GPT(GPTConfig(BYTES, 16, 2, 16, (0,) * layers))
        ewc = grow.EWC(model, [torch.randint(BYTES, (2, 16))])
        with Count() as count:
            ewc.penalty(model)
        launches.append(count.seen)
    # stacking the norms is one launch; unpacking them is none, but for views
    assert launches[0] == launches[1] <= 8


@pytest.mark.parametrize("more, seeded", [({}, 2), (dict(block_init="fresh"), 4), (dict(dropout=0.1), 14)])
def test_seeds_are_set_only_where_something_is_random(more, seeded, tmp_path, monkeypatch):
    """For the weights of a new network, which is made again to be compared with; for two fresh blocks; for
    dropout in 12 steps."""
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda s: seeds.append(s) or seed(s))
    train.train(options(tmp_path, **more))
    assert len(seeds) == seeded


@pytest.mark.parametrize("more", [{}, dict(kd_weight=1.0, kd_on="retain", kd_rows=2), dict(replay=0.5)])
def test_what_is_pinned_is_contiguous(more, tmp_path, monkeypatch):
    """pin_memory of anything else would copy it twice. Of two ranks, so that each takes every other row."""
    copied, to_device = [], data.to_device
    monkeypatch.setattr(data, "to_device", lambda t, device: copied.append(t) or to_device(t, device))
    tokens = {"train": torch.arange(2000).numpy().astype("uint16")}
    o = options(tmp_path, grad_accum=2, **more)
    for rank in (0, 1):
        train.micro_batches(o, {"learn": tokens, "retain": tokens}, None, 0, torch.device("cpu"), rank, 2)
    assert len(copied) == 4 and all(t.is_contiguous() for t in copied)


@pytest.mark.parametrize("cuda, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_what_ranks_tell_one_another_does_not_pass_through_the_gpu(cuda, backend, tmp_path, monkeypatch):
    asked = []

    def stop(backend):
        asked.append(backend)
        raise UserError("far enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(train, "check", lambda o, world: None)
    monkeypatch.setattr(dist, "init_process_group", stop)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="far enough"):
        train.main([f"--out={tmp_path / 'run'}"])
    assert asked == [backend]


@pytest.mark.parametrize("rank", [None, 1])
def test_kernels_are_kept_in_the_cache(rank, tmp_path, monkeypatch):
    """Of every run, and of each rank its own; never over the user's choice."""
    monkeypatch.setattr(train, "check", lambda o, world: None)
    monkeypatch.setattr(train, "train", lambda o: None)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("RANK", str(rank)) if rank else monkeypatch.delenv("RANK", raising=False)
    train.main([f"--cache_dir={tmp_path}"])
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / f"kernels-{rank or 0}"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    train.main([f"--cache_dir={tmp_path}"])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


def test_several_processes_do_not_choose_a_device_without_a_backend(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ev.choose_machine()[0].type == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ev.choose_machine()[0].type == "cpu"
    with pytest.raises(UserError, match="--device=mps"):
        ev.choose_machine("mps")


def test_the_cpu_is_asked_what_it_can_only_if_it_computes(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: pytest.fail("nobody needs to know"))
    assert ev.choose_machine("mps", "auto")[1] == torch.float32
