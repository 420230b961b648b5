"""The networks that a network was: they stay inside, bit for bit, and predicting with all of them forgets
nothing.

The mixture is held against brute force (explicit weights, token by token), against the closed form and
against its bound; versions and the dial against transformers; the trainer's rule of what is kept against
runs of every kind."""

import copy
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, old_text, write_words
from transformers import GPT2LMHeadModel

import data
import eval as ev
import grow
import train
from data import UserError
from model import GPT, GPTConfig

BYTES, EOT = 257, 256

# ----- The mixture -----


def by_hand(losses, share):
    """The mixture of one window, with weights and probabilities as they are: losses (K, T) -> [T losses]."""
    K, T = losses.shape
    w, mixed = [1 / K] * K, []
    for t in range(T):
        p = [math.exp(-float(losses[k, t])) for k in range(K)]
        total = sum(w[k] * p[k] for k in range(K))
        mixed.append(-math.log(total))
        w = [w[k] * p[k] / total for k in range(K)]
        w = [(1 - share) * w[k] + share / K for k in range(K)]
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


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_mixture_is_what_explicit_weights_give(K, share):
    losses = windows(K, 6, 40, seed=K)
    mixed = grow.mix(losses, share)
    assert mixed.shape == (6, 40) and mixed.dtype == torch.float64 and mixed.device.type == "cpu"
    for b in range(6):
        assert mixed[b].tolist() == pytest.approx(by_hand(losses[:, b], share), abs=1e-9, rel=1e-9)


def test_mixture_of_share_zero_has_a_closed_form():
    """The first t tokens together have the probability that the versions give them, on average."""
    losses = windows(3, 50, 64, seed=1)
    total = -np.log(np.exp(-losses.numpy().cumsum(-1)).mean(0))  # (B, T)
    usable = np.isfinite(total)
    assert usable.mean() > 0.7  # the naive form underflows, the program's must not
    assert np.abs(grow.mix(losses).numpy().cumsum(-1) - total)[usable].max() < 1e-9


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


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_mixture_is_never_worse_than_its_bound(share, capsys):
    """On thousands of random windows and on windows made to hurt: at most ln K nats a window above the best
    version, and with a share ln K - (T - 1) ln(1 - share (1 - 1/K)). To 1e-9."""
    largest, count = {}, 0
    for K in (2, 3, 6):
        for T in (1, 2, 64, 257):
            hard = torch.stack([window.double() for window in adversaries(K, T)], 1)  # (K, B, T)
            for losses in (windows(K, 400, T, seed=T), hard):
                mixed = grow.mix(losses, share)
                assert mixed.isfinite().all() and (mixed >= -1e-12).all()
                excess = mixed.sum(-1) - losses.sum(-1).amin(0)  # (B,)
                bound = math.log(K) - (T - 1) * math.log(1 - share * (1 - 1 / K))
                scale = max(1.0, losses.sum(-1).max().item() * 1e-6)  # float64 has 16 digits
                assert excess.max() <= bound + 1e-9 * scale
                largest[K] = max(largest.get(K, 0), excess.max().item())
                count += losses.size(1)
    with capsys.disabled():
        found = ", ".join(f"{x:.9f} (K = {K}, ln K = {math.log(K):.9f})" for K, x in largest.items())
        print(f"\nshare {share}, {count} windows, largest excess in nats: {found}")
    if share == 0:  # and the bound is reached: a version that is right from the first token on
        assert all(x == pytest.approx(math.log(K), abs=1e-9) for K, x in largest.items())


def test_mixture_follows_a_change_only_with_a_share():
    losses = torch.tensor([[0.0] * 50 + [2.0] * 50, [2.0] * 50 + [0.0] * 50]).double()[:, None]  # (2, 1, 100)
    bayes, shared = (grow.mix(losses, share)[0, 60:].mean().item() for share in (0.0, 0.01))
    assert bayes > 1.0 and shared < 0.2


def test_what_is_not_predicted_costs_nothing_and_moves_nothing():
    losses = windows(3, 4, 20, seed=5)
    losses[..., 15:] = 0
    assert grow.mix(losses)[:, 15:].abs().max() < 1e-12
    assert torch.equal(grow.mix(losses)[:, :15], grow.mix(losses[..., :15]))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_from_0_to_1(share):
    with pytest.raises(UserError, match="share must be from 0 to 1"):
        grow.mix(torch.zeros(2, 1, 3), share)


# ----- Versions of a model -----


def grown_twice(device="cpu"):
    """A network of three versions, 0, 2 and 3, none of whose blocks is an identity."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(BYTES, 16, 2, 16, (0, 0, 0))).to(device)
    for at, generation in ((3, None), (2, None), (4, None)):
        grow.insert_block(model, at, "fresh", generation)
    assert model.config.versions == (0,)  # a growth is no version
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.05
    model.config.versions = (0, 2, 3)
    return model.eval()


def blocks_up_to(model, g):
    """The blocks of a version, found by hand: a network of these alone."""
    net = copy.deepcopy(model)
    keep = [block for block, k in zip(net.h, model.config.generation) if k <= g]
    net.h = torch.nn.ModuleList(keep)
    return net


def test_a_version_is_its_blocks_and_shares_every_tensor():
    model = grown_twice()
    x = torch.randint(BYTES, (3, 16))
    for g, layers, versions in ((0, 3, (0,)), (2, 5, (0, 2)), (3, 6, (0, 2, 3))):
        net = grow.version(model, g)
        assert net.config.n_layer == len(net.h) == layers and net.config.versions == versions
        assert max(net.config.generation) == g
        assert torch.equal(net(x)[0], blocks_up_to(model, g)(x)[0])
        assert {p.data_ptr() for p in net.parameters()} <= {p.data_ptr() for p in model.parameters()}
    assert torch.equal(grow.original(model)(x)[0], model(x)[0])  # nothing in a finished network is grown
    with pytest.raises(UserError, match="no version 1 .* 0, 2, 3"):
        grow.version(model, 1)


def test_the_newest_generation_is_the_model_itself_and_a_growth_between_is_no_version():
    model = grown_twice()
    model.config.versions = (0,)
    assert grow.version(model, 3).config.generation == model.config.generation
    assert grow.version(model, 3).config.versions == (0,)
    with pytest.raises(UserError, match="no version 2 .* 0, 3"):
        grow.version(model, 2)


BAD = [(), (1, 0), (0, 0), (0, 4), (0, 2, 3), (2,), (-1,), (0.0,), ("0",), (True,)]


@pytest.mark.parametrize("versions", BAD)
def test_versions_rise_and_end_at_a_generation_that_there_is(versions):
    with pytest.raises(UserError, match="versions must be rising generations that its blocks have"):
        GPTConfig(BYTES, 16, 2, 16, (0, 3, 1), versions=versions)


def test_versions_are_the_newest_generation_if_nothing_is_said():
    assert GPTConfig(generation=(0, 3, 1)).versions == (3,)
    assert GPTConfig(generation=()).versions == GPTConfig().versions == (0,)
    assert list(GPTConfig.__dataclass_fields__)[-2:] == ["dropout", "versions"]


def test_versions_survive_every_file(tmp_path):
    """Ours, transformers' re-save of it (where tuples are lists), and a file without them is one version."""
    model = grown_twice()
    model.save_pretrained(tmp_path / "ours")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        again = GPT.from_pretrained(tmp_path / name)
        assert (again.config.versions, again.config.generation) == ((0, 2, 3), model.config.generation)
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    for versions in ([3, 0], "0", 3):
        path.write_text(json.dumps({**config, "versions": versions}))
        with pytest.raises(UserError, match="must be rising|damaged"):
            GPT.from_pretrained(tmp_path / "theirs")
    del config["versions"]
    path.write_text(json.dumps(config))
    assert GPT.from_pretrained(tmp_path / "theirs").config.versions == (3,)


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
    ewc = grow.EWC(model.requires_grad_(True), [torch.randint(BYTES, (2, 16))])
    assert len(ewc.anchor) == len(list(grow.original(model).named_parameters()))


@pytest.mark.parametrize("device", DEVICES)
def test_networks_that_share_blocks_run_together_as_alone(device):
    model = grown_twice(device)
    x = torch.randint(BYTES, (3, 16), device=device)
    nets = [grow.version(model, g) for g in model.config.versions]
    calls = []
    for block in model.h:
        block.register_forward_hook(lambda block, *_: calls.append(block))
    for net, out in zip(nets, grow.run_together(nets, x)):
        assert torch.equal(net.head(out), net(x)[0])
    calls.clear()
    grow.run_together(nets, x)
    fork = model.config.generation.index(next(g for g in model.config.generation if g > 0))
    assert fork == 2 and len(calls) == fork + (3 - fork) + (5 - fork) + (6 - fork)
    other = copy.deepcopy(nets[0])  # it shares nothing: it embeds for itself
    outputs = grow.run_together([other, model], x, first=1)
    assert torch.equal(outputs[0], other.run(other.embed(x[1:]))) and outputs[1].shape == (3, 16, 16)
    # Only the last one is there to be trained: for the others no graph is kept.
    for together in (outputs, grow.run_together(nets, x)):
        assert [out.requires_grad for out in together] == [False] * (len(together) - 1) + [True]


def test_blocks_over_other_embeddings_are_not_shared():
    """The same blocks compute something else there."""
    model, x = grown_twice(), torch.randint(BYTES, (3, 16))
    other = grow.original(model)
    other.wte = copy.deepcopy(model.wte)
    with torch.no_grad():
        other.wte.weight.add_(1.0)
    for net, out in zip((other, model), grow.run_together([other, model], x)):
        assert torch.equal(net.head(out), net(x)[0])


# ----- The dial -----


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_dial_scales_the_projections_of_the_last_versions_own_blocks(alpha, tmp_path):
    """transformers, told the same, says the same; 0 is the version before, 1 the last, bit for bit."""
    model = grown_twice()
    x = torch.randint(BYTES, (3, 16))
    before, last = grow.version(model, 2)(x)[0], model(x)[0]
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    (own,) = [i for i, g in enumerate(model.config.generation) if g == 3]
    with torch.no_grad():
        for projection in (theirs.transformer.h[own].attn.c_proj, theirs.transformer.h[own].mlp.c_proj):
            projection.weight.mul_(alpha), projection.bias.mul_(alpha)
    grow.scale_grown(model, alpha)
    ours = model(x)[0]
    assert torch.allclose(ours, theirs(x).logits, atol=1e-5)
    assert torch.equal(ours, before) == (alpha == 0) and torch.equal(ours, last) == (alpha == 1)
    assert torch.equal(grow.version(model, 2)(x)[0], before)  # which stays as it was


def test_dial_needs_two_versions():
    model = grown_twice()
    model.config.versions = (3,)
    with pytest.raises(UserError, match="single"):
        grow.scale_grown(model, 0.5)


# ----- What a run keeps -----


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Three texts and a network, and two runs, one after the other, that keep what was there."""
    folder = tmp_path_factory.mktemp("t")
    texts = [old_text(folder / "words.txt"), write_words(folder)]
    third = folder / "third.txt"
    third.write_text("\n".join(f"version {i % 7} learned {i * 3} and forgot none" for i in range(900)))
    long, new = dict(max_steps=120, eval_every=40), dict(tokenizer="bytes", n_layer=2, n_head=2, n_embd=16)
    whole = dict(max_growths=0, first_growth=None, grow_every=None)
    run(folder, "base", texts[0], "none", "scratch", **new, **long, **whole).save_pretrained(folder / "net")
    run(folder, "first", texts[1], texts[0], "net", **long)
    one = dict(max_growths=1, where="top", grow_every=None)
    run(folder, "second", third, texts[1], "first/model", **one, **long)
    return folder


TINY = dict(
    block_size=16, batch_size=4, max_steps=7, first_growth=0, grow_every=3, max_growths=2, eval_every=3,
    eval_windows=4, log_every=1, test_windows=4, lr=1e-2, device="cpu", dtype="float32",
)  # fmt: skip


def run(folder, out, learn, retain, init, *words, **changes):
    init = init if init == "scratch" else folder / init
    options = {"init": init, "dataset": learn, "retain": retain, "out": folder / out, **TINY, **changes}
    train.main([*words, *(f"--{name}={value}" for name, value in options.items() if value is not None)])
    return GPT.from_pretrained(folder / out / "model")


def bits(net):
    return [p.detach().numpy().tobytes() for p in net.parameters()]


def result(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]


def test_generations_count_on_and_every_earlier_version_stays_bitwise(here):
    """docs, code, a third text: --init=RUN/model just works, and nothing of what was is lost."""
    net, first, second = (GPT.from_pretrained(here / f) for f in ("net", "first/model", "second/model"))
    assert (first.config.versions, second.config.versions) == ((0, 2), (0, 2, 3))
    assert sorted(first.config.generation) == [0, 0, 1, 2] and second.config.generation[-1] == 3
    assert bits(grow.version(first, 0)) == bits(grow.version(second, 0)) == bits(net)
    assert bits(grow.version(second, 2)) == bits(first) and bits(second) != bits(first)
    assert result(here / "second")["versions"] == [0, 2, 3]


def test_versions_do_not_change_during_a_run(here, tmp_path):
    """Only the export has the new one, so every resume sees the same originals: also one from the end."""
    for folder, versions in (("first", (0,)), ("second", (0, 2))):
        saved = data.load_checkpoint(here / folder / "ckpt.pt")
        assert tuple(saved["model_config"]["versions"]) == versions
    before = bits(GPT.from_pretrained(here / "first" / "model"))
    texts = here / "words.txt", here / "old.txt"
    again = run(here, "first", *texts, "net", "--resume", max_steps=120, eval_every=40)
    assert bits(again) == before and again.config.versions == (0, 2)


NOT_KEPT = {  # what trains an original, and what the run says of it when it starts
    "the card's timetable": (dict(first_growth=None), "until step 3", "--first_growth=0"),
    "a timetable of its own": (dict(first_growth=2, freeze="older"), "until step 2", "--first_growth=0"),
    "a plateau": (dict(first_growth=None, grow_every=None, trigger="plateau", patience=3, min_delta=9),
                  "until the first growth", "--first_growth=0"),
    "nothing frozen": (dict(freeze="none"), "to the end", "to grow with --first_growth=0 and --freeze=base"),
    "top1": (dict(freeze="top1"), "to the end", "to grow with --first_growth=0 and --freeze=base"),
    "no growth": (dict(max_growths=0, grow_every=None, first_growth=None), "to the end",
                  "to grow with --first_growth=0 and --freeze=base"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_KEPT)
def test_a_run_that_trains_its_originals_keeps_no_earlier_version_and_says_so(here, name, capsys):
    changes, until, how = NOT_KEPT[name]
    texts = here / "third.txt", here / "words.txt"
    model = run(here, f"lost {name}", *texts, "first/model", **changes)
    assert model.config.versions == (max(model.config.generation),)
    assert max(model.config.generation) == (2 if name == "no growth" else 4)
    said = capsys.readouterr().out
    assert f"originals train {until}: the pretrained network is not kept; {how} keeps it" in said
    row = result(here / f"lost {name}")
    assert row["learn"]["mixed"] is None and "mixed" not in row["protocol"]


PLATEAU = dict(trigger="plateau", grow_every=None, patience=3, min_delta=9)


@pytest.mark.parametrize("more", [dict(freeze="base"), dict(freeze="older"), PLATEAU])
def test_a_run_that_keeps_its_base_says_nothing_of_it(here, more, tmp_path, capsys):
    model = run(here, tmp_path / "kept", here / "third.txt", here / "words.txt", "net", **more)
    assert model.config.versions == (0, 2) and "not kept" not in capsys.readouterr().out


def test_preset_keep_keeps(here):
    model = run(here, "preset", here / "third.txt", here / "words.txt", "net", "keep", first_growth=None)
    assert model.config.versions == (0, 2)
    assert bits(grow.version(model, 0)) == bits(GPT.from_pretrained(here / "net"))


def test_a_new_network_has_nothing_to_keep(here, capsys):
    """Frozen from step 0 or not: random weights are no version."""
    shape = dict(tokenizer="bytes", n_layer=1, n_head=2, n_embd=8)
    for first in (None, 0):
        model = run(here, f"new {first}", here / "third.txt", "none", "scratch", first_growth=first, **shape)
        assert model.config.versions == (2,) and "not kept" not in capsys.readouterr().out


def test_an_original_that_changed_is_a_bug_and_not_exported(here, monkeypatch):
    """The trainer compares the sha256 of what it kept with what it began with before it says so."""
    freeze = grow.freeze

    def leaks(model, policy):
        freeze(model, policy)
        model.ln_f.bias.requires_grad_(True)

    monkeypatch.setattr(grow, "freeze", leaks)
    with pytest.raises(RuntimeError, match="an original changed"):
        run(here, "leak", here / "third.txt", "none", "net")
    assert not (here / "leak" / "model").exists()


def test_the_teacher_of_a_later_run_is_the_network_that_it_began_with(here, monkeypatch):
    """Not the first of all, and the same tensors: no second copy."""
    seen = []
    build = grow.Objective.__init__

    def noted(self, model, teacher=None, temperature=1.0):
        build(self, model, teacher, temperature)
        seen.append((model, teacher))

    monkeypatch.setattr(grow.Objective, "__init__", noted)
    run(here, "taught", here / "third.txt", "none", "first/model", kd_weight=1.0)
    ((model, teacher),) = seen
    assert bits(teacher) == bits(GPT.from_pretrained(here / "first" / "model"))
    assert teacher.wte is model.wte


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


def window_losses(net, tokens, T, windows):
    """[losses of each window's tokens but the first], by transformers."""
    found = []
    for i in range(windows):
        ids = torch.from_numpy(tokens[i * T : (i + 1) * T].astype(np.int64))
        if len(ids) > 1:
            with torch.no_grad():
                found.append(F.cross_entropy(net(ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    return found


def expected(nets, tokens, T, windows, share=0.0):
    """Loss of each network and of their mixture, in nats per token."""
    each = [window_losses(net, tokens, T, windows) for net in nets]
    mixed = [by_hand(torch.stack(losses), share) for losses in zip(*each)]
    return [torch.cat(losses).mean().item() for losses in each] + [float(np.mean(sum(mixed, [])))]


def test_a_version_is_exported_as_a_stock_gpt2(here, exports):
    """Rollback: bit for bit what the earlier runs ended with, to transformers and to us."""
    x = torch.randint(BYTES, (3, 16))
    for net, folder, g in zip(exports, ("net", "first/model", "second/model"), (0, 2, 3)):
        assert torch.equal(net(x).logits, GPT2LMHeadModel.from_pretrained(here / folder)(x).logits)
        again = GPT.from_pretrained(here / f"version {g}")
        assert bits(again) == bits(GPT.from_pretrained(here / folder))
        assert again.config.versions == tuple(v for v in (0, 2, 3) if v <= g)


@pytest.mark.parametrize("name, retained", [("first", "old.txt"), ("second", "words.txt")])
def test_results_of_a_run_have_the_mixture_of_all_versions(here, exports, name, retained):
    nets = exports[:2] if name == "first" else exports
    learned = "words.txt" if name == "first" else "third.txt"
    row = result(here / name)
    for key, text in (("learn", learned), ("retain", retained)):
        tokens = data.load(str(here / text), BYTES, 16)["test"]
        *_, base, grown, mixed = expected(nets, tokens, 16, 4)
        found = [row[key][name] for name in ("base", "grown", "mixed")]
        assert found == pytest.approx([base, grown, mixed], abs=1e-5)
    assert "mixed with share 0" in row["protocol"]


def table(text):
    """The first table of a text: {first cell of a row: its other cells}."""
    lines = text[text.index("| ") :].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_table_of_a_run_shows_mixed_beside_the_grown_network_alone(here, capsys):
    ev.main([str(here / "first")])
    out = capsys.readouterr().out
    rows, row = table(out), result(here / "first")
    (head,) = [cells for name, cells in rows.items() if name == "text"]
    for key in ("learn", "retain"):
        (cells,) = [cells for name, cells in rows.items() if name.startswith(key)]
        shown = dict(zip(head, cells))
        assert shown["loss mixed"] == f"{row[key]['mixed']:.4f}"
        assert shown["loss grown"] == f"{row[key]['grown']:.4f}"
    assert "mixed with share 0" in out


def test_comparison_mixes_with_the_share_that_it_is_given(here, exports):
    tokens = data.load(str(here / "words.txt"), BYTES, 16)["test"]
    model = GPT.from_pretrained(here / "second" / "model")
    found = ev.compare(grow.version(model, 2), model, tokens, 16, windows=4, share=0.2)["mixed"]
    shared, bayes = (expected(exports, tokens, 16, 4, share)[-1] for share in (0.2, 0.0))
    assert found == pytest.approx(shared, abs=1e-6) and abs(shared - bayes) > 1e-5


@pytest.mark.parametrize("share", [None, 0.05])
def test_matrix_of_versions_and_texts(here, exports, share, capsys):
    names = ("old.txt", "words.txt", "third.txt")
    dataset = "--dataset=" + ",".join(str(here / name) for name in names)
    ev.main([str(here / "second"), dataset, "--split=test", "--windows=7", "--batch_size=3"]
            + ([] if share is None else [f"--share={share}"]))  # fmt: skip
    out = capsys.readouterr().out
    columns = []
    for name in names:
        tokens = data.load(str(here / name), BYTES, 16)["test"]
        columns.append(expected(exports, tokens, 16, 7, share or 0.0))
    rows = table(out)
    for i, name in enumerate(("0", "2", "3", "mixed")):
        losses = [column[i] for column in columns]
        shown = [float(cell) for cell in rows[name]]
        assert shown == pytest.approx([*losses, sum(losses) / 3], abs=1e-4)
    assert f"mixed with share {share or 0}" in out and "7 windows" in out
    forgot = (columns[0][2] - columns[0][0] + columns[1][2] - columns[1][1]) / 2
    kept = (columns[0][3] - columns[0][0] + columns[1][3] - columns[1][1]) / 2
    line = next(line for line in out.splitlines() if "backward transfer" in line.lower())
    assert f"last version {forgot:+.4f}, mixed {kept:+.4f}" in line


def test_no_backward_transfer_where_texts_are_not_as_many_as_versions(here, capsys):
    ev.main([str(here / "second"), f"--dataset={here / 'old.txt'}", "--windows=3"])
    out = capsys.readouterr().out
    assert "backward transfer" not in out.lower() and list(table(out))[-1] == "mixed"


def test_no_backward_transfer_where_texts_are_more_than_versions(here, capsys):
    names = ("old.txt", "words.txt", "third.txt")
    ev.main([str(here / "first"), "--dataset=" + ",".join(str(here / n) for n in names), "--windows=3"])
    out = capsys.readouterr().out
    assert "backward transfer" not in out.lower() and list(table(out))[2:] == ["0", "2", "mixed"]


def test_matrix_can_weigh_all_windows_alike(here, exports, capsys):
    """The mean of the windows' means, for each version and for all of them mixed."""
    text = here / "short.txt"
    text.write_text((here / "third.txt").read_text()[:1500])
    tokens = data.load(str(text), BYTES, 16)["test"]
    count = math.ceil(len(tokens) / 16)
    assert len(tokens) % 16 > 1  # the last window is a shorter one
    ev.main([str(here / "second"), f"--dataset={text}", "--split=test", "--average=window"])
    rows = table(capsys.readouterr().out)
    each = [window_losses(net, tokens, 16, count) for net in exports]
    each.append([torch.tensor(by_hand(torch.stack(losses), 0.0)) for losses in zip(*each)])
    for name, losses in zip(("0", "2", "3", "mixed"), each):
        by_window = np.mean([nats.mean().item() for nats in losses])
        assert abs(by_window - torch.cat(losses).mean().item()) > 1e-3
        assert float(rows[name][0]) == pytest.approx(by_window, abs=6e-5)


def test_one_version_on_several_texts_has_a_row_and_no_mixture(here, exports, capsys):
    names = ("old.txt", "words.txt")
    dataset = "--dataset=" + ",".join(str(here / name) for name in names)
    ev.main([str(here / "second"), dataset, "--windows=3", "--version=2"])
    out = capsys.readouterr().out
    rows = table(out)
    assert list(rows)[2:] == ["2"] and "mixed" not in out
    for cell, name in zip(rows["2"], names):
        tokens = data.load(str(here / name), BYTES, 16)["val"]
        assert float(cell) == pytest.approx(expected(exports[1:2], tokens, 16, 3)[0], abs=1e-4)


def test_one_version_alone_is_measured_as_any_network(here, exports, capsys):
    tokens = data.load(str(here / "old.txt"), BYTES, 16)["val"]
    ev.main([str(here / "second"), f"--dataset={here / 'old.txt'}", "--windows=3", "--version=2"])
    out = capsys.readouterr().out
    assert "mixed" not in out
    assert f"loss {expected(exports[1:2], tokens, 16, 3)[0]:.4f}" in out


def continued_by_hand(nets, prompt, new, T, share):
    """Greedy text of the mixture, by transformers, with explicit weights in probabilities."""
    ids = list(prompt[-T:])
    w = [1 / len(nets)] * len(nets)

    def move(p):
        total = sum(a * b for a, b in zip(w, p))
        return [(1 - share) * a * b / total + share / len(w) for a, b in zip(w, p)]

    def probabilities(window):
        with torch.no_grad():
            return [F.softmax(net(torch.tensor([window])).logits[0].double(), -1) for net in nets]

    for t in range(1, len(ids)):
        w = move([p[t - 1, ids[t]].item() for p in probabilities(ids)])
    text = list(prompt)
    for _ in range(new):
        p = [rows[-1] for rows in probabilities(text[-T:])]
        total = sum(a * b for a, b in zip(w, p))
        text.append(total.argmax().item())
        w = move([rows[text[-1]].item() for rows in p])
    return text


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("prompt", ["k", "keep block learn", "the 3 of 9 was kept\nthe 4 of 16 was"])
def test_prompt_continues_with_the_mixture(here, exports, prompt, share, capsys):
    """Past the context, too: cropping never resets the weights."""
    ids = continued_by_hand(exports, prompt.encode(), 24, 16, share)
    more = [f"--share={share}"] if share else []
    ev.main([str(here / "second"), f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=24", *more])
    alone = continued_by_hand(exports[-1:], prompt.encode(), 24, 16, share)
    assert capsys.readouterr().out == data.decode(ids, BYTES) + "\n"
    assert ids != alone or prompt == "k"  # it tells the mixture from the last version


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_each_row_of_a_batch_is_mixed_by_itself(here, exports, share):
    """Probabilities of every token that may come next, past the context, too: not the likeliest alone."""
    model = GPT.from_pretrained(here / "second" / "model").eval()
    predict = ev.mixed_prediction([grow.version(model, g) for g in model.config.versions], share)
    ids = torch.tensor([list(b"keep block le"), list(b"the 3 of 9 wa")])  # (2, 13), of a context of 16
    w = torch.full((2, 3), 1 / 3).double()

    @torch.no_grad()
    def probabilities(b, t):
        return torch.stack([F.softmax(net(ids[b : b + 1, max(0, t - 16) : t]).logits[0, -1].double(), -1)
                            for net in exports])  # fmt: skip

    moved = 0  # tokens that the weights have seen
    with torch.no_grad():
        for _ in range(7):
            found = predict(ids).exp()
            for b in (0, 1):
                for t in range(max(moved, 1), ids.size(1)):
                    posterior = w[b] * probabilities(b, t)[:, ids[b, t]]
                    w[b] = (1 - share) * posterior / posterior.sum() + share / 3
                assert torch.allclose(found[b], w[b] @ probabilities(b, ids.size(1)), atol=1e-6)
            moved = ids.size(1)
            ids = torch.cat([ids, torch.randint(BYTES, (2, 1))], 1)
    assert (w[0] - w[1]).abs().max() > 1e-3


def test_another_predictor_is_asked_with_all_ids_so_far():
    """GPT.generate leaves it to the predictor how much of them it looks at."""
    ids = [3, 1, 4]

    def total(idx):
        return F.one_hot(idx.sum(1) % EOT, BYTES).float()

    found = grown_twice().generate(torch.tensor([ids]), 20, temperature=0, next_logits=total)
    for _ in range(20):  # past the context of 16
        ids = [*ids, sum(ids) % EOT]
    assert found[0].tolist() == ids


def test_prompt_continues_with_one_version_on_request(here, capsys):
    said = []
    for words in ([here / "second", "--version=0"], [here / "net"], [here / "second"]):
        ev.main([*map(str, words), "--prompt=keep", "--temperature=0", "--max_new_tokens=20"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_dial_is_exported(here, capsys):
    folder = here / "dialled"
    ev.main([str(here / "second"), "--alpha=0.5", f"--out={folder}"])
    model = GPT.from_pretrained(here / "second" / "model")
    grow.scale_grown(model, 0.5)
    assert bits(GPT.from_pretrained(folder)) == bits(model)
    GPT2LMHeadModel.from_pretrained(folder)


def test_dial_of_an_earlier_version(here):
    """Between that one and the one before it."""
    folder = here / "dialled earlier"
    ev.main([str(here / "second"), "--version=2", "--alpha=0.5", f"--out={folder}"])
    model = GPT.from_pretrained(here / "first" / "model")
    grow.scale_grown(model, 0.5)
    assert bits(GPT.from_pretrained(folder)) == bits(model)


def test_what_the_dial_makes_is_measured_alone(here, capsys):
    dialled = here / "dialled to be measured"
    words = [f"--dataset={here / 'old.txt'}", "--windows=3"]
    ev.main([str(here / "second"), "--alpha=0.5", f"--out={dialled}", *words])
    out = capsys.readouterr().out
    tokens = data.load(str(here / "old.txt"), BYTES, 16)["val"]
    net = GPT2LMHeadModel.from_pretrained(dialled).eval()
    assert "mixed" not in out and f"loss {expected([net], tokens, 16, 3)[0]:.4f}" in out


def test_lambada_is_that_of_the_last_version(here, exports, monkeypatch, capsys):
    monkeypatch.setattr(data, "GPT2", BYTES)
    monkeypatch.setattr(data, "lambada", lambda: ["keep learn", "was kept"])
    monkeypatch.setattr(data, "encode", lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint16))
    said = []
    for net, words in ((exports[0], ["--version=0"]), (exports[2], [])):
        ev.main([str(here / "second"), "--lambada", *words])
        nats = 0.0
        for text in (b"keep learn", b"was kept"):
            ids = torch.tensor([list(text)])
            first = text.index(b" ")  # the last word begins with it
            with torch.no_grad():
                nats += F.cross_entropy(net(ids).logits[0, first - 1 : -1], ids[0, first:], reduction="sum")
        printed = capsys.readouterr().out
        assert ("last version alone" in printed) == (not words)
        said.append(float(printed.rpartition("perplexity ")[2]))
        assert math.log(said[-1]) == pytest.approx(nats.item() / 2, abs=1e-4)
    assert said[0] != pytest.approx(said[1], rel=1e-2)


REFUSED = [
    (["--version=1", "--prompt=x"], "no version 1 .* 0, 2, 3"),
    (["--version=0"], "--version does nothing without"),
    (["--alpha=0.5"], "--alpha does nothing without"),
    (["--out=x"], "--out does nothing without"),
    (["--share=0.1"], "--share does nothing without"),
    (["--share=0.1", "--lambada"], "--share does nothing without --dataset or --prompt"),
    (["--out=x", "--dataset=docs"], "--out does nothing without --version or --alpha"),
    (["--share=2", "--prompt=x"], "share must be from 0 to 1"),
    (["--alpha=2", "--prompt=x"], "alpha must be from 0 to 1"),
    (["--version=0", "--share=0.1", "--prompt=x"], "share"),
    (["--version=0", "--alpha=0.5", "--prompt=x"], "single"),
    (["--dataset=docs,"], "without a name"),
    (["--version=0", "--out=x", "--json"], "--json is for the tables"),
    (["--version=0", "--out="], "need a value"),
    (["--dataset=", "--split=test"], "need a value"),
    (["--version=0", "--share=0", "--prompt=x"], "share"),
    (["--prompt=x", "--temperature=0", "--seed=1"], "nothing with --temperature=0"),
    (["--prompt=x", "--temperature=0", "--top_k=5"], "nothing with --temperature=0"),
    (["--prompt=x", "--temperature=1e-40"], "--temperature"),
    (["--prompt=x", "--temperature=inf"], "--temperature"),
    (["--prompt=x", "--temperature=nan"], "--temperature"),
    (["--prompt=x", "--seed=18446744073709551616"], "--seed"),
]


@pytest.mark.parametrize("words, says", REFUSED)
def test_options_of_versions_that_make_no_sense(here, words, says):
    with pytest.raises(UserError, match=says):
        ev.main([str(here / "second"), *words])


def test_options_of_versions_on_a_model_of_one(here):
    for option, says in {"--share=0.1": "one version", "--alpha=0.1": "single"}.items():
        with pytest.raises(UserError, match=says):
            ev.main([str(here / "net"), option, "--prompt=x"])


def test_models_with_and_without_versions_in_one_call(here, capsys):
    for names in (["second", "net"], ["net", "second"]):
        ev.main([*(str(here / name) for name in names), f"--dataset={here / 'old.txt'}", "--windows=2"])
        assert capsys.readouterr().out.count("mixed with share 0") == 1


def test_an_export_is_of_one_model(here):
    with pytest.raises(UserError, match="one model"):
        ev.main([str(here / "second"), str(here / "first"), "--version=0", f"--out={here / 'both'}"])
    assert not (here / "both").exists()


def test_each_text_is_asked_for_before_a_model_is_loaded(here):
    with pytest.raises(UserError, match="no data set .*nowhere"):
        ev.main([str(here / "no such model"), "--dataset=docs,nowhere"])


def test_a_text_may_have_a_comma_in_its_name(here, capsys):
    text = here / "one, two.txt"
    text.write_text((here / "old.txt").read_text())
    for name in (text, here / "old.txt"):
        ev.main([str(here / "net"), f"--dataset={name}", "--windows=3"])
    one, other = (line for line in capsys.readouterr().out.splitlines() if line.startswith("loss "))
    assert one == other


def test_an_export_does_not_replace_what_is_there(here):
    """A folder with anything in it stays as it is."""
    # The last two are where it would write first.
    for name, out in (("mine", "mine"), ("yours.tmp", "yours"), ("theirs.tmp", "theirs/")):
        (here / name).mkdir()
        (here / name / "thesis.txt").write_text("x")
        with pytest.raises(UserError, match=f"{name} exists"):
            ev.main([str(here / "second"), "--version=0", f"--out={here}/{out}"])
        assert (here / name / "thesis.txt").exists()
    with pytest.raises(UserError, match="for one model, and 2 are named"):
        ev.main([str(here / "first"), str(here / "second"), "--version=0", f"--out={here / 'new'}"])


def test_the_card_says_what_transformers_loads(here):
    card, base = ((here / name / "model" / "README.md").read_text() for name in ("first", "base"))
    assert "mixing [0, 2] needs" in " ".join(card.split())
    assert "last version alone" in card and f"{result(here / 'first')['retain']['mixed']:.4f}" in card
    assert "last version alone" not in base  # it has one


def test_a_third_text_that_needs_no_network():
    """`headers`: those of torch's C++ interface, about a megabyte of every install."""
    texts = data.BUILT_IN["headers"]()
    assert 700_000 < sum(map(len, texts.values())) < 2_000_000
    assert "#include <torch/" in texts["train"] and "#pragma once" in texts["test"]


def commands(printed):
    """{what it does: words} of the commands that the end of a run prints."""
    lines = [line.partition(": python ") for line in printed.splitlines()]
    return {what: shlex.split(command) for what, _, command in lines if command}


def test_commands_at_the_end_of_a_run_work_as_printed(here, tmp_path, capsys):
    """With another context than the preset's, and texts and a folder with spaces in their names."""
    texts = [tmp_path / f"{name} text.txt" for name in ("old", "new")]
    for path, name in zip(texts, ("old.txt", "words.txt")):
        path.write_text((here / name).read_text())
    out = tmp_path / "a run"
    run(here, out, texts[1], texts[0], "net")
    found = commands(capsys.readouterr().out)
    plot = found.pop("A picture of them")
    for what, (program, *words) in found.items():
        {"eval.py": ev.main, "train.py": train.main}[program](words)
        printed = capsys.readouterr().out
        if what == "Every version on every text":
            assert list(table(printed)) == ["version", "-------", "0", "2", "mixed"]
        if what == "Learn one more and keep all":
            (last,) = [line for line in printed.splitlines() if "--dataset" in line and "every text" in line]
            assert shlex.split(last)[-2:] == [f"--dataset={texts[0]},{texts[1]},headers", "--split=test"]
            assert printed.endswith(last + "\n")
    assert plot[1:] == [str(out), "--plot=run.png"] and result(f"{out}-headers")["versions"] == [0, 2, 4]


def test_what_was_learned_is_told_from_run_to_run(here, tmp_path):
    names = [str(here / name) for name in ("old.txt", "words.txt", "third.txt")]
    assert result(here / "base")["learned"] == names[:1]  # a new network
    assert result(here / "first")["learned"] == names[:2] and result(here / "second")["learned"] == names
    more = dict(first_growth=None, max_growths=0, grow_every=None)
    run(here, "lost", here / "third.txt", here / "words.txt", "first/model", **more)
    assert result(here / "lost")["learned"] == names[2:]  # nothing else is still inside
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text("")
    GPT.from_pretrained(here / "net").save_pretrained(tmp_path / "broken" / "model")
    run(here, "orphan", here / "third.txt", here / "words.txt", tmp_path / "broken" / "model")
    assert result(here / "orphan")["learned"] == names[1:]


def test_a_later_run_goes_on_from_its_middle(here):
    """As if it had not stopped, and with the same originals."""
    texts, more = (here / "third.txt", here / "words.txt"), dict(max_growths=1, where="top", grow_every=None)
    run(here, "stopped", *texts, "first/model", **more, max_steps=50, eval_every=40)
    model = run(here, "stopped", *texts, "first/model", "--resume", **more, max_steps=120, eval_every=40)
    assert bits(model) == bits(GPT.from_pretrained(here / "second" / "model"))
    assert model.config.versions == (0, 2, 3)


def test_a_log_of_an_earlier_program_gets_a_sentence(here, tmp_path):
    lines = [json.loads(line) for line in (here / "first" / "metrics.jsonl").read_text().splitlines()]
    del lines[-1]["versions"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match="earlier program: run its command again"):
        ev.main([str(tmp_path)])


def test_lambada_is_that_of_the_last_version_alone(here, monkeypatch, capsys):
    measured, found = [], dict(accuracy=0.5, perplexity=2.0, passages=3)
    monkeypatch.setattr(ev, "lambada", lambda net: measured.append(net) or found)
    ev.main([str(here / "second"), "--lambada"])
    assert "accuracy 0.5000, perplexity 2.00" in capsys.readouterr().out
    assert bits(measured[0]) == bits(GPT.from_pretrained(here / "second" / "model"))


def test_temperature_and_top_k_act_on_the_mixture(here, exports, capsys):
    """The most likely token of the mixture is the only one that is left."""
    prompt = "keep block learn"
    ids = continued_by_hand(exports, prompt.encode(), 24, 16, 0.0)
    how = ["--temperature=2", "--top_k=1", "--max_new_tokens=24"]
    ev.main([str(here / "second"), f"--prompt={prompt}", *how])
    assert capsys.readouterr().out == data.decode(ids, BYTES) + "\n"


def test_each_row_has_weights_of_its_own(here):
    model = GPT.from_pretrained(here / "second" / "model").eval()
    nets = [grow.version(model, g) for g in model.config.versions]
    rows = torch.randint(BYTES, (3, 12))
    together = model.generate(rows, 10, 0, next_logits=ev.mixed_prediction(nets))
    for row, ids in zip(rows, together):
        alone = model.generate(row[None], 10, 0, next_logits=ev.mixed_prediction(nets))
        assert torch.equal(alone[0], ids[: alone.size(1)])


EVERY = "Every version on every text"


def test_the_matrix_that_a_run_tells_of_is_of_what_no_run_trained_on(here, capsys):
    """And it has the backward transfer: the command runs as it stands."""
    ev.main([str(here / "second")])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(EVERY))
    ev.main(shlex.split(line)[shlex.split(line).index("eval.py") + 1 :])
    out = capsys.readouterr().out
    assert "test split" in out and "Backward transfer" in out
