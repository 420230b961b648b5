"""Growth is exact, freezing is for ever, the plateau is torch's, and the regularisers are the papers'."""

import copy
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

import grow
from data import UserError
from model import GPT, GPTConfig


def small(depth=3, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(17, 8, 2, 8, (0,) * depth))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return model


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


@pytest.mark.parametrize(
    "init, dtype", list(itertools.product(["copy", "fresh"], [torch.float32, torch.bfloat16]))
)
def test_insertion_keeps_the_logits_bitwise(init, dtype):
    for at in range(4):
        model = small()
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            before = model(batch()[0])[0]
            block = grow.insert_block(model, at, init)
            assert torch.equal(before, model(batch()[0])[0])
        assert model.h[at] is block and model.config.generation == (*[0] * at, 1, *[0] * (3 - at))
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            assert not projection.weight.any() and not projection.bias.any()
        below = model.h[max(at - 1, 0)] if at else model.h[1]
        assert torch.equal(block.attn.c_attn.weight, below.attn.c_attn.weight) == (init == "copy")
    with pytest.raises(UserError):
        grow.insert_block(small(), 4)
    with pytest.raises(UserError):
        grow.insert_block(small(), 0, "zero")


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
    trains = {
        int(n.split(".")[1]) if n.startswith("h.") else "rest"
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert trains == POLICIES[policy]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = train_steps(model, 3)
    named = dict(model.named_parameters())
    assert all(torch.equal(named[n], value) and named[n].grad is None for n, value in frozen.items())
    assert {id(p) for p in optimizer.state} == {id(p) for p in grow.trainable(model)}
    with pytest.raises(UserError):
        grow.freeze(model, "everything")


def test_original_shares_every_tensor_and_gives_the_pretrained_logits():
    model = small()
    pretrained, idx = copy.deepcopy(model), batch()[0]
    for at in (3, 1):
        grow.insert_block(model, at)
        grow.freeze(model, "base")
        train_steps(model, 3)
    teacher = grow.original(model)
    assert torch.equal(teacher(idx)[0], pretrained(idx)[0])
    assert not torch.equal(model(idx)[0], pretrained(idx)[0])
    owned = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in teacher.parameters()} <= owned
    objective = grow.Objective(model, teacher, True, 1.0, 2.0)
    assert len({p.data_ptr() for p in objective.parameters()}) == len(owned)


def test_placement():
    def grown(where, growths, depth=12):
        generation = (0,) * depth
        for k in range(growths):
            at = grow.placement(where, generation, growths)
            generation = (*generation[:at], k + 1, *generation[at:])
        return [sum(g == 0 for g in generation[:i]) for i, g in enumerate(generation) if g]

    assert grown("spread", 3) == [4, 8, 12]  # how many original blocks are below each grown one
    assert grown("spread", 8, 32) == [4, 8, 12, 16, 20, 24, 28, 32]  # LLaMA Pro
    assert grown("upper", 3) == [8, 10, 12]
    assert grown("top", 3) == [12, 12, 12]
    assert grown("bottom", 2) == [0, 0]
    assert grow.placement("5", (0,) * 12, 3) == 5


def test_optimizer_state_is_carried_over():
    """Rebuilding the optimizer at an insertion changes nothing for the old; the new start fresh."""
    one, two = small(), small()
    a, b = train_steps(one, 4), train_steps(two, 4)
    grow.insert_block(two, 1)
    rebuilt = torch.optim.AdamW(two.parameters(), lr=1e-2, weight_decay=0.1)
    grow.carry_over(b, rebuilt)
    assert all(p not in rebuilt.state for p in two.h[1].parameters())
    for model, optimizer in ((one, a), (two, rebuilt)):
        frozen = [] if model is one else list(two.h[1].parameters())
        for p in frozen:
            p.requires_grad_(False)  # so that both networks stay the same function
        train_steps(model, 4, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), grow.original(two).parameters()))

    state = grow.optimizer_state(two, rebuilt)
    again = copy.deepcopy(two)
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0.1)
    grow.load_optimizer_state(again, fresh, copy.deepcopy(state))
    train_steps(two, 2, rebuilt), train_steps(again, 2, fresh)
    assert all(torch.equal(p, q) for p, q in zip(two.parameters(), again.parameters()))


def test_schedule():
    assert [s for s in range(20) if grow.Schedule(5).fires(s)] == [5, 10, 15]
    assert [s for s in range(20) if grow.Schedule(5, 0).fires(s)] == [0, 5, 10, 15]
    assert [s for s in range(20) if grow.Schedule(5, 3).fires(s)] == [3, 8, 13, 18]


def test_plateau_is_that_of_torch():
    """Against ReduceLROnPlateau, which fires at more than `patience` bad calls; we do at `patience`."""
    rng = random.Random(0)
    fired = 0
    for _ in range(300):
        every, calls, delta = rng.choice([1, 5, 50]), rng.randint(1, 5), rng.choice([0.0, 0.05, 0.2])
        ours = grow.Plateau(every * calls, delta)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=calls - 1, threshold=delta, threshold_mode="abs", eps=0
        )
        loss = 3.0
        for i in range(60):
            loss += rng.gauss(-0.03, 0.15)
            value = float("nan") if i and rng.random() < 0.1 else loss
            lr = optimizer.param_groups[0]["lr"]
            theirs.step(value)
            fires = ours.fires(i * every, value)
            assert fires == (optimizer.param_groups[0]["lr"] < lr)
            fired += fires
    assert fired > 500


def test_plateau_gives_a_new_block_its_patience():
    plateau = grow.Plateau(10, 0.1)
    assert [s for s in range(0, 60, 2) if plateau.fires(s, 1.0)] == [10, 20, 30, 40, 50]


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
    ewc = grow.EWC(model, [idx] * 600, torch.Generator().manual_seed(0))
    ours, true = (torch.cat([x.flatten() for x in xs]) for xs in ([ewc.fisher[n] for n in names], exact))
    assert (ours - true).norm() / true.norm() < 0.15
    assert abs(ours.sum() / true.sum() - 1) < 0.03


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


@pytest.mark.parametrize("extra", [0, 3])
def test_shared_teacher_is_the_teacher(extra):
    """The prefix computed once gives the losses and gradients of a teacher of its own."""
    results = []
    for shared in (True, False):
        model = small(4)
        own = copy.deepcopy(model)
        for at in (4, 2):
            grow.insert_block(model, at)
        for i in (2, 5):
            torch.manual_seed(i)
            for p in model.h[i].parameters():
                p.data += torch.randn_like(p) * 0.1
        grow.freeze(model, "base")
        objective = grow.Objective(model, grow.original(model) if shared else own, shared, 1.0, 2.0)
        x, y = batch(rows=4 + extra)
        losses = objective(x, y[:4])
        losses[0].backward()
        results.append((losses.detach(), [p.grad for p in grow.trainable(model)]))
    (a, ga), (b, gb) = results
    assert torch.allclose(a, b) and a[2] > 0 and math.isclose(a[0], a[1] + a[2], rel_tol=1e-6)
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(ga, gb))
