"""A second trainer, slow and plain, and the program beside it, run by run.

`train_by_hand` is all that a growing run is: evaluate, grow, take one step, and again. It is written from the
textbook and shares nothing with train.py: the network is transformers' GPT-2 in float32 on the CPU, the
optimizer torch's plain AdamW. Read it as a second explanation of what the program does. Each test trains the
same tiny network on the same text twice, by hand and by the program, and compares every number of the log
and every weight at the end.

    python -m pytest tests/test_reference.py tests/test_grow.py -q

takes 20 seconds: run it after every change to how a network grows.
"""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BYTES, TINY, on_step, rows, tiny_gpt, typed
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

import data
import grow
import train
from model import GPT

EOT = BYTES - 1  # <|endoftext|>
T = 16  # tokens a row

# ----- The trainer. o: options, under the program's names. texts: {"learn", "retain"}, split each. -----
# What is random in a run is handed over: Fisher information, weights of fresh blocks, generated text. (That
# these are what they should be, test_grow.py shows; that a run may be stopped anywhere, test_train.py.)


def train_by_hand(folder, texts, o, fisher=None, fresh=(), generated=None):
    """Train and grow the network in `folder`. Returns the rows of the log, and the weights at the end."""
    net = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    net.config.use_cache = False  # it counts blocks, and their number changes
    blocks = net.transformer.h
    born = [0] * len(blocks)  # for each block: 0 if it is original, k if the k-th growth put it in
    teacher = copy.deepcopy(net)  # the network as it was: it never changes
    # EWC, for each original parameter: itself (which moves), where it was, its Fisher information.
    anchored = [(p, p.detach().clone(), fisher[name]) for name, p in net.named_parameters()] if fisher else []
    freeze(net, born, o.freeze)
    optimizer = make_optimizer(net, o)
    log = SimpleNamespace(step=[], eval=[], event=[])

    for step in range(o.max_steps + 1):  # once more than there are steps: what the last one did is measured
        more = max(born) < o.max_growths and step < o.max_steps
        due = more and o.trigger == "schedule" and is_scheduled(step, o)
        if step % o.eval_every == 0 or step == o.max_steps or due:
            losses = {name: validation_loss(net, text["val"], o) for name, text in texts.items()}
            log.eval.append({"step": step, **losses})
            if more and o.trigger == "plateau":
                due = is_plateau(log, step, o)
            if due:
                at = place(o.where, born, o.max_growths)
                block = copy.deepcopy(blocks[max(at - 1, 0)])  # of the block below
                if o.block_init == "fresh":
                    block.load_state_dict(fresh[max(born)])
                for projection in (block.attn.c_proj, block.mlp.c_proj):  # x + 0 + 0: it computes nothing yet
                    torch.nn.init.zeros_(projection.weight)
                    torch.nn.init.zeros_(projection.bias)
                blocks.insert(at, block)
                born.insert(at, max(born) + 1)
                freeze(net, born, o.freeze)
                optimizer = make_optimizer(net, o, optimizer)
                log.event.append({"step": step, "at": at})
        if step == o.max_steps:
            return log, net.state_dict()

        # The gradient of what is minimised: next-token loss + distillation + EWC.
        trained = [p for p in net.parameters() if p.requires_grad]
        net.zero_grad()
        nll = kd = ewc = 0.0
        x, y = rows_to_learn(texts, o, step)
        distilled = rows_to_distill(texts, generated, o, step, x)
        for i in range(o.grad_accum):
            log_p = net(x[i]).logits.log_softmax(-1)  # (B, T, V)
            loss = -log_p.gather(-1, y[i][..., None]).mean()
            nll += loss.item() / o.grad_accum
            if o.kd_weight:
                distance = distillation(net, teacher, distilled[i], o.kd_temperature)
                kd += distance.item() / o.grad_accum
                loss = loss + o.kd_weight * distance
            (loss / o.grad_accum).backward()
        pulled = [(p, was, f) for p, was, f in anchored if p.requires_grad]
        if pulled:  # once a step, and on no parameter that is frozen (Kirkpatrick et al., 2017, eq. 3)
            penalty = sum((f * (p - was) ** 2).sum() for p, was, f in pulled) / 2
            ewc = penalty.item()
            (o.ewc_lambda * penalty).backward()

        # Shorten it to at most grad_clip, over all that trains together, and step.
        norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in trained))
        for p in trained:
            p.grad *= min(1.0, o.grad_clip / norm)
        lr = learning_rate(o, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        log.step.append({"step": step, "loss": nll, "kd": kd, "ewc": ewc, "norm": norm, "lr": lr})


def validation_loss(net, tokens, o):
    """Mean nats over the first windows of T tokens. In each, every token but the first is predicted."""
    ids = torch.from_numpy(tokens[: o.eval_windows * T].astype(np.int64)).view(o.eval_windows, T)
    with torch.no_grad():
        log_p = net(ids).logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None]).mean().item()


def is_scheduled(step, o):
    """At first_growth, and every grow_every steps from there."""
    return step >= o.first_growth and (step - o.first_growth) % o.grow_every == 0


def is_plateau(log, step, o):
    """`patience` steps have passed since the last growth, and since the loss last fell by min_delta."""
    best, since = math.inf, 0
    for row in log.eval:
        if row["learn"] < best - o.min_delta:
            best, since = row["learn"], row["step"]
    grew = log.event[-1]["step"] if log.event else 0
    return step >= o.first_growth and step - max(since, grew) >= o.patience


def place(where, born, max_growths):
    """Where the next block goes in. spread: the original blocks are cut into max_growths equal groups, and
    one block is put after each, the highest first. upper: the same with the upper half of them."""
    if where in ("spread", "upper"):
        originals = [i for i, growth in enumerate(born) if growth == 0]
        kept = originals if where == "spread" else originals[len(originals) // 2 :]
        groups = np.array_split(kept, max_growths)  # from the lowest to the highest
        return int(groups[-1 - max(born)][-1]) + 1  # max(born): how many have grown
    ends = {"bottom": 0, "top": len(born)}
    return ends[where] if where in ends else int(where)


def freeze(net, born, policy):
    """base: grown blocks train. older: those of the newest growth. topN: grown ones and the N highest
    originals. none: everything. Before the first growth everything trains, except with topN."""
    originals = [i for i, growth in enumerate(born) if growth == 0]
    top = originals[-int(policy[3:]) :] if policy.startswith("top") else []
    everything = policy == "none" or (policy in ("base", "older") and not any(born))
    net.requires_grad_(everything)
    for i, block in enumerate(net.transformer.h):
        newest = born[i] == max(born)
        if i in top or (born[i] > 0 and (newest or policy != "older")):
            block.requires_grad_(True)


def make_optimizer(net, o, before=None):
    """AdamW of what trains now. Only matrices and embeddings decay. What trained before keeps its moments
    and its count of steps; a new block starts with none."""
    decayed, plain = [], []
    for name, p in net.named_parameters():
        if p.requires_grad:
            (plain if name.endswith("bias") or ".ln_" in name else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False)
    for p in decayed + plain:
        if before and p in before.state:
            optimizer.state[p] = before.state[p]
    return optimizer


def rows_to_learn(texts, o, step):
    """Inputs and targets, (grad_accum, batch_size, T) each. The last rows of a step are of the old text."""
    rows = o.batch_size * o.grad_accum
    old = round(o.replay * rows)
    x, y = data.batch(texts["learn"]["train"], T, rows - old, step, o.seed)
    if old:
        old_x, old_y = data.batch(texts["retain"]["train"], T, old, step, o.seed + 1)
        x, y = torch.cat([x, old_x]), torch.cat([y, old_y])
    return x.view(o.grad_accum, o.batch_size, T), y.view(o.grad_accum, o.batch_size, T)


def rows_to_distill(texts, generated, o, step, x):
    """For each micro-step the rows on which the network should still say what it said: (grad_accum, ?, T)."""
    if o.kd_on == "train":
        return x
    tokens = texts["retain"]["train"] if o.kd_on == "retain" else generated
    rows, _ = data.batch(tokens, T, o.kd_rows * o.grad_accum, step, o.seed + 2)
    return rows.view(o.grad_accum, o.kd_rows, T)


def distillation(net, teacher, idx, temperature):
    """T^2 KL(teacher || network), both softened by T, mean over tokens. (Hinton et al., 2015, section 2)"""
    with torch.no_grad():
        log_p = (teacher(idx).logits / temperature).log_softmax(-1)
    log_q = (net(idx).logits / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def learning_rate(o, step):
    """Linear warm-up, of which the first step takes 1/(w + 1), times half a cosine that ends at max_steps."""
    warm = min(1.0, (step + 1) / (o.warmup_steps + 1))
    half_cosine = (1 + math.cos(math.pi * step / o.max_steps)) / 2
    return o.lr * warm * (half_cosine if o.lr_schedule == "cosine" else 1.0)


# ----- The runs -----

COMMON = TINY | dict(lr=1e-3, max_steps=9, grow_every=None, eval_every=4, eval_windows=6)
# What the program takes where nothing is said:
DEFAULTS = dict(
    grad_accum=1, lr_schedule="constant", warmup_steps=0, weight_decay=0.01, grad_clip=1.0, seed=0,
    trigger="schedule", first_growth=-1, where="upper", block_init="copy",
    freeze="base", kd_weight=0.0, kd_temperature=1.0, kd_on="train", kd_rows=4, ewc_lambda=0.0,
    ewc_batches=32, replay=0.0,
)  # fmt: skip
GROWS = dict(grow_every=3, max_growths=2)  # at steps 3 and 6 of 9
KD = dict(kd_weight=0.3, kd_temperature=3.0)
# The loss never falls by that much, so there is a plateau from the start.
PLATEAU = dict(trigger="plateau", max_growths=2, max_steps=12, eval_every=2, min_delta=10.0)

RUNS = {
    "no_growth": dict(max_growths=0),
    "schedules": dict(
        **GROWS, lr_schedule="cosine", warmup_steps=3, weight_decay=0.3, grad_clip=0.1, freeze="none"
    ),
    "decay_of_what_is_not_frozen": dict(**GROWS, weight_decay=0.3),
    "accumulation": dict(**GROWS, batch_size=2, grad_accum=2),
    "another_rate": dict(**GROWS, lr=4e-3),
    "spread": dict(**GROWS, where="spread"),
    "fresh": dict(**GROWS, block_init="fresh"),
    "older": dict(**GROWS, freeze="older", where="top"),
    "none": dict(**GROWS, freeze="none", where="bottom"),
    "top1": dict(**GROWS, freeze="top1", where="1"),
    "first_growth": dict(**GROWS, first_growth=2, freeze="older"),
    "originals_never_train": dict(**GROWS, first_growth=0, **KD),
    "distilled_from_step_0_while_all_train": dict(**GROWS, first_growth=0, freeze="none", **KD),
    "kd_on_train": dict(**GROWS, freeze="none", **KD),
    "kd_on_retain": dict(**GROWS, freeze="none", **KD, kd_on="retain", kd_rows=3),
    "own_teacher_on_retain": dict(**GROWS, first_growth=0, where="bottom", **KD, kd_on="retain", kd_rows=3),
    "kd_on_generated": dict(**GROWS, freeze="none", **KD, kd_on="generated", kd_rows=2, generated=24),
    "ewc": dict(**GROWS, freeze="none", ewc_lambda=7.0, ewc_batches=4),
    "ewc_until_frozen": dict(**GROWS, ewc_lambda=7.0, ewc_batches=4),
    "replay": dict(**GROWS, replay=0.25),
    "plateau": PLATEAU | dict(max_steps=14, patience=4, min_delta=0.1),
    "plateau_first_growth_between_evaluations": dict(**PLATEAU, patience=2, first_growth=5),
    "plateau_count": dict(**PLATEAU, patience=4, first_growth=6),
    "all_together": dict(
        **GROWS, freeze="none", seed=5, batch_size=2, grad_accum=2, replay=0.25, ewc_lambda=7.0,
        ewc_batches=3, kd_weight=0.3, kd_on="retain", kd_rows=2, lr_schedule="cosine", weight_decay=0.1,
    ),
}  # fmt: skip
WORDS = {"learn": ["grow", "learn", "block", "layer"], "retain": ["OLD", "KEPT", "42"]}  # two texts


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a network and two texts."""
    folder = tmp_path_factory.mktemp("reference")
    tiny_gpt((0,) * 4, BYTES, T).save_pretrained(folder / "net")
    for name, words in WORDS.items():
        text = random.Random(name).choices(words, k=5000)
        (folder / f"{name}.txt").write_text("\n".join(" ".join(text[i : i + 9]) for i in range(0, 5000, 9)))
    return folder


def load_texts(home):
    return {name: data.load(str(home / f"{name}.txt"), BYTES, T) for name in ("learn", "retain")}


def start_program(home, out, options, *more):
    texts = dict(init=home / "net", dataset=home / "learn.txt", retain=home / "retain.txt", out=out)
    train.main(typed(*more, **{**texts, **COMMON, **options}))


def read_run(out):
    """(rows of the log by kind, weights at the end), as `train_by_hand` returns them."""
    kinds = {kind: rows(out, kind) for kind in ("step", "eval", "event")}
    return SimpleNamespace(**kinds), GPT2LMHeadModel.from_pretrained(out / "model").state_dict()


def as_transformers(tensors):
    """Weights under the names of our network, the way transformers has them: matrices are (in, out)."""
    return {name: t.t() if ".c_" in name and t.dim() == 2 else t for name, t in tensors.items()}


class Random:
    """What is random in a run, caught where the program draws it."""

    def __init__(self, monkeypatch):
        self.fresh, self.generated = [], None
        insert_block, generate_text = grow.insert_block, grow.generate_text

        def insert(*args, **kwargs):
            block = insert_block(*args, **kwargs)
            if not block.ln_1.weight.is_meta:  # a rehearsal without memory draws nothing
                self.fresh.append(as_transformers(copy.deepcopy(block.state_dict())))
            return block

        def generate(*args):
            self.generated = generate_text(*args)
            return self.generated

        monkeypatch.setattr(grow, "insert_block", insert)
        monkeypatch.setattr(grow, "generate_text", generate)


def fisher_information(home, texts, o):
    """What a run with EWC takes: of the pretrained network, on the old text."""
    batches = (data.batch(texts["retain"]["train"], T, 8, i, o.seed)[0] for i in range(o.ewc_batches))
    generator = torch.Generator().manual_seed(o.seed)
    fisher = grow.EWC(GPT.from_pretrained(home / "net"), batches, generator).fisher
    return {f"transformer.{name}": f for name, f in as_transformers(fisher).items()}


def by_hand(home, options, drawn):
    """The same run by the trainer above."""
    o = SimpleNamespace(**{**DEFAULTS, **COMMON, **options})
    if o.first_growth < 0:  # not said: after the first interval, or at any plateau
        o.first_growth = o.grow_every if o.trigger == "schedule" else 0
    texts = load_texts(home)
    fisher = fisher_information(home, texts, o) if o.ewc_lambda else None
    return train_by_hand(home / "net", texts, o, fisher, drawn.fresh, drawn.generated)


# What is nearly 0 carries the rounding of what it was made of, so differences are relative to this at least.
# Distillation is T^2 times a difference of logarithms of size 5; the rate is not rounded at all.
FLOOR = {"kd": 2e-2, "lr": 0.0}


def differences(program, reference):
    """{number of the log: largest relative difference, "weights": largest difference of any weight}."""
    (log, weights), (expected, expected_weights) = program, reference
    assert [(e["step"], e["at"]) for e in log.event] == [(e["step"], e["at"]) for e in expected.event]
    largest = {}
    for kind in ("step", "eval"):
        ours, theirs = getattr(log, kind), getattr(expected, kind)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs):
            for name in b:
                difference = abs(a[name] - b[name]) / (abs(b[name]) + FLOOR.get(name, 1e-3))
                largest[name] = max(largest.get(name, 0.0), difference)
    assert weights.keys() == expected_weights.keys()
    largest["weights"] = 0.0
    for name, w in weights.items():
        difference = (w - expected_weights[name]).abs()
        if name.endswith("c_attn.bias"):
            # A bias of the keys adds the same to all that a query sees, which softmax ignores. Its gradient
            # is rounding, and Adam makes a whole step of it.
            difference = difference.view(3, -1)[[0, 2]]
        largest["weights"] = max(largest["weights"], difference.max().item())
    return largest


@pytest.mark.parametrize("name", RUNS)
def test_the_program_trains_as_by_hand(name, home, tmp_path, monkeypatch):
    drawn = Random(monkeypatch)
    start_program(home, tmp_path / "run", RUNS[name])
    log, weights = read_run(tmp_path / "run")
    assert len(log.event) == RUNS[name]["max_growths"]
    for what, difference in differences((log, weights), by_hand(home, RUNS[name], drawn)).items():
        assert difference < (1e-5 if what == "weights" else 1e-4), f"{what} differs by {difference:.1e}"


def test_generated_text_is_what_the_network_says(home, tmp_path, monkeypatch):
    """At temperature 1 a network is as surprised by what it samples, on average, as it expects to be."""
    drawn = Random(monkeypatch)
    o = dict(max_growths=0, max_steps=1, kd_weight=1.0, kd_on="generated", generated=100, kd_rows=2)
    start_program(home, tmp_path / "run", o)
    assert drawn.generated.shape == (100 * T + 1,)
    ids = drawn.generated.int()[: 100 * T].view(100, T).long()
    net = GPT2LMHeadModel.from_pretrained(home / "net")
    with torch.no_grad():
        log_p = net(ids).logits[:, :-1].log_softmax(-1)
    surprise = -log_p.gather(-1, ids[:, 1:, None])[..., 0]  # (100, T - 1), nats
    entropy = -(log_p.exp() * log_p).sum(-1)
    excess = (surprise - entropy)[:, T // 2 :]  # with less context than it was sampled with
    assert excess.mean().abs() < 4 * excess.std() / math.sqrt(excess.numel())


# Everything that multiplies matrices, as torch calls it below autograd and autocast.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "scaled_dot_product", "flash_attention")


class Products(TorchDispatchMode):
    """Of each training step, the types of the operands of its matrix products, one set a product."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.step, self.types = 0, {}
        on_step(monkeypatch, lambda step: setattr(self, "step", step))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # Evaluations need no gradients. On the batch of step 0 the program may also count its operations.
        if torch.is_grad_enabled() and self.step > 0 and any(product in name for product in PRODUCTS):
            operands = {a.dtype for a in args if isinstance(a, torch.Tensor)}
            self.types.setdefault(self.step, []).append(operands)
        return function(*args, **(kwargs or {}))


def test_every_product_of_a_bfloat16_step_is_in_bfloat16(home, tmp_path, monkeypatch):
    """And the losses are those of float32 to 1%."""
    drawn, options = Random(monkeypatch), {**GROWS, "dtype": "bfloat16"}
    with Products(monkeypatch) as products:
        start_program(home, tmp_path / "run", options)
    assert list(products.types) == list(range(1, 9))
    assert len(products.types[1]) >= 4 * 5 + 1  # in a block four matrices and attention; and the head
    assert all(operands == {torch.bfloat16} for step in products.types.values() for operands in step)
    (log, _), (expected, _) = read_run(tmp_path / "run"), by_hand(home, options, drawn)
    for kind, name in (("step", "loss"), ("eval", "learn"), ("eval", "retain")):
        for ours, theirs in zip(getattr(log, kind), getattr(expected, kind)):
            assert ours[name] == pytest.approx(theirs[name], rel=0.01)
