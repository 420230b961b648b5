"""torch.compile under growth: exact, without new graphs, without silent fallbacks or traces in files."""

import functools
import os
import shutil

import conftest
import pytest
import torch
import torch._inductor.config
from conftest import BYTES, DEVICES, old_text, tiny_gpt
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import data
import eval as ev
import grow
import train
from model import GPT

pytestmark = pytest.mark.usefixtures("own_dynamo")
arguments = functools.partial(conftest.arguments, retain="none", lr=1e-3, eval_every=1, compile="1")
no_compiler = all(shutil.which(name) is None for name in (os.environ.get("CXX", "g++"), "clang++"))
needs_compiler = pytest.mark.skipif(no_compiler, reason="there is no C++ compiler, which torch.compile needs")


@pytest.fixture(autouse=True)
def trust_the_processor():
    """torch would first compile a program for each kind of vector, to see if it runs: many seconds."""
    with torch._inductor.config.patch("cpp.vec_isa_ok", True):
        yield


def trace_only(monkeypatch):
    """Compile as always, but run each graph as it was traced: that counts graphs without a compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def graphs():
    return counters["stats"]["unique_graphs"]


def compiled_network(layers=1, device="cpu"):
    """A small network and its objective, compiled as train.py does it, and a batch."""
    ev.choose_compile("1", torch.device(device))
    model = tiny_gpt((0,) * layers, BYTES, n_embd=16).to(device)
    objective = grow.Objective(model)
    grow.compile_objective(objective)
    ids = torch.randint(256, (4, 17)).to(device)
    return model, objective, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


SETTINGS = {
    "card": {},
    "distilled from step 0": dict(first_growth=0, kd_weight=1.0, grad_accum=2, dtype="bfloat16"),
    "old text, dropout": dict(
        where="bottom", freeze="older", block_init="fresh", retain="old", ewc_lambda=1.0, ewc_batches=2,
        replay=0.25, dropout=0.1,
    ),
    "nothing frozen": dict(freeze="none", retain="old", kd_weight=1.0, kd_on="retain", kd_rows=2),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_growth_adds_no_graph_after_the_second_event(text, tmp_path, monkeypatch, name, device):
    """What depends on the depth is compiled again at every growth, for seconds or minutes each time. Graphs
    are for training alone: whatever is measured is measured eagerly."""
    trace_only(monkeypatch)
    insert, seen, by_measuring = grow.insert_block, [], []

    def noting(model, *args):
        if not model.wte.weight.is_meta:  # the rehearsal before the run compiles nothing
            seen.append(graphs())
        return insert(model, *args)

    def measuring(function):
        def measured(*args, **more):
            before, result = graphs(), function(*args, **more)
            by_measuring.append(graphs() - before)
            return result

        return measured

    monkeypatch.setattr(grow, "insert_block", noting)
    for measure in ("evaluate", "measure", "block_use"):
        monkeypatch.setattr(ev, measure, measuring(getattr(ev, measure)))
    options = dict(n_layer=6, max_steps=9, grow_every=2, max_growths=4, device=device) | SETTINGS[name]
    if options.get("retain"):
        options["retain"] = old_text(text)
    train.main(arguments(text, tmp_path / "run", **options))
    first, second, third, fourth = seen
    assert first <= second <= third == fourth == graphs() > 0  # tables and export included
    assert first < second or name != "card"  # freezing does change what is compiled: it is counted
    assert len(by_measuring) > 14 and not any(by_measuring)


def test_only_training_adds_graphs_and_past_their_limit_it_raises(monkeypatch):
    """In sampling, every new token is a new shape. Past the limit torch would go on eagerly, several times
    slower, with a line in a log that nobody reads."""
    trace_only(monkeypatch)
    model, objective, x, y = compiled_network()
    tried = graphs()  # whether compiling is possible
    objective(x, y)[0].backward()
    before = graphs()
    assert before - tried == 2  # block and loss
    model.generate(x[:2, :3], 20, temperature=0)  # past block_size
    ev.sample([model], "grow", 3)
    assert graphs() == before
    assert torch._dynamo.config.recompile_limit > 16  # more than any run needs
    torch._dynamo.config.recompile_limit = 3
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for length in range(8, 16):
            objective(x[:, :length], y[:, :length])


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_step_grows_bitwise(device, dtype):
    """The trainer compares logits eagerly. What trains is compiled, and a growth changes not one bit of it:
    neither the logits nor the loss, nor the gradient of any parameter that was there before."""
    model, objective, x, y = compiled_network(device=device)
    before = dict(model.named_parameters())

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits, _ = model(x)
            loss, _ = objective(x, y)
        model.zero_grad(set_to_none=True)
        loss.backward()
        return {"logits": logits, "loss": loss} | {name: p.grad for name, p in before.items()}

    expected = step()
    for at, init in ((1, "copy"), (1, "fresh"), (0, "copy")):  # top, middle, bottom
        grow.insert_block(model, at, init)
        grow.compile_objective(objective)
        assert all(block._compiled_call_impl for block in model.h)
        for name, value in step().items():
            assert torch.equal(value, expected[name]), (at, name)
    assert model.config.n_layer == 4 and expected["loss"].item() > 1


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_run_is_that_of_an_eager_one(text, tmp_path, monkeypatch, device):
    """Fused kernels round differently. Nothing of torch.compile gets into a file."""
    block_use, seen = ev.block_use, []

    def noting(model, *args):
        seen.append({block._compiled_call_impl is not None for block in model.h})
        return block_use(model, *args)

    monkeypatch.setattr(ev, "block_use", noting)
    options = dict(max_steps=4, grow_every=2, max_growths=1, freeze="none", device=device)
    train.main(arguments(text, tmp_path / "eager", compile="0", **options))
    assert not graphs()
    train.main(arguments(text, tmp_path / "compiled", **options))
    assert graphs() and seen == [{False}, {True}]  # at the end: the new block is compiled, too
    eager, compiled = (ev.read_run(tmp_path / out) for out in ("eager", "compiled"))
    for a, b in zip(eager["step"], compiled["step"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)
    assert [e["learn_before"] for e in compiled["event"]] == [e["learn_after"] for e in compiled["event"]]
    names = set(tiny_gpt((0,) * 3, BYTES, n_embd=16).state_dict())
    assert set(data.load_checkpoint(tmp_path / "compiled/ckpt.pt")["model"]) == names
    for file in (tmp_path / "compiled").rglob("*.*"):
        assert not file.is_file() or b"_orig_mod" not in file.read_bytes(), file
    assert GPT.from_pretrained(tmp_path / "compiled/model").config.generation.count(0) == 2


def test_without_a_compiler_the_run_goes_on(text, tmp_path, capsys):
    """A laptop without one must train all the same, and be told why it is slower."""
    missing = torch._inductor.config.patch("cpp.cxx", (None, "/nonexistent/g++"))
    with missing, fresh_cache():
        train.main(arguments(text, tmp_path / "run"))
    printed = capsys.readouterr()
    assert "eagerly" in printed.out + printed.err
    assert ev.read_run(tmp_path / "run")["result"]["layers"] == 4
