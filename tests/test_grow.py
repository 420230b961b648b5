"""Growth is exact, freezing is for ever, the plateau is torch's, and the regularisers are the papers'."""

import copy
import itertools
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import grow
import train
from data import UserError
from model import GPT, GPTConfig


def small(depth=3, seed=0, dropout=0.0):
    """The same seed gives the same weights, whatever the dropout."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(17, 8, 2, 8, (0,) * depth, dropout))
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


def test_a_copied_block_is_its_neighbour_but_for_the_output_projections():
    """Of the block below, at the bottom of the one above; a copy of its own, and this is the default."""
    for at in range(4):
        model = small()
        neighbour = copy.deepcopy(model.h[max(at - 1, 0)].state_dict())
        block = grow.insert_block(model, at)
        for name, p in block.state_dict().items():
            assert torch.equal(p, neighbour[name]) != name.split(".")[1].startswith("c_proj"), name
        addresses = [p.data_ptr() for p in model.parameters()]
        assert len(set(addresses)) == len(addresses)  # no two share memory
    for at in (-1, 4):
        with pytest.raises(UserError, match="index from 0 to"):
            grow.insert_block(small(), at)


def test_a_new_block_is_one_generation_younger_than_all_others():
    """Whatever numbers a loaded network brings."""
    model = GPT(GPTConfig(17, 8, 2, 8, (0, 4, 2, 0)))
    grow.insert_block(model, 1)
    assert model.config.generation == (0, 5, 4, 2, 0)


@pytest.mark.parametrize("init", ["copy", "fresh"])
def test_insertion_into_a_bfloat16_network_keeps_the_logits_bitwise(init):
    model = small().bfloat16()
    with torch.no_grad():
        before = model(batch()[0])[0]
        block = grow.insert_block(model, 2, init)
        assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
        assert torch.equal(before, model(batch()[0])[0])


def test_a_fresh_block_has_the_random_weights_of_a_new_network():
    """GPT-2's N(0, 0.02) whatever the network has become; gains one, biases and output projections zero."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(17, 8, 2, 64, (0, 0)))
    for p in model.parameters():
        p.data += torch.randn_like(p)
    for name, p in grow.insert_block(model, 1, "fresh").named_parameters():
        p = p.detach()
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            n = p.numel()  # the errors of mean and standard deviation over n draws, five times
            assert abs(p.mean()) < 5 * 0.02 / math.sqrt(n), name
            assert abs(p.std() / 0.02 - 1) < 5 / math.sqrt(2 * n), name
        else:
            value = 1.0 if name.startswith("ln_") and name.endswith("weight") else 0.0
            assert (p == value).all(), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("init", ["copy", "fresh"])
def test_a_new_block_is_in_the_mode_of_the_network(training, init):
    """Dropout must work in a new block while it trains, and must not while the network is measured."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(17, 8, 2, 8, (0, 0), dropout=0.5)).train(training)
    block = grow.insert_block(model, 1, init)
    assert all(part.training == training for part in block.modules())
    for p in block.parameters():
        p.data += torch.randn_like(p)  # no longer the identity
    x = torch.randn(4, 8, 8)
    assert torch.equal(block(x), block(x)) == (not training)


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


def test_freezing_can_be_undone_and_refuses_more_blocks_than_there_are():
    """Each policy says of every parameter whether it trains, whatever another said before."""
    model = small()
    grow.insert_block(model, 2)
    grow.freeze(model, "base")
    grow.freeze(model, "none")
    assert all(p.requires_grad for p in model.parameters())
    for policy in ("top0", "top4", "top", "top-1"):  # it has three original blocks
        with pytest.raises(UserError, match="top1 to top3"):
            grow.freeze(model, policy)


@pytest.mark.parametrize("training", [True, False])
def test_original_has_the_mode_of_the_network_and_leaves_it_so(training):
    model = small(dropout=0.5).train(training)
    grow.insert_block(model, 2)
    teacher = grow.original(model)
    assert all(part.training == training for net in (model, teacher) for part in net.modules())


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
    objective = grow.Objective(model, teacher, 2.0)
    assert len({p.data_ptr() for p in objective.parameters()}) == len(owned)


def test_placement():
    def grown(where, growths, depth=12):
        model = GPT(GPTConfig(17, 8, 1, 4, (0,) * depth))
        for k in range(growths):
            grow.insert_block(model, grow.placement(where, model, k, growths))
        generation = model.config.generation
        return [sum(g == 0 for g in generation[:i]) for i, g in enumerate(generation) if g]

    assert grown("spread", 3) == [4, 8, 12]  # how many original blocks are below each grown one
    assert grown("spread", 8, 32) == [4, 8, 12, 16, 20, 24, 28, 32]  # LLaMA Pro
    assert grown("upper", 3) == [8, 10, 12]
    assert grown("top", 3) == [12, 12, 12]
    assert grown("bottom", 2) == [0, 0]
    assert grow.placement("5", small(12), 0, 3) == 5


@pytest.mark.parametrize(
    "where, depth, growths, below",
    [
        ("spread", 5, 3, [5, 3, 2]),  # groups of 5/3 blocks: 5, 3.33 and 1.67, each to the nearest block
        ("spread", 2, 5, [2, 2, 1, 1, 1]),  # 2, 1.6, 1.2, 0.8 and 0.4: never below the first block
        ("upper", 5, 3, [5, 4, 3]),  # of the upper 2.5 blocks: 5, 4.17 and 3.33
        ("1", 3, 2, [1, 1]),  # a number is an index into the network as it is: the newest lies lowest
    ],
)
def test_placement_in_a_run(text, tmp_path, where, depth, growths, below):
    """How many original blocks lie below each block that a run inserts, one growth a step."""
    train.main([
        f"--dataset={text}", "--retain=none", f"--out={tmp_path / 'run'}", "--device=cpu", "--dtype=float32",
        "--init=scratch", "--tokenizer=bytes", f"--n_layer={depth}", "--n_head=1", "--n_embd=4",
        "--block_size=8", "--batch_size=1", f"--where={where}", "--grow_every=1", f"--max_growths={growths}",
        f"--max_steps={growths + 1}", "--eval_windows=1", "--test_windows=1",
    ])  # fmt: skip
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    blocks, found = ["original"] * depth, []
    for event in (row for row in rows if row["kind"] == "event"):
        found.append(blocks[: event["at"]].count("original"))
        blocks.insert(event["at"], "grown")
    assert found == below


def test_optimizer_state_is_carried_over():
    """Rebuilding the optimizer at an insertion changes nothing for the old; the new start fresh."""
    one, two = small(), small()
    a, b = (train_steps(model, 4, grow.make_optimizer(model, 1e-2, 0.1)) for model in (one, two))
    grow.insert_block(two, 1)
    rebuilt = grow.make_optimizer(two, 1e-2, 0.1, b)
    assert all(p not in rebuilt.state for p in two.h[1].parameters())
    for model, optimizer in ((one, a), (two, rebuilt)):
        frozen = [] if model is one else list(two.h[1].parameters())
        for p in frozen:
            p.requires_grad_(False)  # so that both networks stay the same function
        train_steps(model, 4, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), grow.original(two).parameters()))

    state = grow.optimizer_state(two, rebuilt)
    again = copy.deepcopy(two)
    fresh = grow.make_optimizer(again, 1e-2, 0.1)
    grow.load_optimizer_state(again, fresh, copy.deepcopy(state))
    train_steps(two, 2, rebuilt), train_steps(again, 2, fresh)
    assert all(torch.equal(p, q) for p, q in zip(two.parameters(), again.parameters()))


def test_schedule():
    def due(first):
        return [s for s in range(20) if grow.scheduled(s, first, 5)]

    assert due(5) == [5, 10, 15] and due(0) == [0, 5, 10, 15] and due(3) == [3, 8, 13, 18]


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


def test_plateau_gives_a_new_block_its_patience():
    assert due_steps([(s, 1.0) for s in range(0, 60, 2)], 10, 0.1) == [10, 20, 30, 40, 50]


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
    ewc = grow.EWC(model, [idx] * 600, torch.Generator().manual_seed(0))
    ours, true = (torch.cat([x.flatten() for x in xs]) for xs in ([ewc.fisher[n] for n in names], exact))
    assert (ours - true).norm() / true.norm() < 0.15
    assert abs(ours.sum() / true.sum() - 1) < 0.03


def test_fisher_is_measured_without_dropout():
    """A network that drops half of everything while it trains has the Fisher of one that does not."""
    plain, dropping = small(), small(dropout=0.5)
    batches = [batch(s)[0] for s in range(3)]
    for training in (True, False):
        dropping.train(training)
        a, b = (grow.EWC(net, batches, torch.Generator().manual_seed(0)).fisher for net in (plain, dropping))
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


def test_fisher_is_of_what_trains():
    """Under a control without growth the frozen rest needs no penalty, and has no gradient to make one of."""
    model = small()
    grow.freeze(model, "top1")
    ewc = grow.EWC(model, [batch()[0]])
    assert ewc.fisher.keys() == {n for n, _ in model.named_parameters() if n.startswith("h.2.")}
    assert all(f.any() for f in ewc.fisher.values())


def test_dreams_are_a_function_of_their_seed():
    """Of nothing else. They are sampled 256 rows at a time, and each time others."""
    model, dreams = small(), []
    for generator, seed in ((1, 0), (2, 0), (1, 7)):
        torch.manual_seed(generator)
        dreams.append(grow.sample_dreams(model, 512, 8, seed))
    first, again, other = dreams
    assert first.shape == (512 * 8 + 1,) and first.dtype == torch.uint16 and first.device.type == "cpu"
    assert torch.equal(first, again) and not torch.equal(first, other)
    rows = first[:-1].view(512, 8).int()
    assert (rows[:, 0] == 16).all() and first[-1].item() == 16  # <|endoftext|> is the last of 17 ids
    assert (rows[256:, 1:] != 16).any() and not torch.equal(rows[:256], rows[256:])


def test_a_dream_that_ends_is_filled_up_with_its_end():
    model = small()
    model.ln_f.weight.data.zero_()
    model.ln_f.bias.data.copy_(torch.eye(8)[0])  # so that the logit of an id is its embedding's first number
    model.wte.weight.data[:, 0] = torch.eye(17)[16] * 100
    assert (grow.sample_dreams(model, 5, 8, 0).int() == 16).all()


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
        objective = grow.Objective(model, grow.original(model) if shared else own, 2.0)
        x, y = batch(rows=4 + extra)
        nll, kd = objective(x, y[:4])
        (nll + kd).backward()
        results.append(((nll.detach(), kd.detach()), [p.grad for p in grow.trainable(model)]))
    (a, ga), (b, gb) = results
    assert torch.allclose(torch.stack(a), torch.stack(b)) and a[1] > 0
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(ga, gb))


def test_shared_blocks_are_counted_from_below():
    """Only what both have in common may be computed once."""
    model = small(4)
    own, teacher = copy.deepcopy(model), grow.original(model)
    assert grow.shared_blocks([model, teacher]) == 4 and grow.shared_blocks([model, own]) == 0
    for at in (4, 2, 0):  # above all, between two, below all
        grow.insert_block(model, at)
        assert grow.shared_blocks([model, grow.original(model)]) == at


COSTS = {  # how many original blocks, where the grown ones go in, what is frozen, teacher, distilled rows
    "all train": (3, [], "base", None, 0),
    "one on top": (3, [3], "base", None, 0),
    "two inside": (4, [4, 2], "base", None, 0),
    "older": (4, [4, 2], "older", None, 0),
    "below a frozen one": (4, [1, 3], "older", None, 0),
    "top1": (3, [], "top1", None, 0),
    "nothing frozen": (3, [1], "none", None, 0),
    "shared teacher, on the batch": (4, [4, 2], "base", "shared", 0),
    "shared teacher, on rows of its own": (4, [4, 2], "base", "shared", 3),
    "separate teacher, on the batch": (3, [1], "none", "own", 0),
    "separate teacher, on rows of its own": (3, [3], "base", "own", 1),
    "shared teacher before the first growth": (3, [], "top2", "shared", 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_operations_are_those_that_torch_counts(name):
    depth, places, policy, teacher, distilled = COSTS[name]
    model, rows = small(depth), 2
    nets = {None: None, "own": copy.deepcopy(model)}
    for at in places:
        grow.insert_block(model, at)
    nets["shared"] = grow.original(model)
    grow.freeze(model, policy)
    objective = grow.Objective(model, nets[teacher])
    x, y = batch(rows=rows + distilled)
    # With plain matrix products for attention: the counter does not know every fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        nll, kd = objective(x, y[:rows])
        torch.autograd.grad(nll + kd, grow.trainable(model))
    assert grow.count_flops(objective, rows, distilled, 8) == counter.get_total_flops()
