"""What must hold on a GPU as on the CPU: both run here where there is CUDA, else the CPU alone."""

import math

import pytest
import torch
from conftest import DEVICES, needs_cuda
from test_train import TINY

import data
import eval as ev
import grow
import train
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("own_dynamo")


def words(text, out, **more):
    options = {**TINY, "dataset": text, "retain": "docs", "out": str(out), "lr": 1e-3, **more}
    return [f"--{k}={v}" for k, v in options.items() if v is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_growth_is_exact_and_a_stopped_run_goes_on(text, tmp_path, device, dtype):
    """With what train.py chooses by itself: on CUDA the graphs of torch.compile and a loss scaler, too."""
    machine = dict(device=device, dtype=dtype)
    train.main(words(text, tmp_path / "whole", **machine))
    train.main(words(text, tmp_path / "parts", **machine, max_steps=7))
    train.main(words(text, tmp_path / "parts", **machine, resume="yes"))
    a, b = (ev.read_run(tmp_path / out) for out in ("whole", "parts"))
    assert a["header"]["machine"][0].startswith(f"device {device}")
    for run in (a, b):
        assert [e["step"] for e in run["event"]] == [3, 6, 9]
        assert all(e["learn_before"] == e["learn_after"] for e in run["event"])
    for x, y in zip(a["step"], b["step"], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
    assert a["eval"][-1]["learn"] < a["eval"][0]["learn"]  # it did learn


@pytest.mark.parametrize("device", DEVICES)
def test_what_keeps_the_old_text(text, tmp_path, device):
    """EWC's sampled labels and dreams are drawn on the device, with its own generator."""
    keeping = dict(kd_weight=1.0, kd_on="dream", dreams=8, kd_rows=2, ewc_lambda=1.0, freeze="none")
    train.main(words(text, tmp_path / "run", device=device, **keeping))
    steps = ev.read_run(tmp_path / "run")["step"]
    assert all(math.isfinite(s["loss"]) for s in steps)
    assert steps[-1]["kd"] > 0 and steps[-1]["ewc"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_base_is_loaded_again_only_where_memory_is_scarce(text, tmp_path, device, monkeypatch):
    """Beside a GPU the host keeps the network that a run began with; what it is compared with is the same."""
    loads, load = [], train.start_model
    monkeypatch.setattr(train, "start_model", lambda o: loads.append(1) or load(o))
    train.main(words(text, tmp_path / "run", device=device))
    assert len(loads) == (2 if device == "cpu" else 1)
    result = ev.read_run(tmp_path / "run")["result"]
    assert result["learn"]["base"] > result["learn"]["grown"]


@pytest.mark.parametrize("device", DEVICES)
def test_versions_predict_together(text, tmp_path, device):
    """Measured, and sampled: the weights live on the CPU, in float64, whatever the device."""
    torch.manual_seed(0)
    GPT(GPTConfig(data.BYTES, 16, 2, 16, (0, 0))).save_pretrained(tmp_path / "net")
    start = dict(init=tmp_path / "net", first_growth=0, **dict.fromkeys(("n_layer", "n_head", "n_embd")))
    train.main(words(text, tmp_path / "run", device=device, **start, tokenizer=None, block_size=16))
    result = ev.read_run(tmp_path / "run")["result"]
    best = min(result["learn"]["base"], result["learn"]["grown"])
    assert len(result["versions"]) == 2 and result["learn"]["mixed"] <= best + math.log(2) / 15
    ev.main([str(tmp_path / "run"), "--prompt=k", "--max_new_tokens=20", f"--device={device}"])
    ev.main([str(tmp_path / "run"), f"--dataset={text}", f"--device={device}", "--share=0.01"])


@needs_cuda
def test_cuda_computes_what_the_cpu_computes():
    """Loss, divergence, gradients and greedy samples; the products are in TF32 there."""
    ev.choose_machine("cuda")
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
        compared = ev.compare(net, other, tokens, 32)
        found.append([norm, *(compared[key] for key in ("base", "grown", "kl"))])
        greedy = net.generate(x[:1, :3].to(device), 20, temperature=0)
        assert greedy.shape == (1, 23) and greedy.device.type == device
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@needs_cuda
@pytest.mark.parametrize("compile", ["0", "1"])
def test_a_step_never_waits_for_the_gpu(text, tmp_path, monkeypatch, compile):
    """torch raises here at whatever would wait: .item(), a copy from memory that is not pinned ...

    Step 1 waits for the log line of step 0, and the end for the last step. Nothing in between may."""
    batch, synchronize, watched, waits = data.batch, torch.accelerator.synchronize, [], []

    def watching(tokens, block_size, rows, step, seed):  # called at the start of each step
        if step >= 3:
            torch.cuda.set_sync_debug_mode("error")
            watched.append(step)
        return batch(tokens, block_size, rows, step, seed)

    def waiting():
        torch.cuda.set_sync_debug_mode("default")
        waits.append(len(watched))
        synchronize()

    monkeypatch.setattr(data, "batch", watching)
    monkeypatch.setattr(torch.accelerator, "synchronize", waiting)
    rarely = dict(log_every=100, eval_every=100, save_every=100, max_growths=0, grow_every=None)
    more = dict(device="cuda", dtype="auto", compile=compile, grad_accum=2, max_steps=6)
    try:
        train.main(words(text, tmp_path / "run", **more, **rarely))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [3, 4, 5] and waits == [0, 3]
    assert ev.read_run(tmp_path / "run")["result"]["tokens"] == 6 * 2 * 4 * 16
