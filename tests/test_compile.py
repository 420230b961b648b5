"""torch.compile under growth: exact, without new graphs, without silent fallbacks or traces in files."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DEVICES, ROOT, old_text
from torch._dynamo.utils import counters

import data
import eval as ev
import grow
import train
from model import GPT, GPTConfig

TINY = dict(
    init="scratch", tokenizer="bytes", n_layer=6, n_head=2, n_embd=32, block_size=32, batch_size=4, lr=1e-3,
    max_steps=10, grow_every=2, max_growths=4, eval_every=1, eval_windows=10, test_windows=6, log_every=1,
    save_every=100, device="cpu", dtype="float32", compile="1",
)  # fmt: skip
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


def compiled_network(o, layers=3):
    """A small network and its objective, compiled as train.py does it, and a batch."""
    assert train.choose_machine(o)[2], "compiling must be possible here"
    torch.manual_seed(0)
    model = GPT(GPTConfig(data.BYTES, 32, 2, 32, (0,) * layers))
    objective = grow.Objective(model)
    train.compile_parts(objective)
    ids = torch.randint(256, (4, 33))
    return model, objective, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


SETTINGS = {
    "card": dict(),
    "older": dict(where="spread", freeze="older", dropout=0.1),
    "nothing frozen": dict(where="bottom", freeze="none", block_init="fresh"),
    "plateau": dict(trigger="plateau", patience=2, min_delta=1e9, grad_accum=2, dtype="bfloat16"),
    "distillation": dict(first_growth=0, kd_weight=1.0),
    "old text": dict(kd_weight=1.0, kd_on="retain", kd_rows=2, ewc_lambda=1.0, replay=0.25),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_growth_adds_no_graph_after_the_second_event(text, tmp_path, monkeypatch, name, device):
    """What depends on the depth is compiled again at every growth, for seconds or minutes each time."""
    trace_only(monkeypatch)
    insert, seen = grow.insert_block, []
    monkeypatch.setattr(grow, "insert_block", lambda *args: (seen.append(graphs()), insert(*args))[1])
    texts = {"dataset": text, "retain": old_text(text), "out": f"{tmp_path}/run"}
    o = train.Options(**{**TINY, **texts, **SETTINGS[name], "device": device})
    train.train(o)
    first, second, third, fourth = seen
    assert 0 < first <= second <= third == fourth
    at_the_end = graphs() - fourth  # tables and export included
    assert at_the_end <= (name == "old text")  # torch 2.11: a frozen teacher, evaluated for the first time
    assert (first < second) == (o.freeze != "none")  # freezing does change what is compiled: it is counted


def test_past_the_limit_of_graphs_it_raises(monkeypatch):
    """torch would go on eagerly, several times slower, with a line in a log that nobody reads."""
    trace_only(monkeypatch)
    model, objective, x, y = compiled_network(train.Options(**TINY), layers=1)
    assert torch._dynamo.config.recompile_limit > 16  # more than any run needs
    torch._dynamo.config.recompile_limit = 3
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for length in range(8, 16):
            objective(x[:, :length], y[:, :length])


def test_sampling_adds_no_graph(monkeypatch):
    """Every new token is a new shape: sampling and odd shapes must run as they are written."""
    trace_only(monkeypatch)
    model, objective, x, y = compiled_network(train.Options(**TINY))
    objective(x, y)[0].backward()
    ev.evaluate(model, x.flatten().numpy(), 32, 4)
    before = graphs()
    assert before >= 4  # block and loss, training and evaluation
    model.generate(x[:1, :3], 40, generator=torch.Generator().manual_seed(0))  # past block_size
    model.generate(x[:2, :5], 3, temperature=0)
    ev.sample(model, "grow", 3)
    ev.block_use(model, x.flatten().numpy(), 32)  # eight rows, whatever the batch
    train.count_flops(objective, x, y)
    assert graphs() == before
    copied = GPT(model.config)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied.generate(x[:1, :3], 9, 0), model.generate(x[:1, :3], 9, 0))


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, freeze, tolerance", [("float32", "none", 1e-3), ("bfloat16", "base", 3e-2)])
def test_compiled_run_grows_exactly_and_is_that_of_an_eager_one(
    text, tmp_path, monkeypatch, dtype, freeze, tolerance, device
):
    """Fused kernels round differently from eager ones, but growth must still not change one bit."""
    small = {**TINY, "n_layer": 2, "max_growths": 1, "max_steps": 4, "dataset": text, "retain": "none"}
    small |= {"dtype": dtype, "freeze": freeze, "device": device}
    insert, frozen, logits = grow.insert_block, grow.freeze, []
    probe = torch.arange(128, device=device).view(4, 32)

    @torch.no_grad()
    def note(model):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits.append(model(probe)[0])

    def after(model, policy):
        frozen(model, policy)
        note(model)
        assert {block._compiled_call_impl is not None for block in model.h} == {out == "compiled"}

    monkeypatch.setattr(grow, "insert_block", lambda model, *args: (note(model), insert(model, *args))[1])
    monkeypatch.setattr(grow, "freeze", after)
    for out, compile in (("eager", "0"), ("compiled", "1")):
        train.train(train.Options(**{**small, "compile": compile, "out": f"{tmp_path}/{out}"}))
        assert len(logits) == 2 and torch.equal(*logits)
        logits.clear()
    eager, compiled = (ev.read_run(tmp_path / out) for out in ("eager", "compiled"))
    assert "compile 1: asked for" in compiled["header"]["machine"]
    for a, b in zip(eager["step"], compiled["step"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
    assert [e["learn_before"] for e in compiled["event"]] == [e["learn_after"] for e in compiled["event"]]

    names = set(GPT(GPTConfig(data.BYTES, 32, 2, 32, (0,) * 3)).state_dict())
    for name in ("ckpt.pt", "best.pt"):
        saved = train.load_checkpoint(tmp_path / "compiled" / name)
        assert set(saved["model"]) <= names and not any("_orig_mod" in key for key in saved["model"])
    for file in (tmp_path / "compiled").rglob("*.*"):
        assert not file.is_file() or b"_orig_mod" not in file.read_bytes(), file
    assert GPT.from_pretrained(tmp_path / "compiled/model").config.generation.count(0) == 2


def test_where_compiling_is_impossible_the_run_goes_on(text, tmp_path, monkeypatch, capsys):
    """A laptop without a compiler must train all the same, and be told once why it is slower."""

    def broken(*args, **more):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    small = {**TINY, "n_layer": 2, "max_growths": 1, "max_steps": 3, "dataset": text, "retain": "none"}
    train.train(train.Options(**{**small, "out": f"{tmp_path}/run"}))
    out = capsys.readouterr().out
    assert out.count("compile 0: impossible here (RuntimeError), so eagerly") == 1
    assert ev.read_run(tmp_path / "run")["result"]["layers"] == 3


def test_without_a_cpp_compiler_it_says_so(tmp_path):
    """The same where the compiler is really missing."""
    program = f"import json, train; print(json.dumps(train.choose_machine(train.Options(**{TINY!r}))[2:]))"
    env = {**os.environ, "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120
    )
    use, reasons = json.loads(run.stdout.splitlines()[-1])
    assert use is False and reasons[-1].startswith("compile 0: impossible here (")
