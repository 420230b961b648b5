"""The networks that a network was: they stay inside, bit for bit, and predicting with all of them forgets
nothing.

The mixture is held against brute force (explicit weights, token by token) and against its bound;
versions and the dial against transformers; what a run keeps against runs of every kind."""

import copy
import json
import math
import shlex

import conftest as c
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BYTES, PLAIN, SCRATCH, old_text, refused, rows, table, tiny_gpt, typed, write_words
from transformers import GPT2LMHeadModel

import data
import eval as ev
import grow
import train
from model import GPT, GPTConfig

# ----- The mixture -----

BOTH = (0.0, 0.05)  # the habits: what share of its weights each spreads after a token


def by_hand(losses, shares=BOTH):
    """The mixture of one window, with weights and probabilities as they are: losses (K, T) -> [T losses].
    Each habit mixes the networks, and what the habits say is mixed by Bayes' rule."""
    K, T = losses.shape
    w, trust, mixed = [[1 / K] * K for _ in shares], [1 / len(shares)] * len(shares), []
    for t in range(T):
        p = [math.exp(-float(losses[k, t])) for k in range(K)]
        said = [sum(a * b for a, b in zip(weights, p)) for weights in w]
        total = sum(a * b for a, b in zip(trust, said))
        mixed.append(-math.log(total))
        trust = [a * b / total for a, b in zip(trust, said)]
        for i, share in enumerate(shares):
            w[i] = [(1 - share) * a * b / said[i] + share / K for a, b in zip(w[i], p)]
    return mixed


def windows(K, B, T, seed):
    """Losses (K, B, T): of all sizes, some versions better for a while, and some for a token only."""
    g = torch.Generator().manual_seed(seed)
    size = 10 ** torch.empty(1, B, 1).uniform_(-3, 1, generator=g)
    level = torch.rand(K, B, 1, generator=g).expand(K, B, T).clone()
    turn = torch.randint(T, (B,), generator=g)
    for b in range(B):
        level[:, b, turn[b] :] = torch.rand(K, 1, generator=g)
    return (size * (level + torch.rand(K, B, T, generator=g))).double()


@pytest.mark.parametrize("shares", [BOTH, (0.0,), (0.3,), (1.0,), (0.01, 0.5, 1.0)])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_mixture_is_what_explicit_weights_give(K, shares):
    losses = windows(K, 6, 40, seed=K)
    mixed = grow.mix(losses, shares)
    assert mixed.shape == (6, 40) and mixed.dtype == torch.float64 and mixed.device.type == "cpu"
    if shares == BOTH:
        assert torch.equal(mixed, grow.mix(losses))
    for b in range(6):
        assert mixed[b].tolist() == pytest.approx(by_hand(losses[:, b], shares), abs=1e-9, rel=1e-9)
    losses[..., 30:] = 0  # where nothing is predicted
    padded = grow.mix(losses, shares)
    assert padded[:, 30:].abs().max() < 1e-12 and torch.equal(padded[:, :30], mixed[:, :30])


def adversaries(K, T):
    """Windows made to hurt: each (K, T)."""
    turns = torch.arange(T) % K == torch.arange(K)[:, None]
    for high in (1e-9, 1.0, 30.0, 1e4):
        yield torch.where(turns, 0.0, high)  # they take turns in being right
        yield torch.where(turns, high, 0.0)
        yield torch.where(torch.arange(T) < T // 2, turns[:, :1] * high, ~turns[:, :1] * high)  # one change
        yield torch.full((K, T), high)
        yield torch.where(torch.arange(K) == K - 1, 0.0, high)[:, None].expand(K, T)
    yield torch.zeros(K, T)


@pytest.mark.parametrize("T", [1, 2, 16, 128, 1024])
@pytest.mark.parametrize("K", [1, 2, 3, 6])
def test_mixture_is_never_worse_than_its_bound(K, T):
    """On thousands of random windows and on windows made to hurt: at most ln 2K nats a window above the best
    network; plain Bayes ln K, and exactly the average of the networks' probabilities; a share alone, more
    with each token. To 1e-9."""
    hard = torch.stack([window.double() for window in adversaries(K, T)], 1)  # (K, B, T)
    bounds = {BOTH: math.log(2 * K), (0.0,): math.log(K)}
    bounds[(0.05,)] = math.log(K) - (T - 1) * math.log(1 - 0.05 * (1 - 1 / K))
    for losses in (windows(K, 400, T, seed=T), hard):
        for shares, bound in bounds.items():
            mixed = grow.mix(losses, shares)
            assert mixed.isfinite().all() and (mixed >= -1e-12).all()
            excess = (mixed.sum(-1) - losses.sum(-1).amin(0)).max().item()
            scale = max(1.0, losses.sum(-1).max().item() * 1e-6)  # float64 has 16 digits
            assert excess <= bound + 1e-9 * scale
        closed = math.log(K) - torch.logsumexp(-losses.sum(-1), 0)
        assert torch.allclose(grow.mix(losses, (0.0,)).sum(-1), closed, rtol=1e-9, atol=1e-9)


# ----- Versions of a model -----


def grown_twice(device="cpu"):
    """A network of three versions, 0, 2 and 3, none of whose blocks is an identity. Generation 1 is none."""
    model = tiny_gpt((0, 0, 2, 0, 3, 1), BYTES, n_embd=16, versions=(0, 2, 3))
    return model.to(device).eval()


def some_ids(device="cpu"):
    return torch.randint(BYTES, (3, 16), generator=torch.Generator().manual_seed(1)).to(device)


def test_a_version_is_its_blocks_and_shares_every_tensor():
    model, x = grown_twice(), some_ids()
    for g, versions in ((0, (0,)), (2, (0, 2)), (3, (0, 2, 3))):
        net, expected = grow.version(model, g), copy.deepcopy(model)
        blocks = [block for block, k in zip(expected.h, model.config.generation) if k <= g]
        expected.h = torch.nn.ModuleList(blocks)  # found by hand
        assert torch.equal(net(x)[0], expected(x)[0])
        assert net.config.n_layer == len(net.h) == len(blocks) and net.config.versions == versions
        assert {p.data_ptr() for p in net.parameters()} <= {p.data_ptr() for p in model.parameters()}
    assert torch.equal(grow.original(model)(x)[0], model(x)[0])  # nothing in a finished network is grown
    refused(lambda: grow.version(model, 1), "0, 2, 3")
    model.config.versions = (0,)  # the newest generation is the model itself, a growth between is no version
    assert grow.version(model, 3).config == model.config
    refused(lambda: grow.version(model, 2), "0, 3")


@pytest.mark.parametrize("versions", [(), (1, 0), (0, 0), (0, 4), (0, 2, 3), (2,), (-1,), ("0",)])
def test_versions_rise_and_end_at_a_generation_that_there_is(versions):
    refused(lambda: GPTConfig(BYTES, 16, 2, 16, (0, 3, 1), versions=versions), "versions")


def test_versions_of_a_file_rise_or_are_the_newest_generation_alone(tmp_path):
    """(test_strangers.py has files that transformers saved.)"""
    assert GPTConfig(generation=(0, 3, 1)).versions == (3,) and GPTConfig().versions == (0,)
    grown_twice().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for versions in ([3, 0], "0", 3):
        path.write_text(json.dumps({**config, "versions": versions}))
        refused(lambda: GPT.from_pretrained(tmp_path))
    del config["versions"]
    path.write_text(json.dumps(config))
    assert GPT.from_pretrained(tmp_path).config.versions == (3,)


def test_what_a_file_holds_is_finished(tmp_path):
    """Whatever it was in the middle of when it was saved: loaded, nothing in it is grown."""
    model = grown_twice()
    grow.insert_block(model, 6)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config.versions == (0, 2, 3, 4) and model.config.versions == (0, 2, 3)
    assert grow.grown(again) == [] and grow.grown(model) == [6]


def test_what_is_grown_is_younger_than_the_last_version():
    """For freezing, placement, EWC and the teacher alike, whatever generations the network brings."""
    model = grown_twice()
    old = list(model.h)
    at = grow.placement("spread", model, 0, 2)
    assert at == 6
    block = grow.insert_block(model, at)
    newest = grow.insert_block(model, 3)
    assert model.config.generation == (0, 0, 2, 5, 0, 3, 1, 4) and model.config.versions == (0, 2, 3)
    trained = {"base": {block, newest}, "older": {newest}, "top1": {block, newest, old[-1]}}
    for policy, trains in trained.items():
        grow.freeze(model, policy)
        assert {b for b in model.h if any(p.requires_grad for p in b.parameters())} == trains
        assert not any(p.requires_grad for p in (*model.wte.parameters(), *model.ln_f.parameters()))
    assert list(grow.original(model).h) == old
    ewc = grow.EWC(model.requires_grad_(True), [some_ids()])
    assert len(ewc.anchor) == len(list(grow.original(model).named_parameters()))


@pytest.mark.parametrize("device", c.DEVICES)
def test_networks_that_share_blocks_run_together_as_alone(device):
    model, x, calls = grown_twice(device), some_ids(device), []
    nets = [grow.version(model, g) for g in model.config.versions]
    for block in model.h:
        block.register_forward_hook(lambda block, *_: calls.append(block))
    for net, out in zip(nets, grow.run_together(nets, x)):
        assert torch.equal(net.head(out), net(x)[0])
    for at in (1, 4, 8):  # a tree: what any two have in common from below is computed once
        for networks in (nets[1:], nets):
            calls.clear()
            grow.run_together(networks, x)
            assert len(calls) == len({tuple(net.h)[: i + 1] for net in networks for i in range(len(net.h))})
        grow.insert_block(model, at)  # a copy, with the hook of the block below
        model.config.versions = (*model.config.versions, max(model.config.generation))
        nets = [grow.version(model, g) for g in model.config.versions]
    other = copy.deepcopy(nets[0])  # it shares nothing: it embeds for itself
    outputs = grow.run_together([other, model], x, first=1)
    assert torch.equal(outputs[0], other.run(other.embed(x[1:]))) and outputs[1].shape == (3, 16, 16)
    # Only the last one is there to be trained: for the others no graph is kept.
    for together in (outputs, grow.run_together(nets, x)):
        assert [out.requires_grad for out in together] == [False] * (len(together) - 1) + [True]
    other = grow.original(model)  # the same blocks over other embeddings compute something else
    other.wte = copy.deepcopy(model.wte)
    with torch.no_grad():
        other.wte.weight.add_(1.0)
    for net, out in zip((other, model), grow.run_together([other, model], x)):
        assert torch.equal(net.head(out), net(x)[0])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_dial_scales_the_projections_of_the_last_versions_own_blocks(alpha, tmp_path):
    """transformers, told the same, says the same; 0 is the version before, 1 the last, bit for bit."""
    model, x = grown_twice(), some_ids()
    before, last = grow.version(model, 2)(x)[0], model(x)[0]
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    own = theirs.transformer.h[model.config.generation.index(3)]
    with torch.no_grad():
        for projection in (own.attn.c_proj, own.mlp.c_proj):
            projection.weight.mul_(alpha), projection.bias.mul_(alpha)
    grow.scale_grown(model, alpha)
    ours = model(x)[0]
    assert torch.allclose(ours, theirs(x).logits, atol=1e-5)
    assert torch.equal(ours, before) == (alpha == 0) and torch.equal(ours, last) == (alpha == 1)
    assert torch.equal(grow.version(model, 2)(x)[0], before)  # which stays as it was


# ----- What a run keeps -----


def run(folder, out, learn, retain, init, *words, **changes):
    init = init if init == "scratch" else folder / init
    options = dict(init=init, dataset=learn, retain=retain, out=folder / out, first_growth=0)
    train.main(typed(*words, **{**c.TINY, **options, **changes}))
    return GPT.from_pretrained(folder / out / "model")


def bits(net):
    return [p.detach().numpy().tobytes() for p in net.parameters()]


def result(folder):
    (row,) = rows(folder, "result")
    return row


LONG = dict(max_steps=120, eval_every=40)
ONE_ON_TOP = dict(max_growths=1, where="top", grow_every=None)
TEXTS = ("old.txt", "words.txt", "third.txt")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Three texts and a network, and two runs, one after the other, that keep what was there."""
    folder = tmp_path_factory.mktemp("t")
    texts = [old_text(folder / "words.txt"), write_words(folder), folder / "third.txt"]
    texts[2].write_text("\n".join(f"version {i % 7} learned {i * 3} and forgot none" for i in range(900)))
    alone = dict(first_growth=None, **SCRATCH, **PLAIN, **LONG)
    run(folder, "base", texts[0], "none", **{**alone, "init": "scratch"}).save_pretrained(folder / "net")
    run(folder, "first", texts[1], texts[0], "net", **LONG)
    run(folder, "second", texts[2], texts[1], "first/model", **ONE_ON_TOP, **LONG)
    return folder


def test_versions_do_not_change_during_a_run(here):
    """Only the export has the new one, so a resume sees the same originals, from the middle or the end."""
    texts, second = (here / "third.txt", here / "words.txt"), GPT.from_pretrained(here / "second" / "model")
    run(here, "stopped", *texts, "first/model", **ONE_ON_TOP, max_steps=50, eval_every=40)
    for _ in range(2):
        saved = data.load_checkpoint(here / "stopped" / "ckpt.pt")
        assert tuple(saved["model_config"]["versions"]) == (0, 2)
        model = run(here, "stopped", *texts, "first/model", "--resume", **ONE_ON_TOP, **LONG)
        assert bits(model) == bits(second) and model.config.versions == (0, 2, 3)


PLATEAU = dict(trigger="plateau", grow_every=None, patience=2, min_delta=9)
NOT_FROM_0 = dict(first_growth=None)
RUNS = {  # on a network of two versions: what is typed, the versions of its export
    "base frozen from step 0": ([], {}, (0, 2, 4)),
    "older": ([], dict(freeze="older"), (0, 2, 4)),
    "a plateau, from step 0": ([], PLATEAU, (0, 2, 4)),
    "preset keep": (["keep"], NOT_FROM_0, (0, 2, 4)),
    "the card's timetable": ([], NOT_FROM_0, (4,)),
    "a timetable of its own": ([], dict(first_growth=2, freeze="older"), (4,)),
    "a plateau": ([], PLATEAU | NOT_FROM_0, (4,)),
    "nothing frozen": ([], dict(freeze="none"), (4,)),
    "top1": ([], dict(freeze="top1"), (4,)),
    "no growth": ([], PLAIN | NOT_FROM_0, (2,)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_what_it_began_with_if_its_originals_never_train(here, name, capsys):
    """Otherwise no earlier version is kept, and the run says so when it starts."""
    words, changes, versions = RUNS[name]
    model = run(here, name, here / "third.txt", here / "words.txt", "first/model", *words, **changes)
    assert model.config.versions == versions and max(model.config.generation) == versions[-1]
    kept, row = len(versions) > 1, result(here / name)
    assert ("not kept" in capsys.readouterr().out) == (not kept)
    if kept:
        assert bits(grow.version(model, 2)) == bits(GPT.from_pretrained(here / "first" / "model"))
    assert (row["learn"]["mixed"] is not None) == ("mixed" in row["protocol"]) == kept


def test_generative_replay_keeps_the_old_in_one_network(tmp_path):
    """Without any old text it forgets less than a tenth of what the same growth forgets alone, for a tenth of
    the gain."""
    learn, steps = write_words(tmp_path), dict(max_steps=200, eval_every=200, test_windows=40, where="spread")
    texts, first = (learn, old_text(learn)), dict(first_growth=None, max_steps=400, eval_every=400, lr=2e-2)
    run(tmp_path, "base", texts[1], "none", **SCRATCH | PLAIN | first)
    replay = dict(kd_weight=1, kd_on="generated", generated=800)
    for name, more in {"alone": {}, "replay": replay}.items():
        run(tmp_path, name, *texts, "base/model", **steps, **more)
    found = [result(tmp_path / name) for name in ("alone", "replay")]
    forgot, kept = (ev.forgetting(one) for one in found)
    gained, gain = (one["learn"]["base"] - one["learn"]["grown"] for one in found)
    assert forgot > 1 and kept < forgot / 10 and gain > 0.9 * gained


def test_an_original_that_changed_is_a_bug_and_not_exported(here, monkeypatch):
    """The trainer compares the sha256 of what it kept with what it began with before it says so."""
    freeze = grow.freeze

    def leaks(model, policy):
        freeze(model, policy)
        model.ln_f.bias.requires_grad_(True)

    monkeypatch.setattr(grow, "freeze", leaks)
    with pytest.raises(RuntimeError):
        run(here, "leak", here / "third.txt", "none", "net")
    assert not (here / "leak" / "model").exists()


def test_a_new_network_has_nothing_to_keep(here):
    """Random weights are no version, frozen from step 0 or not."""
    assert run(here, "new", here / "third.txt", "none", **SCRATCH).config.versions == (2,)


# ----- What the programs say of it. The oracle: transformers on each version's export, and `by_hand`. -----


@pytest.fixture(scope="module")
def exports(here):
    """Each version of the second run as a stock GPT-2, written by eval.py and read by transformers."""
    nets = []
    for g in (0, 2, 3):
        folder = here / f"version {g}"
        ev.main([str(here / "second"), f"--version={g}", f"--out={folder}"])
        nets.append(GPT2LMHeadModel.from_pretrained(folder).eval())
    return nets


@torch.no_grad()
def expected(nets, path, split, count):
    """Loss of each network and of their mixture, in nats per token, on the first windows of a text."""
    tokens, each = data.load(str(path), BYTES, 16)[split], [[] for _ in nets]
    for i in range(count):
        ids = torch.from_numpy(tokens[i * 16 : (i + 1) * 16].astype(np.int64))
        for net, losses in zip(nets, each):
            losses.append(F.cross_entropy(net(ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    mixed = [by_hand(torch.stack(losses)) for losses in zip(*each)]
    return [torch.cat(losses).mean().item() for losses in each] + [float(np.mean(mixed))]


def test_a_version_is_exported_as_a_stock_gpt2(here, exports):
    """Rollback: bit for bit what the earlier runs ended with, to transformers and to us."""
    x = some_ids()
    assert result(here / "second")["versions"] == [0, 2, 3]
    for net, folder, g in zip(exports, ("net", "first/model", "second/model"), (0, 2, 3)):
        assert torch.equal(net(x).logits, GPT2LMHeadModel.from_pretrained(here / folder)(x).logits)
        again = GPT.from_pretrained(here / f"version {g}")
        assert bits(again) == bits(GPT.from_pretrained(here / folder))
        assert again.config.versions == tuple(v for v in (0, 2, 3) if v <= g)


@pytest.mark.parametrize("name, count", [("first", 2), ("second", 3)])
def test_results_of_a_run_have_the_mixture_of_all_versions(here, exports, name, count):
    row = result(here / name)
    for key, text in (("learn", TEXTS[count - 1]), ("retain", TEXTS[count - 2])):
        found = [row[key][figure] for figure in ("base", "grown", "mixed")]
        assert found == pytest.approx(expected(exports[:count], here / text, "test", 4)[-3:], abs=1e-5)
    assert "mixed by Bayes with shares 0.0, 0.05" in row["protocol"]


def test_evaluations_of_a_run_that_keeps_its_base_have_the_mixture(here, exports):
    """As soon as there are two networks; the last one is of the network that was exported."""
    last = rows(here / "second", "eval")[-1]
    first, *later = rows(here / "first", "eval")
    assert first["learn_mixed"] is first["retain_mixed"] is None
    assert all(row["learn_mixed"] > 0 < row["retain_mixed"] for row in later)
    for key, text in (("learn", "third.txt"), ("retain", "words.txt")):
        assert last[f"{key}_mixed"] == pytest.approx(expected(exports, here / text, "val", 4)[-1], abs=1e-5)
    assert all(row["learn_mixed"] is None for row in rows(here / "base", "eval"))


def test_matrix_of_networks_and_texts(here, exports, tmp_path, capsys):
    """Of a run's versions, or of the same networks as files of another program."""
    names = [str(here / name) for name in TEXTS]
    columns = [expected(exports, name, "test", 7) for name in names]
    files = [tmp_path / g for g in "023"]
    for net, file in zip(exports, files):
        net.save_pretrained(file)
    for models in ([here / "second"], files):
        ev.main(typed(*models, dataset=",".join(names), split="test", windows=7, batch_size=3))
        out = capsys.readouterr().out
        for i, row in enumerate(table(out, "network")):
            assert row["network"].endswith(["0", "2", "3", "mixed"][i])
            losses = [column[i] for column in columns]
            shown = [float(row[head]) for head in (*names, "average")]
            assert shown == pytest.approx([*losses, sum(losses) / 3], abs=1e-4)
        assert "mixed by Bayes" in out and "7 windows" in out


def test_windows_that_are_worse_are_counted(here, exports, capsys):
    """By more than a nat, over all their tokens, than those of the network in the first row; on all texts."""
    names = [here / name for name in TEXTS[:2]]
    ev.main(typed(here / "second", dataset=",".join(map(str, names)), windows=9))
    shown = [int(row["worse"]) for row in table(capsys.readouterr().out, "network")]
    counted = [0] * 4
    for name in names:
        tokens = data.load(str(name), BYTES, 16)["val"]
        nats = [15 * np.array(expected(exports, name, "val", n)) * n for n in range(10) if n]
        for window in np.diff(np.array([np.zeros(4), *nats]), axis=0)[: len(tokens) // 16]:
            counted = [count + (loss - window[0] > 1) for count, loss in zip(counted, window)]
    assert shown == counted and shown[0] == 0 < shown[2]


@torch.no_grad()
def continued_by_hand(nets, prompt, new):
    """Greedy text of the mixture, by transformers, from the losses of all tokens so far."""
    text, losses = list(prompt), []

    def probabilities(window):
        return [F.softmax(net(torch.tensor([window])).logits[0].double(), -1) for net in nets]

    window = text[-16:]
    rows = probabilities(window)
    for t in range(1, len(window)):
        losses.append([-row[t - 1, window[t]].log() for row in rows])
    for _ in range(new):
        p = [row[-1] for row in probabilities(text[-16:])]
        # The mixture's probability of each byte is that of a text which has it next.
        following = -torch.stack(p, -1).log()[:, None]  # (V, 1, K)
        known = torch.tensor(losses, dtype=torch.float64).view(-1, len(nets)).expand(BYTES, -1, -1)
        everything = torch.cat([known, following], 1)[:260].permute(0, 2, 1)  # (V, K, T)
        likely = torch.stack(p).amax(0).topk(20).indices.tolist()
        nats = {byte: by_hand(everything[byte])[-1] for byte in likely}
        text.append(min(nats, key=nats.get))
        losses.append([-one[text[-1]].log() for one in p])
    return data.decode(text, BYTES) + "\n"


LINES = "the 3 of 9 was kept\nthe 4 of 16 was"


@pytest.mark.parametrize("prompt", ["k", "keep block learn", LINES])
@pytest.mark.parametrize("how", [["--temperature=0"], ["--temperature=2", "--top_k=1"]])
def test_prompt_continues_with_the_mixture(here, exports, prompt, how, capsys):
    """Past the context, too: cropping never resets the weights."""
    text = continued_by_hand(exports, prompt.encode(), 24)
    ev.main([*typed(here / "second", prompt=prompt, max_new_tokens=24), *how])
    assert capsys.readouterr().out == text
    if prompt != "k":  # it tells the mixture from the last version
        assert text != continued_by_hand(exports[-1:], prompt.encode(), 24)


def test_one_version_speaks_and_is_measured_as_any_network(here, exports, capsys):
    names, of_the_second = [str(here / name) for name in TEXTS[:2]], exports[1:2]
    losses = [f"{expected(of_the_second, name, 'val', 3)[0]:.4f}" for name in names]
    options = dict(dataset=",".join(names), windows=3, prompt="keep", temperature=0, max_new_tokens=20)
    ev.main(typed(here / "second", version=2, **options))
    out, said = capsys.readouterr().out, continued_by_hand(of_the_second, b"keep", 20)
    (row,) = table(out, "network")
    assert row["network"].endswith("version 2") and [row[name] for name in names] == losses
    assert "mixed" not in out and "worse" not in row
    assert out.startswith(said) and said != continued_by_hand(exports[2:], b"keep", 20)


@torch.no_grad()
def test_text_from_a_mixture_passes_each_token_once_through_each_block():
    """Until the context is full; and what is not computed again would be the same."""
    model, passed, predicted = grown_twice(), [], []
    nets = [grow.version(model, g) for g in model.config.versions]
    for block in model.h:
        block.register_forward_hook(lambda block, x, _: passed.append(x[0].size(1)))
    mixture = ev.Mixture(nets)
    predict = mixture.predict
    mixture.predict = lambda *args: predicted.append((args[0], predict(*args))) or predicted[-1][1]
    mixture.generate(some_ids()[:, :5], 14, temperature=0)
    blocks = len({tuple(net.h)[: i + 1] for net in nets for i in range(len(net.h))})
    assert sum(passed) == blocks * (5 + 11 + 2 * 16)  # the prompt, to 16 tokens, and two past them
    for idx, log_p in predicted[:12]:
        assert torch.allclose(log_p, ev.Mixture(nets).predict(idx, {}), atol=1e-5)
    assert ((ev.Mixture(nets).predict(some_ids()[:, :1], {}).exp().sum(-1) - 1).abs() < 1e-6).all()


@pytest.mark.parametrize("name, words", [("second", []), ("first", ["--version=2"])])
def test_what_the_dial_makes_is_exported_and_measured_alone(here, name, words, tmp_path, capsys):
    """Between the last version, or the one that is named, and the one before it."""
    text = here / "old.txt"
    ev.main(typed(here / "second", *words, alpha=0.5, out=tmp_path / "dialled", dataset=text, windows=3))
    out, model = capsys.readouterr().out, GPT.from_pretrained(here / name / "model")
    grow.scale_grown(model, 0.5)
    assert bits(GPT.from_pretrained(tmp_path / "dialled")) == bits(model)
    net = GPT2LMHeadModel.from_pretrained(tmp_path / "dialled").eval()
    (row,) = table(out, "perplexity")
    assert row[str(text)] == f"{expected([net], text, 'val', 3)[0]:.4f}"


@pytest.mark.parametrize(
    "words, says",
    [
        (["second", "--version=1", "--prompt=x"], "0, 2, 3"),
        (["second", "--version=0", "--alpha=0.5", "--prompt=x"], ""),
        (["net", "--alpha=0.5", "--prompt=x"], ""),
        (["second", "--dataset=docs,nowhere"], "nowhere"),
        (["second", "first", "--version=0", "--out=both"], "both"),
        (["second", "--version=0", "--out=net"], "net"),  # an export does not replace what is there
        (["net", "other", "--dataset=old.txt"], "different tokenizers"),
    ],
)
def test_versions_that_are_not_there_get_a_sentence(here, words, says, monkeypatch):
    tiny_gpt((0,), 61).save_pretrained(here / "other")
    monkeypatch.chdir(here)
    refused(lambda: ev.main(words), says)


def test_commands_at_the_end_of_a_run_work_as_printed(here, tmp_path, capsys):
    """With another context than the preset's, and texts and a folder with spaces in their names."""
    texts = [tmp_path / f"{name} text.txt" for name in ("old", "new")]
    for path, name in zip(texts, TEXTS):
        path.write_text((here / name).read_text())
    run(here, tmp_path / "a run", texts[1], texts[0], "net")
    lines = [line.partition(": python eval.py ")[2] for line in capsys.readouterr().out.splitlines()]
    commands = [shlex.split(line) for line in lines if line and "--plot" not in line]
    for words in commands:
        ev.main(words)
    out = capsys.readouterr().out
    assert any("--split=test" in words for words in commands)  # a matrix of what no run trained on
    assert [row["network"].split()[-1] for row in table(out, "network")] == ["0", "2", "mixed"]
    assert "test split" in out
