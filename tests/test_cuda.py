"""What must hold on a GPU as on the CPU: both run here where there is CUDA, else the CPU alone.

A step must not wait for the device, nor make tensors on the CPU, nor launch a kernel for each of hundreds of
tensors: that, a CPU can tell, too."""

import math

import pytest
import torch
from conftest import BYTES, DEVICES, PLAIN, SCRATCH, arguments, needs_cuda, rows, tiny_gpt
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as ev
import grow
import train
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("own_dynamo")


# ----- the same on every device -----

RUNS = {
    "as the program chooses": dict(dtype="auto"),
    "loss scaler": dict(dtype="float16"),
    # EWC's sampled labels and generated text are drawn on the device, with its own generator.
    "keeping": dict(kd_weight=1.0, kd_on="generated", generated=8, kd_rows=2, ewc_lambda=1.0, freeze="none"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RUNS)
def test_growth_is_exact_and_a_run_goes_on(text, tmp_path, device, name):
    """On CUDA with the graphs of torch.compile, too."""
    options = RUNS[name] | dict(device=device, lr=1e-3)
    train.main(arguments(text, tmp_path / "whole", **options))
    train.main(arguments(text, tmp_path / "parts", **options, max_steps=5))
    train.main(arguments(text, tmp_path / "parts", "--resume", **options))
    for out in ("whole", "parts"):
        events = rows(tmp_path / out, "event")
        assert [e["step"] for e in events] == [3, 6]
        assert all(e[f"{of}_before"] == e[f"{of}_after"] for e in events for of in ("learn", "retain"))
    for x, y in zip(rows(tmp_path / "whole", "step"), rows(tmp_path / "parts", "step"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
    first, *_, last = rows(tmp_path / "whole", "eval")
    assert last["learn"] < first["learn"]  # it did learn
    assert (x["kd"] > 0) == (x["ewc"] > 0) == (name == "keeping")  # in the last step


@pytest.mark.parametrize("device", DEVICES)
def test_versions_predict_together(text, tmp_path, device):
    """Measured, and sampled: the weights live on the CPU, in float64, whatever the device."""
    tiny_gpt(vocab_size=BYTES).save_pretrained(tmp_path / "net")
    start = dict.fromkeys(SCRATCH) | dict(init=tmp_path / "net", first_growth=0, device=device)
    train.main(arguments(text, tmp_path / "run", **start))
    (result,) = rows(tmp_path / "run", "result")
    best = min(result["learn"]["base"], result["learn"]["grown"])
    assert len(result["versions"]) == 2 and result["learn"]["mixed"] <= best + math.log(4) / 15
    for more in (["--prompt=k", "--max_new_tokens=20"], [f"--dataset={text}"]):
        ev.main([str(tmp_path / "run"), f"--device={device}", *more])


@needs_cuda
def test_cuda_computes_what_the_cpu_computes():
    """Loss, divergence, gradients and greedy samples; the products are in TF32 there."""
    ev.choose_machine("cuda")
    net, other = (tiny_gpt((0,) * 3, BYTES, n_embd=32, seed=seed) for seed in (0, 1))
    tokens = torch.randint(256, (300,)).numpy().astype("uint16")
    x = torch.randint(256, (4, 17))
    found = []
    for device in ("cpu", "cuda"):
        net.to(device), other.to(device)
        net.zero_grad(set_to_none=True)
        grow.Objective(net)(x[:, :-1].to(device), x[:, 1:].to(device))[0].backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
        measured = ev.measure([net, other], tokens, 16, kl=True)
        found.append([norm, *measured["losses"], measured["mixed"], measured["kl"]])
        greedy = net.generate(x[:1, :3].to(device), 20, temperature=0)
        assert greedy.shape == (1, 23) and greedy.device.type == device
    assert found[0] == pytest.approx(found[1], rel=1e-2)


# ----- a step waits for nothing -----

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default,
    aten.masked_select.default,
}  # fmt: skip
VIEWS = {aten.detach.default, aten.view.default, aten.alias.default}


class NoWaiting(TorchDispatchMode):
    """Refuses every operation whose result the program would have to wait for, and counts those that launch
    something."""

    seen = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in WAITS, f"{operation} waits for the device"
        self.seen += operation not in VIEWS
        return operation(*args, **(kwargs or {}))


def around_steps(monkeypatch, begin, end):
    """Call begin() when the batches of a step are on the device, and end() when its gradients are cleared."""
    micro_batches, zero_grad = train.micro_batches, torch.optim.AdamW.zero_grad

    def batches_and_begin(*args):
        batches = micro_batches(*args)
        begin()
        return batches

    def clear_and_end(self, *args, **more):
        zero_grad(self, *args, **more)
        end()

    monkeypatch.setattr(train, "micro_batches", batches_and_begin)
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", clear_and_end)


STEPS = {
    "plain": {},
    "distilled": dict(kd_weight=1.0, grad_clip=0.0),
    "distilled on old text": dict(kd_weight=1.0, kd_on="retain", kd_rows=2, first_growth=0, replay=0.5),
    "EWC": dict(ewc_lambda=10.0, ewc_batches=2, freeze="none"),
    "scaler, accumulation": dict(dtype="float16", grad_accum=2),
    "dropout": dict(dropout=0.1, block_init="fresh"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits(text, tmp_path, monkeypatch, name):
    """From when its batches are there, through both growths of a run."""
    with pytest.raises(AssertionError, match="waits"), NoWaiting():  # this test can fail
        torch.ones(()).item()
    mode = NoWaiting()
    around_steps(monkeypatch, mode.__enter__, lambda: mode.__exit__(None, None, None))
    train.main(arguments(text, tmp_path / "run", **STEPS[name]))
    assert mode.seen > 7 * 50


@needs_cuda
@pytest.mark.parametrize("compile", ["0", "1"])
def test_a_step_never_waits_for_the_gpu(text, tmp_path, monkeypatch, compile):
    """torch raises here at whatever would wait: .item(), a copy from memory that is not pinned ..."""
    steps, batch = [], data.batch

    def watching(*args):  # before the batch is copied; the first steps compile
        steps.append(args)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 2 else "default")
        return batch(*args)

    monkeypatch.setattr(data, "batch", watching)
    around_steps(monkeypatch, lambda: None, lambda: torch.cuda.set_sync_debug_mode("default"))
    machine = dict(device="cuda", dtype="auto", compile=compile, grad_accum=2)
    try:
        train.main(arguments(text, tmp_path / "run", **PLAIN, **machine))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 7


@pytest.mark.parametrize("policy, teacher", [("base", "shared"), ("older", "none"), ("top1", "separate")])
def test_growing_and_a_step_make_nothing_on_the_cpu(policy, teacher, monkeypatch):
    """On `meta`, where a tensor made on the CPU by mistake raises."""
    adamw = torch.optim.AdamW  # the fused one does not know this device
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **more: adamw(*args, **more))
    with torch.device("meta"):
        model, separate = (GPT(GPTConfig(BYTES, 16, 2, 16, (0, 0))) for _ in range(2))
        x, y = (torch.zeros(4, 16, dtype=torch.long) for _ in range(2))
    optimizer = grow.make_optimizer(model, 1e-3, 0.1)
    for at, init in ((2, "copy"), (1, "fresh")):
        block = grow.insert_block(model, at, init)
        grow.freeze(model, policy)
        nets = {"none": None, "shared": grow.original(model), "separate": separate.requires_grad_(False)}
        objective = grow.Objective(model, nets[teacher], 2.0)
        optimizer = grow.make_optimizer(model, 1e-3, 0.1, grow.optimizer_state(model, optimizer))
        for learned in (4, 3) if teacher != "none" else (4,):  # the fourth row is to be distilled alone
            nll, kd = objective(x, y[:learned])
            (nll + kd).backward()
            norm = torch.nn.utils.clip_grad_norm_(grow.trainable(model), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert {t.device.type for t in (nll, kd, norm, *block.parameters())} == {"meta"}


def test_ewc_is_computed_for_all_parameters_at_once():
    """In as many launches for 4 blocks as for 1."""
    launches = []
    for layers in (1, 4):
        model = tiny_gpt((0,) * layers)
        ewc = grow.EWC(model, [torch.randint(61, (2, 16))])
        with NoWaiting() as mode:
            ewc.penalty(model)
        launches.append(mode.seen)
    assert launches[0] == launches[1] <= 8
