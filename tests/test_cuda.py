"""What must hold on a GPU as on the CPU: both run here where there is CUDA, else the CPU alone."""

import dataclasses
import math

import pytest
import torch
from conftest import DEVICES, needs_cuda, old_text
from test_train import TINY

import data
import eval as ev
import grow
import train
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("own_dynamo")


def options(text, out, **more):
    texts = {"dataset": text, "retain": old_text(text), "out": str(out)}
    return train.Options(**{**TINY, **texts, "lr": 1e-3, **more})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_growth_is_exact_and_a_stopped_run_goes_on(text, tmp_path, device, dtype):
    """With what train.py chooses by itself: on CUDA the graphs of torch.compile and a loss scaler, too."""
    whole = options(text, tmp_path / "whole", device=device, dtype=dtype)
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"))
    train.train(whole)
    train.train(dataclasses.replace(parts, max_steps=7))
    train.train(dataclasses.replace(parts, resume="yes"))
    a, b = (ev.read_run(o.out) for o in (whole, parts))
    assert a["header"]["machine"][0].startswith(f"device {device}")
    for run in (a, b):
        assert [e["step"] for e in run["event"]] == [3, 6, 9]
        assert all(e["identical"] and e["learn_before"] == e["learn_after"] for e in run["event"])
    for x, y in zip(a["step"], b["step"], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
    assert a["eval"][-1]["learn"] < a["eval"][0]["learn"]  # it did learn


@pytest.mark.parametrize("device", DEVICES)
def test_what_keeps_the_old_text(text, tmp_path, device):
    """EWC's sampled labels and dreams are drawn on the device, with its own generator."""
    keeping = dict(kd_weight=1.0, kd_on="dream", dreams=8, kd_rows=2, ewc_lambda=1.0, freeze="none")
    train.train(options(text, tmp_path / "run", device=device, **keeping))
    steps = ev.read_run(tmp_path / "run")["step"]
    assert all(math.isfinite(s["loss"]) for s in steps)
    assert steps[-1]["kd"] > 0 and steps[-1]["ewc"] > 0


@needs_cuda
def test_cuda_computes_what_the_cpu_computes():
    """Loss, divergence, gradients and greedy samples; the products are in TF32 there."""
    train.choose_machine(train.Options(device="cuda"))
    torch.manual_seed(0)
    net = GPT(GPTConfig(data.BYTES, 32, 2, 32, (0,) * 3))
    other = GPT(net.config)
    tokens = torch.randint(256, (300,)).numpy().astype("uint16")
    x = torch.randint(256, (4, 33))
    found = []
    for device in ("cpu", "cuda"):
        net.to(device), other.to(device)
        net.zero_grad(set_to_none=True)
        grow.Objective(net)(x[:, :-1].to(device), x[:, 1:].to(device))[0].backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
        found.append([norm, *ev.compare(net, other, tokens, 32).values()])
        greedy = net.generate(x[:1, :3].to(device), 20, temperature=0)
        assert greedy.shape == (1, 23) and greedy.device.type == device
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@needs_cuda
@pytest.mark.parametrize("compile", ["0", "1"])
def test_a_step_never_waits_for_the_gpu(text, tmp_path, compile):
    """torch raises here at whatever would wait: .item(), a copy from memory that is not pinned ..."""
    o = options(text, tmp_path / "run", device="cuda", dtype="auto", compile=compile, grad_accum=2)
    run = train.Run(o)
    for _ in range(3):
        run.train_step()
    run.log_losses()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.log_losses()
    assert run.step == 6
