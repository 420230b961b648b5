"""Growing a GPT: where a block goes in, what freezes, when to grow, and how the old is kept.

A pre-LN block computes x + attention(ln(x)), then x + MLP(ln(x)). If the last matrix and bias of both
branches are zero, the block adds exactly zero and the network computes what it computed before, bit for
bit, while the gradient of those zeros is not zero: the block can learn. That is depth growth as in Net2Net
(Chen et al., 2016), LLaMA Pro (Wu et al., arXiv 2401.02415) and "Composable Function-preserving
Expansions" (Gesmundo & Maile, arXiv 2308.06103).

    block = insert_block(model, at=12)      # the network is one deeper and computes the same
    freeze(model, "base")                   # only what was inserted trains
    teacher = original(model)               # the network without its grown blocks, sharing every tensor
"""

from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import UserError
from model import GPT, Block, cross_entropy, init_parameter

# ------------------------------------------------------------------------------------------------------------
# Insertion


def insert_block(model, at, init="copy"):
    """Insert a block that computes the identity at index `at` of model.h (0 ... n_layer) and return it.

    init "copy" starts from the weights of the block below (of the block above at index 0), "fresh" from
    GPT-2's random initialisation. In both, weight and bias of the two output projections are zero, which
    makes the block the identity (arXiv 2308.06103, theorem 3.6): at first only they have a gradient, and a
    step later all has."""
    if not 0 <= at <= model.config.n_layer:
        raise UserError(f"cannot insert at {at}: give an index from 0 to n_layer = {model.config.n_layer}")
    if init not in ("copy", "fresh"):
        raise UserError(f"unknown block init {init!r}: give copy or fresh")
    with torch.device("meta"):
        block = Block(model.config)
    block.to_empty(device=model.wte.weight.device)
    if init == "copy":
        block.load_state_dict(model.h[max(at - 1, 0)].state_dict())
    else:
        for name, p in block.named_parameters():
            init_parameter(name, p, model.config.n_layer)
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    block.train(model.training)
    model.h.insert(at, block)
    generation = model.config.generation
    model.config.generation = (*generation[:at], max(generation, default=0) + 1, *generation[at:])
    return block


def placement(where, generation, max_growths):
    """Index for the next block, given the generations of the present ones.

    "spread" divides the original blocks into max_growths equal groups and puts one block after each, from
    the top down (LLaMA Pro's interleaving); "upper" does the same with the upper half; "top" and "bottom"
    always use the ends. Growing from the top down keeps the frozen blocks below the lowest grown one,
    which need no backward pass, as many as possible for as long as possible."""
    if where == "top":
        return len(generation)
    if where == "bottom":
        return 0
    if where not in ("spread", "upper"):
        return int(where)
    originals = [i for i, g in enumerate(generation) if g == 0]
    span = len(originals) if where == "spread" else len(originals) / 2
    below = round(len(originals) - len(set(generation) - {0}) * span / max(max_growths, 1))
    return originals[max(below, 1) - 1] + 1


# ------------------------------------------------------------------------------------------------------------
# Freezing


def freeze(model, policy):
    """Set requires_grad by policy. Nothing freezes before the first growth, except under "topN".

    base    only grown blocks train: embeddings, original blocks and final norm keep their values for ever
    older   only the newest generation trains
    none    everything trains
    topN    only the N highest original blocks and grown blocks train (a control without growth)
    """
    generation = model.config.generation
    originals = [i for i, g in enumerate(generation) if g == 0]
    if policy == "base":
        trains = {i for i, g in enumerate(generation) if g > 0}
    elif policy == "older":
        trains = {i for i, g in enumerate(generation) if g > 0 and g == max(generation)}
    elif policy == "none":
        trains = set()
    elif policy.startswith("top") and policy[3:].isdecimal() and 0 < int(policy[3:]) <= len(originals):
        trains = set(originals[-int(policy[3:]) :]) | {i for i, g in enumerate(generation) if g > 0}
    else:
        known = f"base, older, none, or top1 to top{len(originals)}"
        raise UserError(f"unknown freeze policy {policy!r}: give {known}")
    model.requires_grad_(not trains)  # no block named: everything trains
    for i in trains:
        model.h[i].requires_grad_(True)
    for p in model.parameters():
        if not p.requires_grad:
            p.grad = None  # a frozen parameter keeps no gradient buffer


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def original(model):
    """The network without its grown blocks, as a GPT that shares every tensor with `model`.

    If the originals never trained, it is the pretrained network.
    """
    with torch.device("meta"):  # an empty shell, filled with the model's own modules
        net = GPT(replace(model.config, generation=()))
    net.wte, net.wpe, net.ln_f = model.wte, model.wpe, model.ln_f
    net.h = nn.ModuleList(b for b, g in zip(model.h, model.config.generation) if g == 0)
    net.config.generation = (0,) * len(net.h)
    return net.train(model.training)


# ------------------------------------------------------------------------------------------------------------
# Triggers: fires(step, loss) is asked with the validation loss (nats) whenever one is at hand


class Schedule:
    """Fires at `first` (default: `every`) and every `every` steps from there."""

    def __init__(self, every, first=None):
        self.every, self.first = every, every if first is None else first

    def fires(self, step, loss=None):
        return step >= self.first and (step - self.first) % self.every == 0


class Plateau:
    """Fires when the loss has not fallen by more than `min_delta` nats for `patience` steps.

    The rule of torch.optim.lr_scheduler.ReduceLROnPlateau (mode min, threshold_mode abs), counted in steps
    instead of calls; NaN is never better. After firing the count starts anew, so a new block has
    `patience` steps to prove itself."""

    def __init__(self, patience, min_delta):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.since = float("inf"), 0  # lowest loss; the step from which patience is counted

    def fires(self, step, loss):
        if loss < self.best - self.min_delta:
            self.best, self.since = loss, step
        elif step - self.since >= self.patience:
            self.since = step
            return True
        return False


# ------------------------------------------------------------------------------------------------------------
# The optimizer over growth


def carry_over(old, new):
    """Give optimizer `new` what `old` knew (moments, step) of each parameter in both; others start fresh.

    The key is the parameter itself: positions, by which torch's own state_dict goes, shift when a block is
    inserted."""
    for group in new.param_groups:
        for p in group["params"]:
            if p in old.state:
                new.state[p] = old.state[p]


def optimizer_state(model, optimizer):
    """{parameter name: {'exp_avg', 'exp_avg_sq', 'step'}}: what a checkpoint keeps."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def load_optimizer_state(model, optimizer, state):
    """The reverse, for a fused optimizer: it keeps `step` on the parameter's device, too."""
    for name, p in model.named_parameters():
        if name in state:
            optimizer.state[p] = {k: v.to(p.device) for k, v in state[name].items()}


# ------------------------------------------------------------------------------------------------------------
# Keeping the old: distillation and EWC


def distillation_loss(student_logits, teacher_logits, temperature):
    """T^2 KL(teacher || student) of the softened distributions, mean over tokens, in nats.

    Logits: (..., V). The factor T^2 keeps the size of its gradient independent of T (Hinton et al., 2015,
    section 2).
    """
    V = student_logits.size(-1)
    student = F.log_softmax(student_logits.float().view(-1, V) / temperature, -1)
    teacher = F.log_softmax(teacher_logits.float().view(-1, V) / temperature, -1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al., 2017, eq. 3): (1/2) sum F (w - w*)^2, without lambda.

    w* are the weights of `model` now and F the diagonal of their Fisher information per token, E[(d log p
    / dw)^2], on `batches` (an iterable of ids (B, T)) with labels sampled from the model itself. Scores of
    sampled labels have mean zero and are uncorrelated between tokens, so the square of their sum is, on
    average, the sum of their squares: one ordinary backward per batch is an unbiased estimate. (With the
    labels of the data it would not be: van de Ven, arXiv 2502.11756.)"""

    def __init__(self, model, batches, generator=None):
        was_training = model.training
        model.eval()
        named = {n: p for n, p in original_parameters(model) if p.requires_grad}
        self.anchor = {n: p.detach().clone() for n, p in named.items()}
        self.fisher = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in named.items()}
        count = 0
        for idx in batches:
            log_p = F.log_softmax(model(idx)[0].float(), -1).flatten(0, 1)  # (BT, V)
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            grads = torch.autograd.grad(log_p.gather(1, labels).sum(), list(named.values()))
            for n, g in zip(named, grads):
                self.fisher[n] += g.float() ** 2 / idx.numel()
            count += 1
        for f in self.fisher.values():
            f /= max(count, 1)
        model.train(was_training)

    def penalty(self, model):
        """Scalar, summed over the original parameters of `model` that still train."""
        terms = [
            (self.fisher[n] * (p - self.anchor[n]) ** 2).sum()
            for n, p in original_parameters(model)
            if p.requires_grad and n in self.anchor
        ]
        return sum(terms) / 2 if terms else torch.zeros((), device=model.wte.weight.device)


def original_parameters(model):
    """(name in the original network, parameter) for every parameter that is not in a grown block."""
    originals = [b for b, g in zip(model.h, model.config.generation) if g == 0]
    inside = [(f"h.{i}.{name}", p) for i, b in enumerate(originals) for name, p in b.named_parameters()]
    return [(n, p) for n, p in model.named_parameters() if not n.startswith("h.")] + inside


# ------------------------------------------------------------------------------------------------------------
# The objective


class Objective(nn.Module):
    """The loss of one micro-batch, as a module so that DistributedDataParallel can wrap it.

    forward(x (B + K, T), y (B, T)) -> (3,), in nats per token: the loss to minimise and, for the log, its two
    parts, next-token loss and distillation loss. The last K rows of x have no targets: the network is only
    distilled on them. With K = 0 it is distilled on x itself.
    """

    def __init__(self, model, teacher=None, shared=False, kd_weight=0.0, temperature=1.0):
        super().__init__()
        self.model, self.shared, self.kd_weight, self.temperature = model, shared, kd_weight, temperature
        self.__dict__["teacher"] = teacher  # not a submodule: DDP need not know it

    def forward(self, x, y):
        B = len(y)
        if self.teacher is None:
            return self.losses(self.model.run(self.model.embed(x)), None, y)
        if len(x) == B:
            return self.losses(*self.run_both(x, 0), y)
        hidden, target = self.run_both(x, B)
        return self.losses(hidden[:B], None, y) + self.losses(hidden[B:], target, None)

    def run_both(self, x, first):
        """Last blocks' outputs, of the network on all rows of x and of the teacher from row `first` on.

        Up to the lowest grown block a shared teacher is the network itself: that part is computed once.
        """
        grown = [i for i, g in enumerate(self.model.config.generation) if g > 0]
        fork = (grown or [self.model.config.n_layer])[0] if self.shared else 0
        below = self.model.run(self.model.embed(x), stop=fork)
        with torch.no_grad():
            start = below[first:].detach() if self.shared else self.teacher.embed(x[first:])
            target = self.teacher.run(start, start=fork)
        return self.model.run(below, start=fork), target

    def losses(self, hidden, target, y):
        """The three losses of rows with targets y (B, T), or a teacher's last output (B, T, C), or both."""
        logits, nothing = self.model.head(hidden).float(), torch.zeros((), device=hidden.device)
        nll = nothing if y is None else cross_entropy(logits, y).mean()
        if target is None:
            kd = nothing
        else:
            with torch.no_grad():
                wanted = self.teacher.head(target)
            kd = distillation_loss(logits, wanted, self.temperature)
        return torch.stack([nll + self.kd_weight * kd, nll.detach(), kd.detach()])
