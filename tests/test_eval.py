"""One loss, by one protocol; what is reported of a run is what it logged."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import options
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
    assert "| -" in ev.results_table([r]) or " - |" in ev.results_table([r])
    assert "nothing about forgetting" in ev.model_card(r)
    ev.plot([r], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


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
    for section in ("Description", "Training data", "Configuration", "Growth mechanism", "Growth events",
                    "Results",
                    "Retention", "Usage", "Limitations", "Licence"):  # fmt: skip
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
