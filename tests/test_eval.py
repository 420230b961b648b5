"""One loss, by one protocol: against transformers, window by window; what a run and eval.py report of it.

(test_tables.py has every cell of every table, test_versions.py what several versions predict together.)"""

import math
import re
import shutil
import sys
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BYTES, TINY, refused, rows, table, tiny_gpt, typed, write_words
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import data
import eval as ev
import grow
import train
from model import GPT, GPTConfig, is_linear

TOKENS = np.random.default_rng(0).integers(0, 61, 7 * 16 + 5).astype(np.uint16)  # the last window has five


def network(seed=0, dropout=0.0):
    """The same seed gives the same weights, whatever the dropout; they are large enough to differ."""
    net = tiny_gpt(seed=seed, dropout=dropout)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
    return net


def windows_of(tokens, block_size):
    """Windows (1, up to block_size) that predict anything."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    return [window[None] for window in ids.split(block_size) if len(window) > 1]


# ----- the loss, the mixture, the divergence -----


def log_probabilities(ours, idx):
    """(1, T, V) in float64, by transformers' network with the weights of ours."""
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=2, n_head=2)).eval()
    state = {f"transformer.{name}": p.t() if is_linear(name) else p for name, p in ours.named_parameters()}
    theirs.load_state_dict({**state, "lm_head.weight": ours.wte.weight})
    with torch.no_grad():
        return theirs(idx).logits.double().log_softmax(-1)


@pytest.mark.parametrize("count, windows", [(1, 0), (2, 0), (3, 0), (3, 4)])
def test_figures_are_those_of_transformers(count, windows):
    """Loss of each network, of all mixed, and the KL divergence of the last two, in nats per token.

    The mixture gives the tokens of a window the mean of two probabilities: the mean of those that the
    networks give them (Bayes, from equal weights), and that of a hidden Markov model whose state, the
    network, is drawn anew with probability 5% after each token."""
    nets = [network(seed) for seed in range(count)]
    nats, mixed, kl, predicted = torch.zeros(count).double(), 0.0, 0.0, 0
    worse = torch.zeros(count, dtype=torch.long)
    for window in windows_of(TOKENS, 16)[: windows or None]:
        each = torch.cat([log_probabilities(net, window)[:, :-1] for net in nets])  # (K, T - 1, V)
        of_window = each.gather(-1, window[:, 1:, None].expand(count, -1, 1)).sum((1, 2))  # (K,)
        nats -= of_window
        worse += (of_window[0] - of_window > 1).long()
        state = torch.full((count,), 1 / count).double()
        for p in each.gather(-1, window[:, 1:, None].expand(count, -1, 1))[..., 0].exp().unbind(-1):  # (K,)
            state = 0.95 * state * p + 0.05 * (state * p).sum() / count
        mixed -= ((of_window.exp().mean() + state.sum()) / 2).log().item()
        predicted += window.size(1) - 1
        if count > 1:
            p, q = (torch.distributions.Categorical(logits=log_p) for log_p in each[-2:])
            kl += torch.distributions.kl_divergence(p, q).sum().item()
    found = ev.measure(nets, TOKENS, 16, 3, windows, kl=count > 1)
    assert found["worse"][:count] == worse.tolist()
    assert found["windows"] == (windows or 8)
    assert found["losses"] == pytest.approx((nats / predicted).tolist(), abs=1e-5)
    if count > 1:
        assert found["mixed"] == pytest.approx(mixed / predicted, abs=1e-5)
        assert found["kl"] == pytest.approx(kl / predicted, abs=1e-5) and kl / predicted > 0.1
        assert ev.measure(nets, TOKENS, 16)["kl"] is None
    else:
        assert found["mixed"] is None and found["kl"] is None


def test_a_loss_depends_on_nothing_else():
    """Not on the batch size, the generator or the mode, and it leaves both as they were."""
    net = network().train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    losses = [ev.evaluate(net, TOKENS, 16, batch_size) for batch_size in (1, 3, 8, 50)]
    assert max(losses) - min(losses) < 1e-6
    assert net.training and torch.equal(state, torch.get_rng_state())
    assert ev.evaluate(net.eval(), TOKENS) == pytest.approx(losses[0], abs=1e-6)
    assert not any(part.training for part in net.modules())
    first = ev.evaluate(net, TOKENS[:48], 16)
    assert ev.evaluate(net, TOKENS, 16, windows=3) == pytest.approx(first, abs=1e-6)


def test_no_more_windows_than_are_mixed_together_are_kept_by_tokens(monkeypatch):
    """A split may be larger than memory: what is kept of a window that was mixed is one number a network."""
    nets, kept = [network(0), network(1)], []
    whole = ev.measure(nets, TOKENS, 16, 2, kl=True)
    mix = grow.mix
    monkeypatch.setattr(ev, "TOGETHER", 3)
    monkeypatch.setattr(grow, "mix", lambda nats: kept.append(nats.size(1)) or mix(nats))
    assert ev.measure(nets, TOKENS, 16, 2, kl=True) == whole
    assert kept == [4, 4] and whole["windows"] == 8


def test_a_last_window_of_one_token_is_no_window():
    """It predicts nothing; nor do fewer than two tokens, or windows of one, or longer than the context."""
    nets = [network(0), network(1)]
    found, whole = (ev.measure(nets, TOKENS[:n], 16, windows=5) for n in (33, 32))
    assert found == whole and found["windows"] == 2
    assert ev.measure(nets, TOKENS[:33], 16, windows=5, kl=True)["windows"] == 2  # as a result is measured
    for tokens, block_size in ((TOKENS, 17), (TOKENS, 1), (TOKENS[:1], 16)):
        with pytest.raises(data.UserError):
            ev.evaluate(nets[0], tokens, block_size)


def test_the_largest_ids_are_measured():
    """Half of GPT-2's vocabulary lies above what 16 bits with a sign can hold."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(50257, 8, 1, 4, (0,)))
    idx = torch.arange(50241, 50257).view(2, 8)
    with torch.no_grad():
        expected = net(idx[:, :-1], idx[:, 1:])[1].item()
    assert ev.evaluate(net, idx.flatten().numpy().astype(np.uint16)) == pytest.approx(expected, abs=1e-5)


def test_all_networks_are_measured_without_dropout():
    """In whatever mode they come, the figures are those of the same networks that drop nothing."""
    expected = ev.measure([network(0), network(1)], TOKENS, 16, kl=True)
    for modes in ((True, False), (False, True), (True, True)):
        nets = [network(seed, dropout=0.5).train(trains) for seed, trains in enumerate(modes)]
        assert ev.measure(nets, TOKENS, 16, kl=True) == expected


def test_block_use_counts_only_tokens_that_predict_one():
    """Window by window, |block(x) - x| / |x| where the next token is in the window: no filling counts."""
    net, seen = network(dropout=0.5), {}
    grow.insert_block(net, 1)
    for i, block in enumerate(net.h):
        block.register_forward_hook(lambda block, x, out, i=i: seen.update({i: (x[0], out)}))
    ratios = [[] for _ in net.h]
    for window in windows_of(TOKENS[:37], 16):  # of 16, 16 and 5 tokens, where eight windows are asked for
        with torch.no_grad():
            net.eval()(window)
        for i, (x, out) in seen.items():
            ratios[i] += ((out - x).norm(dim=-1) / x.norm(dim=-1))[0, :-1].tolist()
    assert [len(r) for r in ratios] == [15 + 15 + 4] * 3
    use = ev.block_use(net.train(), TOKENS[:37], 16, 8)
    assert use == pytest.approx([np.mean(r) for r in ratios], rel=1e-5) and use[1] == 0


# ----- memory, precision, time -----


def test_measuring_saves_nothing_for_a_backward():
    """It needs no memory that grows with the number of windows, though every parameter trains."""
    one, two, saved = network(0), network(1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ev.measure([one, two], TOKENS, 16, kl=True)
        ev.block_use(one, TOKENS, 16)
    assert all(p.requires_grad for p in one.parameters()) and not saved


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


@pytest.mark.parametrize("versions", [2, 4])
def test_a_comparison_holds_at_most_the_logits_of_four_rows(monkeypatch, versions):
    """However many versions and rows there are, and with their divergence."""
    B, T, V = 4, 16, 263  # nothing else has 263 columns
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, 2, 8, tuple(range(versions)), versions=tuple(range(versions))))
    nets = [grow.version(model, g) for g in model.config.versions]
    tokens = torch.randint(V, (3 * B * T,)).numpy().astype(np.uint16)
    expected = ev.measure(nets, tokens, T, B, kl=True)
    monkeypatch.setattr(ev, "LOGITS", T * V)
    with LogitMemory(V, model.parameters()) as memory:
        measured = ev.measure(nets, tokens, T, B, kl=True)
    assert 2 <= memory.peak / (T * V) <= 4
    assert [*measured["losses"], measured["kl"]] == pytest.approx([*expected["losses"], expected["kl"]])


def test_a_step_that_distils_on_its_batch_holds_five_logit_tensors():
    model = GPT(GPTConfig(263, 16, 2, 8, (0, 0)))
    grow.insert_block(model, 2)
    grow.freeze(model, "base")
    x = torch.randint(263, (4, 16))
    with LogitMemory(263, model.parameters()) as memory:
        sum(grow.Objective(model, grow.original(model), 2.0)(x, x)).backward()
    assert memory.peak == 5 * 4 * 16 * 263


def test_matrix_precision_is_the_highest_around_the_head_only(monkeypatch):
    net, seen = network(), []
    for part in (net.h[0], net.ln_f):
        monkeypatch.setattr(part, "forward", lambda x: seen.append(torch.get_float32_matmul_precision()) or x)
    torch.set_float32_matmul_precision("high")
    try:
        ev.evaluate(net, np.zeros(4, np.uint16), 4)
        assert seen == ["high", "highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_is_named_truthfully(monkeypatch):
    cuda = torch.device("cuda")
    for supported, blocks in ((True, "TF32"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda there=supported: there)
        assert f"blocks in {blocks}, logits in float32" in ev.protocol("test", 16, cuda, torch.float32)


def test_time_left_is_shown_on_a_terminal_when_it_takes_long(monkeypatch, capsys):
    """By a clock that runs 2 s each time that it is read. What is short says nothing."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ev.evaluate(network(), TOKENS, 16)
    assert capsys.readouterr().err == ""
    now = [0.0]
    for clock in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: now.append(now[-1] + 2) or now[-1])
    ev.evaluate(network(), np.tile(TOKENS, 20)[: 16 * 40], 16, 1)
    shown = [line for line in capsys.readouterr().err.split("\r") if line.strip()]
    assert len(shown) > 20 and all(re.search(r"\d+ of 40 windows, \d+ s left", line) for line in shown)


# ----- a run under bfloat16, whose logits lie where those of GPT-2 do -----


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """A folder with a text, a network and a run of it under bfloat16 autocast, on half of its context.

    The logits lie around -95, where bfloat16 steps by 0.5. That offset is one channel's, which the final norm
    sets to 10 whatever comes in, and which each row of the head multiplies by -9.5. (The positions take it
    out of the blocks.)"""
    folder = tmp_path_factory.mktemp("t")
    torch.manual_seed(0)
    net = GPT(GPTConfig(BYTES, 16, 2, 16, (0, 0)))
    with torch.no_grad():
        net.wte.weight.normal_(std=0.5)
        net.wte.weight[:, 0], net.wpe.weight[:, 0] = -9.5, 9.5
        net.ln_f.weight[0], net.ln_f.bias[0] = 0.0, 10.0
    net.save_pretrained(folder / "net")
    more = dict(dtype="bfloat16", block_size=8, lr=3e-3, max_growths=1, eval_windows=40, test_windows=40)
    texts = dict(dataset=write_words(folder), retain="none")
    train.main(typed(init=folder / "net", out=folder / "run", **TINY | more | texts))
    return folder


def float32_head(folder, idx):
    """transformers' log-probabilities (B, T, V): blocks under bfloat16 autocast, the head in float32."""
    net = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            hidden = net.transformer(idx).last_hidden_state
        return F.linear(hidden.float(), net.transformer.wte.weight).log_softmax(-1)


def loss_of(log_p, idx):
    return -log_p[:, :-1].gather(-1, idx[:, 1:, None]).mean().item()


def test_figures_have_float32_logits_under_bfloat16(coarse):
    """Of the tables and of validation. Rounding inside the blocks moves losses by less than the tolerances,
    rounding of logits by more than ten times as much."""
    text = data.load(str(coarse / "words.txt"), BYTES, 8)
    val, test = (torch.from_numpy(text[key][:320].astype(np.int64)).view(40, 8) for key in ("val", "test"))
    base, grown = (float32_head(coarse / name, test) for name in ("net", "run/model"))
    kl = (base.exp() * (base - grown)).sum(-1)[:, :-1].mean().item()
    (result,) = rows(coarse / "run", "result")
    assert result["learn"]["base"] == pytest.approx(loss_of(base, test), abs=1e-3)
    assert result["learn"]["grown"] == pytest.approx(loss_of(grown, test), abs=1e-3)
    assert result["learn"]["kl"] == pytest.approx(kl, rel=0.05)
    last = rows(coarse / "run", "eval")[-1]  # of the network that was exported
    expected = loss_of(float32_head(coarse / "run/model", val), val)
    assert last["learn"] == pytest.approx(expected, abs=1e-3)


def test_eval_measures_what_the_run_measured(coarse, capsys):
    """At equal dtype and windows, without another word: the context is the run's, not the network's."""
    (result,), last = rows(coarse / "run", "result"), rows(coarse / "run", "eval")[-1]

    def measured(*more):
        argv = [f"--dataset={coarse / 'words.txt'}", "--windows=40", "--device=cpu", *more]
        ev.main([str(coarse / "run"), *argv])
        (row,) = table(capsys.readouterr().out, "perplexity")
        return math.log(float(row["perplexity"]))  # it has more digits than the loss beside it

    assert measured("--dtype=bfloat16", "--split=test") == pytest.approx(result["learn"]["grown"], abs=1e-6)
    assert measured("--dtype=bfloat16") == pytest.approx(last["learn"], abs=1e-6)
    assert measured("--dtype=float32") != pytest.approx(last["learn"], abs=1e-5)
    ev.main([str(coarse / "run")])
    assert "blocks in bfloat16, logits in float32" in capsys.readouterr().out


def test_a_text_that_was_not_measured_has_nulls(coarse):
    (result,) = rows(coarse / "run", "result")
    nulls = dict.fromkeys(("windows", "base", "grown", "mixed", "kl"))
    assert result["retain"] == {"dataset": "none"} | nulls
    assert result["learn"]["mixed"] is None  # there is one version


# ----- a run and its card -----


def test_usage_of_the_model_card_runs(coarse, capsys):
    """The snippet in the export's README, with the folder in which it lies."""
    card = (coarse / "run/model/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace('"FOLDER"', repr(str(coarse / "run/model"))), {})
    assert "def main" in capsys.readouterr().out


def test_unfinished_runs(coarse, tmp_path):
    """Its tables, a sample, a loss: one sentence that names the run and says what to do. The network of a
    shorter run, which lies there, does not stand for the longer one."""
    run, stopped = str(coarse / "run"), shutil.copytree(coarse / "run", tmp_path / "stopped")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(x for x in lines if '"result"' not in x))
    for more in ([], [run], ["--prompt=grow"], ["--dataset=docs"]):
        with pytest.raises(data.UserError, match=f"{stopped} .*--resume"):
            ev.main([str(stopped), *more])


def test_plot_needs_matplotlib_and_says_so(coarse, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    argv = typed(coarse / "run", plot=tmp_path / "plot.png")
    refused(lambda: ev.main(argv), "pip install matplotlib")
