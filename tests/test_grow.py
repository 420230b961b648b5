"""Growth is exact, freezing is for ever, the plateau is torch's, and the regularisers are the papers'."""

import copy
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt

import grow
from model import GPT, GPTConfig


def small(depth=3, **more):
    return tiny_gpt((0,) * depth, 17, 8, **more)


def batch(seed=0, rows=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(17, (rows, 8), generator=g), torch.randint(17, (rows, 8), generator=g)


def train_steps(model, steps, optimizer=None, wd=0.1):
    optimizer = optimizer or torch.optim.AdamW(grow.trainable(model), lr=1e-2, weight_decay=wd)
    for s in range(steps):
        model(*batch(s))[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


# ----- Insertion -----


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("init", ["copy", "fresh"])
def test_insertion_keeps_the_logits_bitwise(init, precision):
    for at in range(4):
        model = small()
        if precision == "bfloat16":
            model = model.bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            before = model(batch()[0])[0]
            block = grow.insert_block(model, at, init)
            assert torch.equal(before, model(batch()[0])[0])
        assert model.h[at] is block and model.config.generation == (*[0] * at, 1, *[0] * (3 - at))
        assert {p.dtype for p in block.parameters()} == {model.wte.weight.dtype}
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            assert not projection.weight.any() and not projection.bias.any()


def test_a_copied_block_is_its_neighbour_but_for_the_output_projections():
    """Of the block below, at the bottom of the one above; a copy of its own, and this is the default. It is
    in the mode of the network, for dropout must not work in it while the network is measured."""
    for at, training in enumerate([True, True, False, False]):
        model = small().train(training).requires_grad_(False)
        neighbour = copy.deepcopy(model.h[max(at - 1, 0)].state_dict())
        block = grow.insert_block(model, at)
        for name, p in block.state_dict().items():
            assert torch.equal(p, neighbour[name]) != name.split(".")[1].startswith("c_proj"), name
        assert all(p.requires_grad for p in block.parameters())
        addresses = [p.data_ptr() for p in model.parameters()]
        assert len(set(addresses)) == len(addresses)  # no two share memory
        assert all(part.training == training for part in (*model.modules(), *grow.original(model).modules()))


def test_a_fresh_block_has_the_random_weights_of_a_new_network():
    """GPT-2's N(0, 0.02) whatever the network has become; gains one, biases and output projections zero."""
    model = small(2, n_embd=64)
    for name, p in grow.insert_block(model, 1, "fresh").named_parameters():
        p = p.detach()
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            n = p.numel()  # the errors of mean and standard deviation over n draws, five times
            assert abs(p.mean()) < 5 * 0.02 / math.sqrt(n), name
            assert abs(p.std() / 0.02 - 1) < 5 / math.sqrt(2 * n), name
        else:
            value = 1.0 if name.startswith("ln_") and name.endswith("weight") else 0.0
            assert (p == value).all(), name


def test_only_the_projections_have_gradient_at_birth_and_all_after_two_steps():
    model = small()
    block = grow.insert_block(model, 2)
    grow.freeze(model, "base")
    model(*batch())[1].backward()
    moved = {n for n, p in block.named_parameters() if p.grad.any()}
    assert moved == {f"{part}.c_proj.{kind}" for part in ("attn", "mlp") for kind in ("weight", "bias")}
    before = {n: p.detach().clone() for n, p in block.named_parameters()}
    train_steps(model, 3, wd=0)
    assert all(not torch.equal(p, before[n]) for n, p in block.named_parameters())


PLACES = [  # where, depth, growths: how many original blocks lie below each that is inserted
    ("spread", 12, 3, [12, 8, 4]),
    ("spread", 32, 8, [32, 28, 24, 20, 16, 12, 8, 4]),  # LLaMA Pro
    ("spread", 5, 3, [5, 3, 2]),  # groups of 5/3 blocks: 5, 3.33 and 1.67, each to the nearest block
    ("spread", 2, 5, [2, 2, 1, 1, 1]),  # 2, 1.6, 1.2, 0.8 and 0.4: never below the first block
    ("upper", 12, 3, [12, 10, 8]),  # the card
    ("upper", 5, 3, [5, 4, 3]),  # of the upper 2.5 blocks: 5, 4.17 and 3.33
    ("top", 5, 2, [5, 5]),
    ("bottom", 5, 2, [0, 0]),
    ("1", 3, 2, [1, 1]),  # a number is an index into the network as it is: the newest lies lowest
]


@pytest.mark.parametrize("where, depth, growths, below", PLACES)
def test_placement(where, depth, growths, below):
    model, found = small(depth, n_embd=2), []
    for k in range(growths):
        at = grow.placement(where, model, k, growths)
        found.append(model.config.generation[:at].count(0))
        grow.insert_block(model, at)
    assert found == below


# ----- Freezing -----

POLICIES = {"base": {1, 3}, "older": {1}, "none": {0, 1, 2, 3, 4, "rest"}, "top2": {1, 2, 3, 4}}


@pytest.mark.parametrize("policy", POLICIES)
def test_freeze(policy):
    """Which blocks train; the others are bitwise unchanged, in spite of weight decay, and hold no memory."""
    model = small()
    grow.freeze(model, "base")
    assert len(grow.trainable(model)) == len(list(model.parameters()))  # nothing freezes before a growth
    grow.insert_block(model, 2)  # generation 1, which the next insertion moves to index 3
    grow.insert_block(model, 1)
    model(*batch())[1].backward()
    grow.freeze(model, policy)
    named = dict(model.named_parameters())
    trains = {
        int(n.split(".")[1]) if n.startswith("h.") else "rest" for n, p in named.items() if p.requires_grad
    }
    assert trains == POLICIES[policy]
    frozen = {n: p.detach().clone() for n, p in named.items() if not p.requires_grad}
    optimizer = train_steps(model, 3)
    assert all(torch.equal(named[n], value) and named[n].grad is None for n, value in frozen.items())
    assert {id(p) for p in optimizer.state} == {id(p) for p in grow.trainable(model)}
    grow.freeze(model, "older")  # what froze leaves the optimizer, too
    kept = grow.make_optimizer(model, 1e-3, 0.1, grow.optimizer_state(model, optimizer)).state
    assert {id(p) for p in kept} == {id(p) for p in grow.trainable(model)}
    grow.freeze(model, "base")
    grow.freeze(model, "none")
    assert all(p.requires_grad for p in model.parameters())


# ----- Triggers -----


def due_steps(evals, patience, min_delta):
    """Steps at which a run would grow: the plateau is asked at each evaluation, with all there are so far."""
    grown = []
    for i in range(len(evals)):
        if grow.plateau(evals[: i + 1], patience, min_delta, grown[-1] if grown else 0):
            grown.append(evals[i][0])
    return grown


def test_plateau_is_that_of_torch():
    """Against ReduceLROnPlateau, which fires at more than `patience` bad calls; we do at `patience`."""
    rng = random.Random(0)
    fired = 0
    for _ in range(300):
        every, calls, delta = rng.choice([1, 5, 50]), rng.randint(1, 5), rng.choice([0.0, 0.05, 0.2])
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=calls - 1, threshold=delta, threshold_mode="abs", eps=0
        )
        loss, evals, expected = 3.0, [], []
        for i in range(60):
            loss += rng.gauss(-0.03, 0.15)
            evals.append((i * every, float("nan") if i and rng.random() < 0.1 else loss))
            lr = optimizer.param_groups[0]["lr"]
            theirs.step(evals[-1][1])
            expected += [i * every] if optimizer.param_groups[0]["lr"] < lr else []
        assert due_steps(evals, every * calls, delta) == expected
        fired += len(expected)
    assert fired > 500
    # A new block has its patience: nothing improves here, and each growth starts the count anew.
    assert due_steps([(s, 1.0) for s in range(0, 60, 2)], 10, 0.1) == [10, 20, 30, 40, 50]


# ----- Distillation and EWC -----


@pytest.mark.parametrize("T", [1.0, 2.0, 5.0])
def test_distillation_loss_and_gradient(T):
    """T^2 KL(teacher || student), mean over tokens, by torch.distributions."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 11, requires_grad=True), torch.randn(2, 3, 11)
    ours = grow.distillation_loss(student, teacher, T)
    softened = (torch.distributions.Categorical(logits=x / T) for x in (teacher, student))
    expected = T**2 * torch.distributions.kl_divergence(*softened).mean()
    assert torch.allclose(ours, expected)
    a, b = (torch.autograd.grad(loss, student)[0] for loss in (ours, expected))
    assert torch.allclose(a, b, atol=1e-7)
    assert grow.distillation_loss(teacher, teacher, T).abs() < 1e-6
    # Autocast gives logits in bfloat16; their loss is that of the same numbers in float32.
    s, t = student.detach().bfloat16(), teacher.bfloat16()
    assert torch.equal(grow.distillation_loss(s, t, T), grow.distillation_loss(s.float(), t.float(), T))


def test_fisher_is_that_of_per_token_autograd():
    """The exact diagonal, over all labels of every token, against the estimate of one backward a batch."""
    model = small(1)
    idx = batch(rows=2)[0]
    names, params = zip(*model.named_parameters())
    exact = [torch.zeros_like(p) for p in params]
    log_p = F.log_softmax(model(idx)[0], -1).flatten(0, 1)
    for token, label in itertools.product(range(len(log_p)), range(17)):
        score = torch.autograd.grad(log_p[token, label], params, retain_graph=True)
        for total, g in zip(exact, score):
            total += log_p[token, label].exp().detach() * g**2 / len(log_p)
    ewc = grow.EWC(model, [idx] * 300, torch.Generator().manual_seed(0))
    ours, true = (torch.cat([x.flatten() for x in xs]) for xs in ([ewc.fisher[n] for n in names], exact))
    assert (ours - true).norm() / true.norm() < 0.15
    assert abs(ours.sum() / true.sum() - 1) < 0.03


@pytest.mark.parametrize("training", [True, False])
def test_fisher_is_measured_without_dropout(training):
    """A network that drops half of everything while it trains has the Fisher of one that does not."""
    plain, dropping = small(), small(dropout=0.5).train(training)
    a, b = (grow.EWC(net, [batch()[0]], torch.Generator().manual_seed(0)).fisher for net in (plain, dropping))
    assert a.keys() == b.keys() == dict(plain.named_parameters()).keys()
    assert all(a[name].any() and torch.equal(a[name], b[name]) for name in a)
    assert dropping.training == training  # the mode is left as it was


def test_ewc_penalty():
    """0 with zero gradient at the anchor, (1/2) F (w - w*)^2 away from it; nothing from grown or frozen."""
    model = small()
    ewc = grow.EWC(model, [batch(s)[0] for s in range(3)])
    grow.insert_block(model, 1)
    penalty = ewc.penalty(model)
    assert penalty == 0
    grads = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)
    for p in model.parameters():
        p.data += 0.1
    expected = sum(f.sum() for f in ewc.fisher.values()) * 0.01 / 2
    assert math.isclose(ewc.penalty(model).item(), expected.item(), rel_tol=1e-4)
    grow.freeze(model, "base")
    assert ewc.penalty(model) == 0
    control = small()  # without growth, where little trains
    grow.freeze(control, "top1")
    measured = grow.EWC(control, [batch()[0]]).fisher
    assert measured.keys() == {n for n, _ in control.named_parameters() if n.startswith("h.2.")}


# ----- Generated text, and what is computed once -----


def test_generated_text_is_a_function_of_its_seed():
    model, texts = small(1), []
    for generator, seed in ((1, 0), (2, 0), (1, 7)):
        torch.manual_seed(generator)
        texts.append(grow.generate_text(model, 8193, seed))
    first, again, other = texts
    assert first.shape == (8193,) and first.dtype == torch.uint16 and first.device.type == "cpu"
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("T, context", [(64, 64), (16, 64), (8, 1024)])  # as long as a window, longer
def test_windows_of_generated_text_are_as_those_of_a_text(T, context):
    """A network that ends a document after each token with probability 1/5, whose text is known: documents
    begin as often, and anywhere in a window; a window begins with any token; nothing is filled up."""
    model, text = GPT(GPTConfig(5, context, 1, 2, (0,))), np.random.default_rng(0).choice(5, 8000 * T)
    model.wte.weight.data.zero_()  # it says each of five ids with the same probability
    ids = grow.generate_text(model, 8000 * T + 1, 0).numpy()[:-1]
    for windows in (ids.reshape(-1, T), text.reshape(-1, T)):
        n = len(windows)
        for token in range(5):
            found = (windows == token).sum(0)  # at each place of a window
            assert np.abs(found - n / 5).max() < 5 * (n * 0.16) ** 0.5
        ends = (windows == 4).sum(1)
        assert abs(ends.var() - T * 0.16) < 0.1 * T * 0.16 and abs(ends.mean() - T / 5) < 0.03 * T / 5


def saved_tensors(depth):
    """How many tensors a step saves for its backward, with `depth` frozen blocks below one that trains."""
    model, saved = small(depth), []
    grow.insert_block(model, depth)
    grow.freeze(model, "base")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(*batch())[1].backward()
    return len(saved)


def test_frozen_blocks_below_save_nothing():
    assert saved_tensors(6) == saved_tensors(2) > 0
