"""One loss, by one protocol; what is reported of a run is what it logged."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_train import options
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import data
import eval as ev
import grow
import model as m
import train
from model import GPT, GPTConfig


def network(seed=0, dropout=0.0):
    """The same seed gives the same weights, whatever the dropout."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(61, 16, 2, 8, (0, 0), dropout))
    for p in net.parameters():
        p.data += torch.randn_like(p) * 0.3
    return net


TOKENS = np.random.default_rng(0).integers(0, 61, 16 * 7 + 5).astype(np.uint16)


@pytest.mark.parametrize("average", ["token", "window"])
def test_evaluate_is_the_loss_of_transformers_over_the_same_windows(average):
    ours = network()
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=2, n_head=2)).eval()
    state = {f"transformer.{n}": p.t() if m.is_linear(n) else p for n, p in ours.named_parameters()}
    theirs.load_state_dict({**state, "lm_head.weight": ours.wte.weight})
    nats, counts = [], []
    for begin in range(0, len(TOKENS), 16):  # the last window has five tokens
        window = torch.from_numpy(TOKENS[begin : begin + 16].astype(np.int64))[None]
        counts.append(window.size(1) - 1)
        nats.append(theirs(window, labels=window).loss.item() * counts[-1])
    expected = sum(nats) / sum(counts) if average == "token" else np.mean(np.divide(nats, counts))
    assert abs(ev.evaluate(ours, TOKENS, average=average) - expected) < 1e-5


def test_evaluate_depends_on_nothing_else():
    """Not on the batch size, the generator or the mode, and it leaves both as they were."""
    net = network()
    net.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    losses = [ev.evaluate(net, TOKENS, 16, batch_size) for batch_size in (1, 2, 3, 8, 50)]
    assert max(losses) - min(losses) < 1e-6
    assert net.training and torch.equal(state, torch.get_rng_state())
    ev.evaluate(net.eval(), TOKENS)
    assert not any(part.training for part in net.modules())
    assert ev.evaluate(net, TOKENS, 16, windows=3) == pytest.approx(
        ev.evaluate(net, TOKENS[:48], 16), abs=1e-6
    )
    assert ev.evaluate(net, TOKENS[:33], 16) == ev.evaluate(
        net, TOKENS[:32], 16
    )  # one token predicts nothing
    for bad in (dict(block_size=17), dict(block_size=1)):
        with pytest.raises(data.UserError):
            ev.evaluate(net, TOKENS, **bad)
    with pytest.raises(data.UserError):
        ev.evaluate(net, TOKENS[:1])


def test_the_largest_ids_are_measured():
    """Half of GPT-2's vocabulary lies above what 16 bits with a sign can hold."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(50257, 8, 1, 4, (0,)))
    tokens = np.arange(50241, 50257).astype(np.uint16)
    idx = torch.arange(50241, 50257).view(2, 8)
    with torch.no_grad():
        expected = net(idx[:, :-1], idx[:, 1:])[1].item()
    assert ev.evaluate(net, tokens) == pytest.approx(expected, abs=1e-5)


def test_measuring_saves_nothing_for_a_backward():
    """It needs no memory that grows with the number of windows, though every parameter trains."""
    one, two, saved = network(0), network(1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ev.evaluate(one, TOKENS), ev.compare(one, two, tokens=TOKENS, block_size=16)
        ev.block_use(one, TOKENS, 16)
    assert all(p.requires_grad for p in one.parameters()) and not saved


def test_compare_and_block_use():
    one, two = network(0), network(1)
    assert ev.compare(one, one, TOKENS, 16)["kl"] == pytest.approx(0, abs=1e-7)
    both = ev.compare(one, two, TOKENS, 16, 3)
    first = ev.compare(one, two, tokens=TOKENS, block_size=16, windows=3)
    assert first == pytest.approx(ev.compare(one, two, tokens=TOKENS[:48], block_size=16), abs=1e-6)
    assert both["base"] == pytest.approx(ev.evaluate(one, TOKENS, 16), abs=1e-6)
    assert both["grown"] == pytest.approx(ev.evaluate(two, TOKENS, 16), abs=1e-6)
    idx = torch.from_numpy(TOKENS[:112].astype(np.int64)).view(7, 16)
    p, q = (torch.distributions.Categorical(logits=net.eval()(idx)[0][:, :-1]) for net in (one, two))
    expected = torch.distributions.kl_divergence(p, q).mean().item()
    assert ev.compare(one, two, TOKENS[:112], 16)["kl"] == pytest.approx(expected, abs=1e-5)
    grow.insert_block(one, 1)
    use = ev.block_use(one, TOKENS, 16, 7)
    assert use[1] == 0 and use[0] > 0 and use[2] > 0


def test_a_last_window_of_one_token_is_no_window():
    """It predicts nothing: the mean of the windows' means goes over the whole windows before it."""
    net, windows = network(), torch.from_numpy(TOKENS[:32].astype(np.int64)).view(2, 16)
    with torch.no_grad():
        expected = np.mean([net.eval()(w[None, :-1], w[None, 1:])[1].item() for w in windows])
    for windows in (0, 3):  # all there are, or more than there are
        found = ev.evaluate(net, TOKENS[:33], block_size=16, windows=windows, average="window")
        assert found == pytest.approx(expected, abs=1e-6)
    # One token more, and the last window predicts it.
    with torch.no_grad():
        tail = torch.from_numpy(TOKENS[32:34].astype(np.int64))[None]
        last = net(tail[:, :-1], tail[:, 1:])[1].item()
    found = ev.evaluate(net, TOKENS[:34], block_size=16, average="window")
    assert found == pytest.approx((2 * expected + last) / 3, abs=1e-6)


def test_compare_measures_both_networks_without_dropout():
    """In whatever mode they come, the numbers are those of the same networks that drop nothing."""
    expected = ev.compare(network(0), network(1), tokens=TOKENS, block_size=16)
    base, grown = network(0, dropout=0.5), network(1, dropout=0.5)
    for base_trains, grown_trains in ((True, False), (False, True), (True, True)):
        base.train(base_trains), grown.train(grown_trains)
        assert ev.compare(base, grown, tokens=TOKENS, block_size=16) == expected
        base.train(base_trains), grown.train(grown_trains)
        *alone, _ = ev.evaluate_together([base, grown], TOKENS, 16)
        assert alone == pytest.approx([expected["base"], expected["grown"]], abs=1e-6)


def test_block_use_counts_only_tokens_that_predict_one():
    """Window by window, |block(x) - x| / |x| where the next token is in the window: no filling counts."""
    net = network(dropout=0.5)
    grow.insert_block(net, 1)
    seen = {}
    for i, block in enumerate(net.h):
        block.register_forward_hook(lambda block, x, out, i=i: seen.update({i: (x[0], out)}))
    ratios = [[] for _ in net.h]
    for begin in (0, 16, 32):  # the third window has five tokens, and rows 4 to 8 do not exist
        window = torch.from_numpy(TOKENS[:37][begin : begin + 16].astype(np.int64))[None]
        with torch.no_grad():
            net.eval()(window)
        for i, (x, out) in seen.items():
            for t in range(window.size(1) - 1):
                ratios[i].append(((out[0, t] - x[0, t]).norm() / x[0, t].norm()).item())
    assert [len(r) for r in ratios] == [15 + 15 + 4] * 3
    use = ev.block_use(net.train(), TOKENS[:37], 16, 8)
    assert use == pytest.approx([np.mean(r) for r in ratios], rel=1e-5) and use[1] == 0


def network_like_gpt2():
    """Its logits lie near -95: the final norm sets one channel to 10, which the head multiplies by -9.5."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(257, 16, 2, 16, (0, 0)))
    with torch.no_grad():
        net.wte.weight.normal_(std=0.5)
        net.wte.weight[:, 0], net.wpe.weight[:, 0] = -9.5, 9.5
        net.ln_f.weight[0], net.ln_f.bias[0] = 0.0, 10.0
    return net.eval()


@torch.no_grad()
def log_probabilities(net, idx):
    """(B, T, V): blocks under bfloat16 autocast, what follows them in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = net.run(net.embed(idx))
    normed = F.layer_norm(hidden.float(), (16,), net.ln_f.weight, net.ln_f.bias)
    return F.linear(normed, net.wte.weight).log_softmax(-1)


def nats(log_p, idx):
    return -log_p[:, :-1].gather(-1, idx[:, 1:, None]).mean().item()


def test_figures_have_float32_logits_under_autocast(monkeypatch):
    """bfloat16 has steps of 0.5 there, which would move every figure by a hundred times the tolerance."""
    base, grown = network_like_gpt2(), network_like_gpt2()
    grown.h[1].mlp.c_proj.weight.data.normal_(std=0.3)
    idx = torch.randint(257, (6, 16))
    p, q = (log_probabilities(net, idx) for net in (base, grown))
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1].mean().item()
    tokens = idx.flatten().numpy().astype(np.uint16)
    monkeypatch.setattr(data, "GPT2", 257)
    monkeypatch.setattr(data, "lambada", lambda: ["keep learn"])
    monkeypatch.setattr(data, "encode", lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16))
    passage = torch.tensor([list(b"keep learn")])
    with torch.autocast("cpu", torch.bfloat16):
        assert ev.evaluate(grown, tokens) == pytest.approx(nats(q, idx), abs=1e-5)
        both = ev.compare(base, grown, tokens, 16)
        perplexity = ev.lambada(grown)["perplexity"]
        coarse = grown(idx)[0].float().log_softmax(-1)
    assert both["base"] == pytest.approx(nats(p, idx), abs=1e-5)
    assert both["grown"] == pytest.approx(nats(q, idx), abs=1e-5)
    assert both["kl"] == pytest.approx(kl, abs=1e-5) and kl > 1e-3
    last_word = log_probabilities(grown, passage)[0, 3:-1].gather(-1, passage[0, 4:, None]).sum().item()
    assert math.log(perplexity) == pytest.approx(-last_word, abs=1e-4)
    assert abs(nats(coarse, idx) - nats(q, idx)) > 1e-3


def test_matrix_precision_is_the_highest_around_the_head_only(monkeypatch):
    net, seen = network().eval(), []
    monkeypatch.setattr(net.h[0], "forward", lambda x: seen.append(torch.get_float32_matmul_precision()) or x)
    monkeypatch.setattr(net.ln_f, "forward", lambda x: seen.append(torch.get_float32_matmul_precision()) or x)
    torch.set_float32_matmul_precision("high")
    try:
        ev.evaluate(net, np.zeros(4, np.uint16), 4)
        assert seen == ["high", "highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_is_named_truthfully(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "blocks in bfloat16, logits in float32" in ev.protocol("test", 16, cpu, torch.bfloat16)
    assert "blocks in float32, logits in float32" in ev.protocol("test", 16, cpu, torch.float32)
    for supported, blocks in ((True, "TF32"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda there=supported: there)
        assert f"blocks in {blocks}, logits in float32" in ev.protocol("test", 16, cuda, torch.float32)


class LogitMemory(TorchDispatchMode):
    """The most numbers that float32 tensors with V columns ever held at once, weights aside."""

    def __init__(self, V, weights):
        super().__init__()
        self.V, self.peak, self.alive = V, 0, {}
        self.weights = {p.untyped_storage().data_ptr() for p in weights}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.shape[-1:] == (self.V,):
                memory = t.untyped_storage()  # views of one tensor count once
                if memory.data_ptr() not in self.weights:
                    self.alive[memory.data_ptr()] = weakref.ref(t), memory.nbytes() // 4
        self.alive = {key: held for key, held in self.alive.items() if held[0]() is not None}
        self.peak = max(self.peak, sum(numbers for _, numbers in self.alive.values()))
        return out


def test_comparison_holds_at_most_four_logit_matrices():
    B, T, V = 4, 16, 263  # nothing else has 263 columns
    torch.manual_seed(0)
    base, grown = (GPT(GPTConfig(V, T, 2, 8, (0,))) for _ in range(2))
    tokens = torch.randint(V, (3 * B * T,)).numpy().astype(np.uint16)
    with LogitMemory(V, [*base.parameters(), *grown.parameters()]) as memory:
        ev.compare(base, grown, tokens, T, B)
    assert 2 <= memory.peak / (B * T * V) <= 4


def test_comparison_says_how_many_windows_there_were():
    one = network()
    assert ev.compare(one, one, TOKENS, 16)["windows"] == 8 and len(TOKENS) == 7 * 16 + 5
    assert ev.compare(one, one, TOKENS, 16, windows=5)["windows"] == 5
    assert ev.compare(one, one, TOKENS[:33], 16, windows=5)["windows"] == 2  # one token predicts nothing
    assert ev.compare(one, one, TOKENS, 16)["mixed"] is None  # for what comes next


def test_ranks_share_the_batches(monkeypatch):
    """(That they end with the same sums as one process is tested by test_ddp.py.)"""
    owned = []

    def gather(everyone, measured):
        owned.append(sorted(measured))
        everyone[:] = [measured] * 2

    monkeypatch.setattr(ev.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ev.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ev.dist, "all_gather_object", gather)
    for rank in (0, 1):
        monkeypatch.setattr(ev.dist, "get_rank", lambda rank=rank: rank)
        ev.evaluate(network(), TOKENS, 16, 2)
    assert owned == [[0, 4], [2, 6]]  # numbers of the batches' first windows


@pytest.mark.parametrize("terminal", [True, False])
def test_time_left_is_shown_when_it_takes_long(monkeypatch, capsys, terminal):
    """By a clock that runs 2 s a batch: after 5 s, then at most every second on a terminal, else every 30."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now.append(now[-1] + 2) or now[-1])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    ev.evaluate(network(), np.tile(TOKENS, 20)[: 16 * 40], 16, 1)
    shown = capsys.readouterr().err
    lines = shown.split("\r" if terminal else "\n")[:-1]
    assert len(lines) == (38 if terminal else 2) and lines[0].strip() == (
        "2 of 40 windows, 114 s left" if terminal else "15 of 40 windows, 53 s left"
    )


def test_short_measurements_show_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ev.evaluate(network(), TOKENS, 16)
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    text = folder / "words.txt"
    text.write_text("\n".join(["grow learn keep", "block layer token"] * 400))
    train.train(options(str(text), folder / "run", max_growths=2))
    return folder / "run"


def test_tables_say_what_the_run_logged(run, capsys):
    ev.main([str(run)])
    printed = capsys.readouterr().out
    result = ev.read_run(run)["result"]
    assert f"{result['learn']['grown']:.4f}" in printed and "context 16, stride 16" in printed
    assert re.search(r"KL\(base, grown\) .*\| windows \|\n.*\n.*\| +4 \|\n.*\| +4 \|\n", printed)
    end = printed[printed.rindex("\n|") :]  # below the last table: where things are and how to go on
    for needed in (f"{run}/model", f"python eval.py {run}\n", "--plot=", "--prompt="):
        assert needed in end
    ev.main([str(run), str(run), "--json"])
    parsed = json.loads(capsys.readouterr().out)
    assert parsed[0]["forgetting"] == ev.forgetting(result)
    assert [row["loss_after"] - row["loss_before"] for row in parsed[0]["scaling"]] == [0, 0]
    base = train.start_model(train.Options(**ev.read_run(run)["header"]["config"]))
    tokens = data.load(result["learn"]["dataset"], 257, 16)["test"]
    assert result["learn"]["base"] == pytest.approx(ev.evaluate(base, tokens, 16, windows=4), abs=1e-5)


def test_a_run_without_old_text_has_tables_too(run, tmp_path):
    r = ev.read_run(run)
    r["result"]["retain"] = dict.fromkeys(r["result"]["retain"]) | {"dataset": "none"}
    assert "| learn: " in ev.comparison([r]) and "| retain: " not in ev.comparison([r])
    assert "forgetting was not measured" in ev.model_card(r)
    ev.plot([r], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_gain_is_per_million_parameters_that_trained(run):
    r = ev.read_run(run)
    last, rows = r["event"][-1], ev.scaling_rows(r)
    gained = last["learn_after"] - r["eval"][-1]["learn"]
    assert last["trainable"] != last["parameters_added"]  # the blocks of both growths train
    assert rows[-1]["gain_per_million"] == pytest.approx(gained / last["trainable"] * 1e6)


def test_card_shows_the_options_of_the_last_start(run, tmp_path):
    """A resumed run's header has them."""
    shutil.copytree(run, tmp_path / "run")
    o = train.Options(**ev.read_run(run)["header"]["config"])
    assert re.search(r"\| --log_every +\| +1 \|", (run / "model" / "README.md").read_text())
    train.train(dataclasses.replace(o, out=str(tmp_path / "run"), resume="yes", log_every=7))
    assert re.search(r"\| --log_every +\| +7 \|", (tmp_path / "run" / "model" / "README.md").read_text())


def unfinished_copy(run, folder):
    """As a run is before its end: no result, no model."""
    folder.mkdir()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"result"' not in line))
    return str(folder)


def test_unfinished_runs(run, tmp_path, capsys):
    """Among several: the others are shown. Alone, or to sample from: one sentence that says what to do."""
    folder = unfinished_copy(run, tmp_path / "stopped")
    for names in ([str(run), folder], [folder, str(run)]):
        ev.main(names)
        printed = capsys.readouterr()
        assert f"{ev.read_run(run)['result']['learn']['grown']:.4f}" in printed.out
        assert printed.err == f"{folder} is not finished: run its command again with --resume\n"
    ev.main([folder, str(run), str(run), "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 2
    ev.main([str(tmp_path), str(run)])  # as out/* may have a folder that is no run
    assert f"no run in {tmp_path};" in capsys.readouterr().err
    for more in ([], ["--prompt=grow"], [f"--dataset={run.parent / 'words.txt'}"]):
        with pytest.raises(data.UserError, match=f"{folder} is not finished: .*--resume"):
            ev.main([folder, *more])


@pytest.mark.parametrize("name", ["nowhere/plot.png", "plot.nope", "plot"])
def test_a_picture_that_cannot_be_written_is_refused_before_the_tables(run, tmp_path, capsys, name):
    with pytest.raises(data.UsageError, match=re.escape(str(tmp_path / name))):
        ev.main([str(run), f"--plot={tmp_path / name}"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("typed, named", [
    (["--json", "--prompt=grow"], "--json"), (["--plot=plot.png", "--dataset=docs"], "--plot"),
    (["--json", "--lambada"], "--json"), *(
        ([option], option.partition("=")[0])
        for option in ("--split=test", "--block_size=8", "--batch_size=2", "--windows=3", "--average=window",
                       "--top_k=3", "--seed=1", "--temperature=1", "--max_new_tokens=3", "--device=cpu",
                       "--dtype=auto", "--cache_dir=cache")
    ),
    (["--top_k=3", "--dataset=docs"], "--top_k"), (["--windows=3", "--prompt=grow"], "--windows"),
])  # fmt: skip
def test_options_that_would_do_nothing_are_refused_by_name(run, typed, named):
    with pytest.raises(data.UsageError, match=f"^{named} "):
        ev.main([str(run), *typed])


def test_a_device_that_is_not_there_is_refused(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(data.UsageError, match="--device=cuda, but torch sees none"):
        ev.main([str(run), "--prompt=grow", "--device=cuda"])


def test_json_is_strict(run, monkeypatch):
    assert ev.ppl(1e6) < math.inf  # a number, whatever the loss
    r = ev.read_run(run)
    r["result"]["best"] = math.nan
    monkeypatch.setattr(ev, "read_run", lambda name: r)
    with pytest.raises(ValueError, match="not JSON compliant"):
        ev.main([str(run), "--json"])


def test_a_relative_path_that_failed_is_shown_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError, match=re.escape(str(tmp_path / "nowhere"))):
        ev.main(["nowhere"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eval_measures_what_the_run_measured(tmp_path, monkeypatch, dtype):
    """At equal dtype and windows, without another word: the context is the run's, not the network's."""
    network_like_gpt2().save_pretrained(tmp_path / "net")
    text = tmp_path / "words.txt"
    text.write_text("\n".join(f"grow {i} learn {i * i} keep" for i in range(900)))
    typed = dict(init=tmp_path / "net", dataset=text, retain="none", out=tmp_path / "run", dtype=dtype,
                 block_size=8, batch_size=8, lr=1e-2, max_steps=4, grow_every=2, max_growths=1,
                 eval_windows=4, test_windows=20, device="cpu")  # fmt: skip
    train.main([f"--{name}={value}" for name, value in typed.items()])
    measured, evaluate = [], ev.evaluate_together

    def noted(*args):
        measured.append(evaluate(*args)[0])
        return measured[-1:] * 2

    monkeypatch.setattr(ev, "evaluate_together", noted)
    result = ev.read_run(tmp_path / "run")["result"]["learn"]
    protocol = ["--split=test", f"--windows={result['windows']}", f"--dtype={dtype}", "--device=cpu"]
    ev.main([str(tmp_path / "run"), f"--dataset={text}", *protocol])
    assert measured == [pytest.approx(result["grown"], abs=1e-6)] and result["windows"] == 20
    # and the last evaluation of the run, on the validation split
    ev.main([str(tmp_path / "run"), f"--dataset={text}", "--windows=4", *protocol[2:]])
    assert measured[1] == pytest.approx(ev.read_run(tmp_path / "run")["eval"][-1]["learn"], abs=1e-6)


def test_plot_needs_matplotlib_and_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(data.UserError, match="pip install matplotlib"):
        ev.main([str(run), f"--plot={tmp_path / 'plot.png'}"])


def test_usage_of_the_model_card_runs(run):
    """The snippet in the export's README, executed as it stands."""
    card = (run / "model" / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "def main" in done.stdout, done.stderr
    for section in (f"Summary of {run}", "Growths", "Options", "Usage", "Limits and licence"):
        assert f"## {section}\n" in card


def test_command_line(run, capsys):
    ev.main([str(run), "--prompt", "grow", "--max_new_tokens=5", "--temperature=0"])
    assert capsys.readouterr().out.startswith("grow")
    ev.main(
        [
            str(run),
            f"--dataset={ev.read_run(run)['result']['learn']['dataset']}",
            "--split=test",
            "--average=window",
        ]
    )
    assert "mean by window" in capsys.readouterr().out
    for bad, says in ((["--lambada"], "vocabulary"), (["--dataset=nothing"], "no data set"),
                      (["--top_k=-1"], "top_k"),
                      (["--lamb"], "unrecognized"), (["--split=all"], "invalid choice")):  # fmt: skip
        with pytest.raises(data.UserError, match=says):
            ev.main([str(run), *bad])
    with pytest.raises(data.UserError, match="no run"):
        ev.main([str(run / "nothing")])


def test_lambada_counts_whole_last_words(monkeypatch):
    """Against one passage at a time: the sum of the losses of the last word."""
    monkeypatch.setattr(data, "GPT2", 257)
    monkeypatch.setattr(data, "lambada", lambda: ["a b cd", "the cat sat", "x yz"])
    monkeypatch.setattr(data, "encode", lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16))
    torch.manual_seed(0)
    net = GPT(GPTConfig(257, 16, 2, 8, (0,))).eval()
    nats = 0.0
    for context, word in (("a b", " cd"), ("the cat", " sat"), ("x", " yz")):
        idx = torch.tensor([list((context + word).encode())])
        log_p = net(idx)[0].log_softmax(-1)[0]
        nats -= sum(log_p[i - 1, idx[0, i]].item() for i in range(len(context), idx.size(1)))
    assert ev.lambada(net)["perplexity"] == pytest.approx(math.exp(nats / 3), rel=1e-4)
