"""Growing a GPT: where a block goes in, what freezes, when to grow, how the old is kept.

A pre-LN block computes x + attention(ln(x)), then x + MLP(ln(x)). If the last matrix and bias of both
branches are zero, it adds exactly zero: the network computes what it did, bit for bit. The zeros have a
gradient: the block can learn. This is depth growth as in Net2Net (Chen et al., 2016), LLaMA Pro (Wu et al.,
arXiv 2401.02415), "Composable Function-preserving Expansions" (Gesmundo & Maile, arXiv 2308.06103).

    block = insert_block(model, at=12)      # one block deeper, it computes the same
    freeze(model, "base")                   # only what was inserted trains
    teacher = original(model)               # the network it was, sharing every tensor
    mix(losses)                             # predict with both, each as far as it was right
"""

import copy
import itertools
import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import UserError, need
from model import GPT, init_parameter

# ----- Insertion -----

TOLERANCE = 0.0  # how far a growth may change a logit; more only for an identity up to rounding


def insert_block(model, at, init="copy", generation=None):
    """Insert an identity block at index `at` of model.h (0 ... n_layer) and return it.

    init "copy" starts from the block below (at index 0, above), "fresh" from GPT-2's random weights. Both
    zero the two output projections (arXiv 2308.06103, theorem 3.6): at first only these have a gradient,
    from the second step on all do. `generation`: of the growth it belongs to; None: the next."""
    config = model.config
    need(0 <= at <= config.n_layer, f"cannot insert at {at}: give 0 to {config.n_layer}")
    need(init in ("copy", "fresh"), f"unknown block init {init!r}: give copy or fresh")
    block = copy.deepcopy(model.h[max(at - 1, 0)]).requires_grad_(True)
    if init == "fresh":
        for name, p in block.named_parameters():
            init_parameter(name, p, config.n_layer)
    for p in (*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()):
        nn.init.zeros_(p)
    if generation is None:
        generation = max(config.generation) + 1
    model.h.insert(at, block)
    config.generation = (*config.generation[:at], generation, *config.generation[at:])
    return block


def grown(model):
    """Indices of this run's blocks: those newer than the last version. Every rule below asks here."""
    return [i for i, g in enumerate(model.config.generation) if g > model.config.versions[-1]]


def originals(model):
    return [i for i in range(model.config.n_layer) if i not in grown(model)]


def placement(where, model, growth, max_growths):
    """Index for the next block after `growth` of `max_growths` growths.

    "spread" cuts the original blocks into max_growths groups, equal but for rounding, and puts a block
    after each (LLaMA Pro's interleaving); "upper" does so with the upper half. Both go from the top down:
    blocks below the lowest that trains need no backward. "top" and "bottom" always use the ends."""
    if where == "top":
        return model.config.n_layer
    if where == "bottom":
        return 0
    if where.isdecimal():
        return int(where)
    known = where in ("spread", "upper")
    need(known, f"unknown place {where!r}: give spread, upper, top, bottom, or an index")
    old = originals(model)
    span = len(old) if where == "spread" else len(old) / 2
    below = round(len(old) - growth * span / max_growths)  # originals below the new block
    return old[max(below, 1) - 1] + 1


# ----- Freezing -----


def freeze(model, policy):
    """Set requires_grad by policy. Nothing freezes before the first growth, except under "topN".

    base    only grown blocks train: embeddings, original blocks and final norm never change
    older   only the newest generation trains
    none    everything trains
    topN    only the top N original blocks and grown blocks train (a control without growth)"""
    generation, old, new = model.config.generation, originals(model), grown(model)
    if policy == "base":
        trains = new
    elif policy == "older":
        trains = [i for i in new if generation[i] == max(generation)]
    elif policy == "none":
        trains = range(model.config.n_layer)
    elif policy in [f"top{n}" for n in range(1, len(old) + 1)]:
        trains = old[-int(policy.removeprefix("top")) :] + new
    else:
        raise UserError(f"unknown policy {policy!r}: give base, older, none or top1 to top{len(old)}")
    model.requires_grad_(policy == "none" or not trains)  # before a growth all train
    for i in trains:
        model.h[i].requires_grad_(True)
    model.zero_grad()  # a frozen parameter must keep none


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


# ----- Versions: the networks it was, inside the network it is -----


def version(model, g):
    """The blocks up to generation `g`, as a GPT that shares every tensor with `model`. Raises UserError if
    g is neither in config.versions nor the newest generation, the model itself."""
    c = model.config
    known = sorted({*c.versions, max(c.generation)})
    need(g in known, f"no version {g} in this model: give one of {', '.join(map(str, known))}")
    keep = [i for i, k in enumerate(c.generation) if k <= g]
    generation, versions = [c.generation[i] for i in keep], [v for v in c.versions if v <= g]
    with torch.device("meta"):  # a shell, for the model's own modules
        net = GPT(replace(c, generation=generation, versions=versions))
    net.wte, net.wpe, net.ln_f = model.wte, model.wpe, model.ln_f
    net.h = nn.ModuleList(model.h[i] for i in keep)
    return net.train(model.training)


def original(model):
    """The network this run started from: unchanged only if originals never train."""
    return version(model, model.config.versions[-1])


def networks(model):
    """Every version still inside, the oldest first, and last the model as it is now."""
    c = model.config
    return [version(model, g) for g in sorted({*c.versions, max(c.generation)})]


@torch.no_grad()
def scale_grown(model, alpha):
    """Multiply the output projections of the last version's own blocks by `alpha`: 0 is the version
    before, 1 the last. Between lies an ordinary GPT-2 that learned less and may have forgotten less."""
    need(len(model.config.versions) > 1, "alpha needs two versions, and this model has one")
    for block, generation in zip(model.h, model.config.generation):
        if generation > model.config.versions[-2]:
            for p in (*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()):
                p *= alpha


def shared(a, b):
    """What two networks share from the bottom up: (the embedding, a block, ...), or nothing."""
    pairs = zip((a.wte, *a.h), (b.wte, *b.h))
    return tuple(x for x, y in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))


def run_together(nets, idx, first=0, cache=None):
    """Outputs (B, T, C) of the last block of each network, for ids (B, T). What networks share from the
    bottom up is computed once. All but the last run without gradient, and only on the rows from `first`
    on. With a cache, {modules from the bottom up: [keys, values]}, only the last token of idx is new or,
    if the cache is empty, all are: the outputs are those of new tokens."""
    forks = {shared(a, b) for a, b in itertools.combinations(nets, 2)}
    seen = idx.size(1) - 1 if cache else 0
    kept, outputs = {}, {}  # what comes out of each fork, for later networks; and at the end
    for net in [nets[-1], *nets[:-1]]:
        path, is_last = (net.wte, *net.h), net is nets[-1]
        start = max((n for n in range(1, len(path) + 1) if path[:n] in kept), default=0)
        x = kept.get(path[:start])  # (B, T, C)
        with torch.set_grad_enabled(is_last and torch.is_grad_enabled()):
            for n, module in enumerate(path[start:], start + 1):
                if n == 1:
                    x = net.embed(idx[0 if is_last else first :, seen:], seen)
                else:
                    x = module(x) if cache is None else module(x, cache.setdefault(path[:n], []))
                if path[:n] in forks:
                    kept[path[:n]] = x[first:].detach() if is_last else x
        outputs[net] = x
    return [outputs[net] for net in nets]


# Habits of the mixture: never to spread its weights anew; to spread 5% after each token, which follows
# a text that changes. Together they predict better than any one share, on old text and new.
SHARES = (0.0, 0.05)


def mix(losses, shares=SHARES):
    """Loss of predicting with K networks at once: nats per token (K, B, T) -> (B, T), float64 on the CPU.
    Losses are 0 where nothing is predicted: only at the end of a window.

    Each share is a habit. Each pair of a habit and a network has a weight w, equal when a window starts.
    The mixture says p = sum w p_k. After each token w becomes w p_k / p: Bayes' rule. Then each habit
    spreads its share of its weights equally over the networks (Herbster and Warmuth, 1998).

    Over a window p multiplies up to P. With the habit that spreads nothing, network k starts at weight
    1 / (K len(shares)) and adds that times exp(-L_k), L_k the sum of its losses. So P is at least that,
    and -ln P at most L_k + ln(K len(shares)): for the best k, on any text, at any length. (Cesa-Bianchi
    and Lugosi, Prediction, Learning, and Games, 2006, chapter 9.)"""
    log_w, mixed = None, []
    for loss in losses.cpu().double().unbind(-1):  # (K, B)
        nats, log_w = mix_token(log_w, loss, shares)
        mixed.append(nats)
    return torch.stack(mixed, -1)


def mix_token(log_w, losses, shares=SHARES):
    """One token of `mix`: log weights (S, K, B) of S habits (None at first), losses (K, B) -> the
    mixture's loss (B,), the next log weights."""
    S, K = len(shares), len(losses)
    if log_w is None:
        log_w = torch.full((S, *losses.shape), -math.log(S * K), dtype=torch.float64)
    nats = -torch.logsumexp(log_w - losses, (0, 1))  # (B,)
    log_w = log_w - losses + nats  # Bayes
    share = torch.tensor(shares, dtype=torch.float64)[:, None, None]
    spread = log_w.logsumexp(1, keepdim=True) + (share / K).log()  # (S, 1, B)
    return nats, torch.logaddexp(log_w + (1 - share).log(), spread)


# ----- Triggers: is a growth due? Pure functions of the log: no state to save. -----


def scheduled(step, first, every):
    """Due at step `first` and every `every` steps from there."""
    return step >= first and (step - first) % every == 0


def plateau(evals, patience, min_delta, grown=0):
    """Due when the loss has not fallen by more than `min_delta` nats for `patience` steps.
    evals: [(step, validation loss in nats)], in order. Terms are as in torch's ReduceLROnPlateau (mode
    min, threshold_mode abs), counted in steps: due at the first evaluation `patience` steps after the
    last improvement, where torch's waits for one more. Patience also counts from step `grown` of the
    last growth: a new block has time to prove itself."""
    best, improved = float("inf"), 0
    for step, loss in evals:
        if loss < best - min_delta:
            best, improved = loss, step
    return bool(evals) and evals[-1][0] - max(improved, grown) >= patience


def is_due(o, step, evals, events):
    """Asked at each step of a run with options `o`, after its evaluation. `evals` and `events` are
    rows of its log, so a run that was stopped grows where another would."""
    last = events[-1]["step"] if events else -1
    if not o.starts_growing <= step < o.max_steps or len(events) == o.max_growths or last == step:
        return False
    if o.trigger == "schedule":
        return scheduled(step, o.starts_growing, o.grow_every)
    if step == 0:  # no plateau yet, but with --first_growth=0 originals never train
        return o.first_growth == 0
    if step % o.eval_every:  # what follows looks at new evaluations
        return False
    history = [(e["step"], e["learn"]) for e in evals if e["step"] % o.eval_every == 0]
    return plateau(history, o.patience, o.min_delta, last)


# ----- The optimizer over growth -----


def make_optimizer(model, lr, weight_decay, state=()):
    """AdamW over what trains now; matrices and embeddings decay. What `state` (optimizer_state before
    a growth or stop) knows of a parameter that trains is carried over; a new block starts fresh."""
    params = trainable(model)
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    fused = optimizer.defaults.get("fused")  # only then is `step`, too, on the parameter's device
    for name, p in model.named_parameters():
        if p.requires_grad and name in state:
            known = state[name].items()
            optimizer.state[p] = {k: v.to(p.device) if fused or v.dim() else v for k, v in known}
    return optimizer


def optimizer_state(model, optimizer):
    """{parameter name: its moments and step}. (Torch's own goes by positions, which shift at a growth.)"""
    state = optimizer.state
    return {name: dict(state[p]) for name, p in model.named_parameters() if p in state}


# ----- Keeping the old: distillation and EWC -----


def distillation_loss(student_logits, teacher_logits, temperature):
    """T^2 KL(teacher || student) of softened distributions, mean over tokens, in nats; logits (..., V).
    T^2 keeps the gradient's size independent of T (Hinton et al., 2015, section 2)."""
    student = F.log_softmax(student_logits.float().flatten(0, -2) / temperature, -1)  # (N, V)
    teacher = F.log_softmax(teacher_logits.float().flatten(0, -2) / temperature, -1)  # (N, V)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al., 2017, eq. 3): (1/2) sum F (w - w*)^2, without lambda.

    w* are the weights of `model` now, F is the diagonal of their Fisher information per token,
    E[(d log p / dw)^2], on `batches` of ids (B, T), with labels sampled from the model. The gradients of
    their log p have mean zero and are uncorrelated, so the square of their sum is on average the sum of
    squares: one backward a batch is unbiased. (Not with the data's labels: van de Ven, arXiv 2502.11756.)"""

    def __init__(self, model, batches, generator=None):
        was_training = model.training
        model.eval()
        named = {n: p for n, p in original_parameters(model) if p.requires_grad}
        self.anchor = {n: p.detach().clone() for n, p in named.items()}
        self.fisher = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in named.items()}
        tokens = 0
        for idx in batches:
            log_p = F.log_softmax(model(idx)[0].float(), -1).flatten(0, 1)  # (B * T, V)
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)  # (B * T, 1)
            grads = torch.autograd.grad(log_p.gather(1, labels).sum(), list(named.values()))
            for n, g in zip(named, grads):
                self.fisher[n] += g.float() ** 2
            tokens += idx.numel()
        for f in self.fisher.values():
            f /= tokens
        model.train(was_training)

    def penalty(self, model):
        """Scalar, over the original parameters of `model` that still train, in few launches."""
        named = {n: p for n, p in original_parameters(model) if p.requires_grad}
        if not named:
            return torch.zeros((), device=model.wte.weight.device)
        moved = torch._foreach_sub(list(named.values()), [self.anchor[n] for n in named])
        terms = torch._foreach_mul(torch._foreach_mul(moved, moved), [self.fisher[n] for n in named])
        return torch.stack(torch._foreach_norm(terms, 1)).sum() / 2  # none is negative: norm is sum


def generate_text(model, count, seed):
    """Text for generative replay (Shin et al., arXiv 1705.08690), sampled from `model`: ids (count,) uint16,
    the same on every process, to be cut into windows as a text is.

    It is some long streams, one after the other; where the context is full, a stream goes on from its
    last half. If all windows began with <|endoftext|>, unlike a text's, a network would learn to tell
    them by it, and keep what it knew only after it."""
    context, end = model.config.block_size, model.config.vocab_size - 1
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    # At a time at most 32,768 tokens, for their keys and values; eight contexts a stream.
    streams = max(1, min(32768 // context, count // (8 * context)))
    length = math.ceil(count / streams) | 1  # odd, so that the streams begin anywhere in a window
    ids = torch.full((streams, 1), end, device=device)
    while ids.size(1) < length:
        recent = ids[:, -(context // 2) :]
        new = model.generate(recent, context - recent.size(1), generator=generator, stop=False)
        ids = torch.cat([ids[:, : -recent.size(1)], new], 1)
    ids = ids[:, :length].flatten()[:count].contiguous()
    if dist.is_initialized():
        dist.broadcast(ids, 0)
    return ids.to("cpu", torch.uint16)


def original_parameters(model):
    """(name in the original network, parameter) of all that is not in a grown block."""
    rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("h.")]
    blocks = [model.h[i] for i in originals(model)]
    return rest + [(f"h.{i}.{n}", p) for i, b in enumerate(blocks) for n, p in b.named_parameters()]


# ----- The objective -----


class Objective(nn.Module):
    """Losses of a micro-batch, as a module so that DistributedDataParallel can wrap it: of x (B + K, T) and
    y (B, T) the next-token and the distillation loss, in nats per token. The last K rows of x have
    no targets: the network is only distilled on them. With K = 0 it is distilled on all of x."""

    def __init__(self, model, teacher=None, temperature=1.0):
        super().__init__()
        self.model, self.teacher, self.temperature = model, teacher, temperature
        self.compiled = False

    def forward(self, x, y):
        B = len(y)
        if self.teacher is None:
            return self.losses(self.model.run(self.model.embed(x)), y=y)
        nets = [self.teacher, self.model]
        if len(x) == B:
            target, hidden = run_together(nets, x)  # (B, T, C) each
            return self.losses(hidden, y=y, target=target)
        target, hidden = run_together(nets, x, first=B)  # (K, T, C), (B + K, T, C)
        nll, _ = self.losses(hidden[:B], y=y)
        _, kd = self.losses(hidden[B:], target=target)
        return nll, kd

    def losses(self, hidden, y=None, target=None):
        """Of rows with targets y (B, T), or a teacher's last output (B, T, C), or both; else 0."""
        logits = self.model.head(hidden).float()  # (B, T, V)
        nll = kd = torch.zeros((), device=hidden.device)
        if target is not None:  # first, for it needs the most memory
            with torch.no_grad():
                teacher_logits = self.teacher.head(target)  # (B, T, V)
            kd = distillation_loss(logits, teacher_logits, self.temperature)
        if y is not None:
            nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").mean()
        return nll, kd


def compile_objective(objective):
    """Compile what is not compiled yet: each block, and the final norm with head and loss.
    Blocks that do the same work share a graph, with their parameters as inputs: two functions at any
    depth. A compiled whole network would be compiled anew at every growth."""
    for net in objective.children():  # the model and the teacher, if any
        for block in net.h:
            if block._compiled_call_impl is None:
                block.compile(dynamic=False)
    if not objective.compiled:
        objective.losses, objective.compiled = torch.compile(objective.losses, dynamic=False), True


def count_flops(objective, rows, distilled, T):
    """Floating-point operations of a step on `rows` rows of T tokens and `distilled` more without targets.

    Forward: two per token for every weight of a matrix, the head included, and two for every product in
    attention, masked or not. Backward: as much for activations, from the head down to the lowest block
    that trains; again for weights that train, and in attention. Look-ups, gains, biases: not counted."""
    model, teacher = objective.model, objective.teacher
    C, V = model.config.n_embd, model.config.vocab_size
    matrices, attention, head = 2 * T * 12 * C * C, 4 * T * T * C, 2 * T * C * V  # a row, forward
    trains = [any(p.requires_grad for p in block.parameters()) for block in model.h]
    whole = model.wte.weight.requires_grad
    row = head * (2 + whole) + model.config.n_layer * (matrices + attention)
    for block_trains in trains[0 if whole else trains.index(True) :]:
        row += matrices * (1 + block_trains) + 2 * attention
    flops = (rows + distilled) * row
    if teacher is not None:
        above = teacher.config.n_layer - max(len(shared(model, teacher)) - 1, 0)  # its own blocks
        flops += (distilled or rows) * (above * (matrices + attention) + head)
    return flops
