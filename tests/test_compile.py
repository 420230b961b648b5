"""torch.compile under growth: exact, without new graphs, without silent fallbacks or traces in files."""

import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DEVICES, ROOT
from torch._dynamo.utils import counters

import data
import eval as ev
import grow
import train
from model import GPT, GPTConfig

TINY = dict(
    init="scratch", tokenizer="bytes", n_layer=6, n_head=2, n_embd=32, block_size=32, batch_size=4, lr=1e-3,
    retain="none", max_steps=10, max_growths=4, eval_every=1, eval_windows=10, test_windows=6, log_every=1,
    save_every=100, device="cpu", dtype="float32", compile="1",
)  # fmt: skip
SMALL = dict(n_layer=2, max_steps=4, grow_every=2, max_growths=1)  # one growth, in the middle
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU, and there is none here",
)


pytestmark = pytest.mark.usefixtures("own_dynamo")


def trace_only(monkeypatch):
    """Compile as always, but run each graph as it was traced: that counts graphs without a compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def graphs():
    return counters["stats"]["unique_graphs"]


def words(text, out, **more):
    return [f"--{k}={v}" for k, v in {**TINY, "dataset": text, "out": str(out), **more}.items()]


def compiled_network(layers=3, device="cpu"):
    """A small network and its objective, compiled as train.py does it, and a batch."""
    assert ev.choose_compile("1", torch.device(device))[0], "compiling must be possible here"
    torch.manual_seed(0)
    model = GPT(GPTConfig(data.BYTES, 32, 2, 32, (0,) * layers)).to(device)
    objective = grow.Objective(model)
    grow.compile_objective(objective)
    ids = torch.randint(256, (4, 33)).to(device)
    return model, objective, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


SETTINGS = {
    "card": dict(grow_every=2),
    "older": dict(grow_every=2, where="spread", freeze="older", dropout=0.1),
    "nothing frozen": dict(grow_every=2, where="bottom", freeze="none", block_init="fresh"),
    "plateau": dict(trigger="plateau", patience=2, min_delta=1e9, grad_accum=2, dtype="bfloat16"),
    "distillation": dict(grow_every=2, first_growth=0, kd_weight=1.0),
    "old text": dict(
        grow_every=2, retain="docs", kd_weight=1.0, kd_on="retain", kd_rows=2, ewc_lambda=1.0, replay=0.25
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_growth_adds_no_graph_after_the_second_event(text, tmp_path, monkeypatch, name, device):
    """What depends on the depth is compiled again at every growth, for seconds or minutes each time.

    Graphs are for training alone: whatever is measured is measured eagerly."""
    trace_only(monkeypatch)
    insert, seen, by_measuring = grow.insert_block, [], []

    def noting(model, *args):
        if not model.wte.weight.is_meta:  # the rehearsal before the run compiles nothing
            seen.append(graphs())
        return insert(model, *args)

    def measuring(function):
        def measured(*args):
            before, result = graphs(), function(*args)
            by_measuring.append(graphs() - before)
            return result

        return measured

    monkeypatch.setattr(grow, "insert_block", noting)
    for measure in ("evaluate", "compare", "block_use"):
        monkeypatch.setattr(ev, measure, measuring(getattr(ev, measure)))
    train.main(words(text, tmp_path / "run", **SETTINGS[name], device=device))
    first, second, third, fourth = seen
    assert 0 < first <= second <= third == fourth
    assert graphs() == fourth  # tables and export included
    assert len(by_measuring) > 14 and not any(by_measuring)
    frozen = SETTINGS[name].get("freeze") != "none"
    assert (first < second) == frozen  # freezing does change what is compiled: it is counted


def test_past_the_limit_of_graphs_it_raises(monkeypatch):
    """torch would go on eagerly, several times slower, with a line in a log that nobody reads."""
    trace_only(monkeypatch)
    model, objective, x, y = compiled_network(layers=1)
    assert torch._dynamo.config.recompile_limit > 16  # more than any run needs
    torch._dynamo.config.recompile_limit = 3
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for length in range(8, 16):
            objective(x[:, :length], y[:, :length])


def test_measuring_and_sampling_add_no_graph(monkeypatch):
    """Every new token is a new shape: sampling and odd shapes must run as they are written."""
    trace_only(monkeypatch)
    model, objective, x, y = compiled_network()
    tried = graphs()  # whether compiling is possible
    objective(x, y)[0].backward()
    before = graphs()
    assert before - tried == 2  # block and loss
    tokens = x.flatten().numpy()
    ev.evaluate(model, tokens, 32, 4)
    ev.evaluate(model, tokens, 7, 3)
    ev.compare(model, GPT(model.config), tokens, 32, 4)
    model.generate(x[:1, :3], 40, generator=torch.Generator().manual_seed(0))  # past block_size
    model.generate(x[:2, :5], 3, temperature=0)
    ev.sample([model], "grow", 3)
    ev.block_use(model, tokens, 32)  # eight rows, whatever the batch
    assert graphs() == before
    copied = GPT(model.config)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied.generate(x[:1, :3], 9, 0), model.generate(x[:1, :3], 9, 0))


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_step_grows_bitwise(device, dtype):
    """The trainer compares logits eagerly. What trains is compiled, and a growth changes not one bit of it:
    neither the logits nor the loss, nor the gradient of any parameter that was there before."""
    model, objective, x, y = compiled_network(device=device)
    before = {name: p for name, p in model.named_parameters()}

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits, _ = model(x)
            loss, _ = objective(x, y)
        model.zero_grad(set_to_none=True)
        loss.backward()
        return {"logits": logits, "loss": loss} | {name: p.grad for name, p in before.items()}

    expected = step()
    for at, init in ((3, "copy"), (1, "fresh"), (0, "copy")):  # top, middle, bottom
        grow.insert_block(model, at, init).compile(dynamic=False)
        assert all(block._compiled_call_impl for block in model.h)
        for name, value in step().items():
            assert torch.equal(value, expected[name]), (at, name)
    assert model.config.n_layer == 6 and expected["loss"].item() > 1


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, freeze, tolerance", [("float32", "none", 1e-3), ("bfloat16", "base", 3e-2)])
def test_compiled_run_grows_exactly_and_is_that_of_an_eager_one(
    text, tmp_path, monkeypatch, dtype, freeze, tolerance, device
):
    """Fused kernels round differently from eager ones, but growth must still not change one bit."""
    evaluate, logits = ev.evaluate, []
    probe = torch.arange(128, device=device).view(4, 32)

    @torch.no_grad()
    def noting(model, *args):  # once a step, and once more after the growth
        assert {block._compiled_call_impl is not None for block in model.h} == {out == "compiled"}
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits.append((model.config.n_layer, model(probe)[0]))
        return evaluate(model, *args)

    monkeypatch.setattr(ev, "evaluate", noting)
    for out, compile in (("eager", "0"), ("compiled", "1")):
        more = SMALL | {"dtype": dtype, "freeze": freeze, "device": device, "compile": compile}
        train.main(words(text, tmp_path / out, **more))
        assert [layers for layers, _ in logits] == [2, 2, 2, 3, 3, 3]
        assert torch.equal(logits[2][1], logits[3][1])  # before and after
        assert not torch.equal(logits[3][1], logits[4][1])
        logits.clear()
    eager, compiled = (ev.read_run(tmp_path / out) for out in ("eager", "compiled"))
    assert "compile 1: asked for" in compiled["header"]["machine"]
    for a, b in zip(eager["step"], compiled["step"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
    assert [e["learn_before"] for e in compiled["event"]] == [e["learn_after"] for e in compiled["event"]]

    names = set(GPT(GPTConfig(data.BYTES, 32, 2, 32, (0,) * 3)).state_dict())
    saved = data.load_checkpoint(tmp_path / "compiled/ckpt.pt")
    assert set(saved["model"]) == names and not any("_orig_mod" in key for key in saved["model"])
    for file in (tmp_path / "compiled").rglob("*.*"):
        assert not file.is_file() or b"_orig_mod" not in file.read_bytes(), file
    assert GPT.from_pretrained(tmp_path / "compiled/model").config.generation.count(0) == 2


def test_where_compiling_is_impossible_the_run_goes_on(text, tmp_path, monkeypatch, capsys):
    """A laptop without a compiler must train all the same, and be told once why it is slower."""

    def broken(*args, **more):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    train.main(words(text, tmp_path / "run", **SMALL))
    out = capsys.readouterr().out
    assert out.count("compile 0: impossible here (RuntimeError), so eagerly") == 1
    assert ev.read_run(tmp_path / "run")["result"]["layers"] == 3


def test_without_a_cpp_compiler_it_says_so(tmp_path):
    """The same where the compiler is really missing."""
    program = "import eval as ev, torch; print(*ev.choose_compile('1', torch.device('cpu')))"
    env = {**os.environ, "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120
    )
    assert run.stdout.startswith("False impossible here ("), run.stderr
