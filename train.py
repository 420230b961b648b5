"""Train a GPT that grows: options, the loop, growth in the loop, checkpoint and resume.

    python train.py                 the card: GPT-2 124M on WikiText-2, 12 -> 15 layers in 2,000 steps
    python train.py demo            the same program on embedded text: no network, three minutes on a CPU
    python train.py best            the card's task with what the study (README) found best
    python train.py demo best --seed=2              presets first, then options
    python train.py demo --resume                   go on after any interruption
    torchrun --standalone --nproc_per_node=2 train.py demo      several processes, the same global batch

It writes RUN/metrics.jsonl (everything measured), ckpt.pt (to resume from), best.pt (lowest validation
loss) and model/ (the result in Hugging Face's format, with its card). Read model.py and grow.py first."""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import data
import eval as ev
import grow
from data import UsageError, UserError
from model import GPT, FrozenHeadLoss, GPTConfig, cast_frozen, cross_entropy, read_config, weight_of

# ------------------------------------------------------------------------------------------------------------
# Options


def option(default, help, *allowed):
    """An option of the command line. `allowed`: the least value of a number, or all values of a string."""
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass
class Options:
    # the network and its two domains
    init: str = option("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder with weights, or scratch")
    dataset: str = option("wikitext2", "what is learned: wikitext2, webtext, docs, code, a file, a folder")
    retain: str = option("auto", "what must be kept: the same, or none (auto: webtext if it can be had)")
    block_size: int = option(128, "context, in tokens", 2)
    bad_utf8: str = option("refuse", "invalid UTF-8 in a file of yours", "refuse", "replace")
    n_layer: int = option(12, "with --init=scratch: blocks", 1)
    n_head: int = option(12, "with --init=scratch: heads", 1)
    n_embd: int = option(768, "with --init=scratch: channels", 1)
    tokenizer: str = option("gpt2", "with --init=scratch", "gpt2", "bytes")
    pretrain_steps: int = option(0, "with --init=scratch: first train so many steps on --retain, once", 0)
    pretrain_lr: float = option(4e-3, "peak learning rate of that", 0)
    # optimisation
    max_steps: int = option(2000, "optimizer steps", 1)
    batch_size: int = option(8, "rows per micro-step, over all processes together", 1)
    grad_accum: int = option(1, "micro-steps per optimizer step", 1)
    lr: float = option(5e-5, "learning rate of AdamW", 0)
    lr_schedule: str = option("constant", "or cosine to 0 at max_steps", "constant", "cosine")
    warmup_steps: int = option(0, "steps of linear warm-up", 0)
    weight_decay: float = option(0.01, "of matrices and embeddings", 0)
    grad_clip: float = option(1.0, "largest gradient norm (0: no clipping)", 0)
    dropout: float = option(0.0, "probability, below 1", 0)
    seed: int = option(0, "of batches, fresh blocks, dropout and sampled labels", 0)
    # growth
    trigger: str = option("schedule", "what decides to grow", "schedule", "plateau")
    grow_every: int = option(500, "schedule: steps between growths", 1)
    first_growth: int = option(
        -1, "none before this step (-1: grow_every; 0: at once, originals never train)", -1
    )
    max_growths: int = option(3, "blocks to add at most (0: an ordinary training run)", 0)
    where: str = option("upper", "spread, upper (spread over the upper half), top, bottom, or an index")
    block_init: str = option("copy", "of the block below; both have zero output projections", "copy", "fresh")
    freeze: str = option("base", "from the first growth on: base, older, none; topN: only N top blocks train")
    patience: int = option(300, "plateau: steps without improvement", 1)
    min_delta: float = option(0.01, "plateau: what counts as an improvement, in nats", 0)
    # keeping the old
    kd_weight: float = option(0.0, "weight of distillation from the pretrained network", 0)
    kd_temperature: float = option(2.0, "its temperature, above 0", 0)
    kd_on: str = option("train", "the batch, old text, or dreamt text", "train", "retain", "dream")
    kd_rows: int = option(4, "rows of old or dreamt text beside each micro-step's batch", 1)
    dreams: int = option(2048, "rows sampled once from the pretrained network", 1)
    ewc_lambda: float = option(0.0, "weight of elastic weight consolidation", 0)
    ewc_batches: int = option(32, "batches of 8 rows of old text for its Fisher information", 1)
    replay: float = option(0.0, "fraction of each batch's rows drawn from the old domain, below 1", 0)
    # measuring and saving
    eval_every: int = option(100, "steps between evaluations", 1)
    eval_windows: int = option(64, "windows of the validation split in each (0: all)", 0)
    test_windows: int = option(0, "windows of the test splits at the end (0: all)", 0)
    log_every: int = option(10, "steps between log lines", 1)
    save_every: int = option(500, "steps between checkpoints; one more at the end and on Ctrl-C", 1)
    out: str = option("", "run folder (empty: out/PRESET and the options given)")
    resume: str = option("no", "yes or no value: go on; auto: if there is a run", "no", "yes", "auto")
    # the machine
    device: str = option("auto", "", "auto", "cpu", "cuda", "mps")
    dtype: str = option("auto", "what autocast computes in", "auto", "float32", "bfloat16", "float16")
    compile: str = option("auto", "auto: on CUDA", "auto", "0", "1")
    profile: int = option(0, "1: write a Chrome trace of ten steps and print the five largest kernels", 0)
    cache_dir: str = option("", "downloads and tokens (empty: ~/.cache/growing-gpt)")


# fmt: off
PRESETS = {
    "card": {},
    "demo": dict(
        init="scratch", tokenizer="bytes", n_layer=4, n_head=4, n_embd=128, retain="docs", pretrain_steps=600,
        dataset="code", batch_size=16, max_steps=400, grow_every=130, max_growths=2, lr=1e-3, eval_every=50,
        log_every=25, eval_windows=100, test_windows=400, save_every=100, dtype="float32",
    ),
    "best": dict(freeze="none", replay=0.2),
}
# What may differ when a run is resumed: it changes at most the rounding of what is computed.
HARMLESS = {"out", "resume", "device", "dtype", "compile", "profile", "log_every", "save_every", "cache_dir",
            "max_steps"}
# fmt: on


def parse(argv):
    """Command line -> Options: presets, then --name=value. Raises UsageError, one sentence."""
    presets = "\n".join(
        f"  {name}: {' '.join(f'--{k}={v}' for k, v in values.items()) or 'the defaults'}"
        for name, values in PRESETS.items()
    )
    parser = ev.Parser(
        "train.py",
        usage="python train.py [card|demo|best ...] [--option=value ...]",
        description=f"{__doc__}\nPresets:\n{presets}",
    )
    without_value = {"resume": {"nargs": "?", "const": "yes"}, "profile": {"nargs": "?", "const": 1}}
    names = [f.name for f in dataclasses.fields(Options)]
    for f in dataclasses.fields(Options):
        choices = ", ".join(f.metadata["allowed"]) if f.type is str else ""
        text = "; ".join(part for part in (f.metadata["help"], choices) if part) + f" [{f.default}]"
        more = without_value.get(f.name, {})
        parser.add_argument(
            f"--{f.name}", type=f.type, metavar="", default=argparse.SUPPRESS, help=text, **more
        )
    words = argv[: next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))]
    given, unknown = parser.parse_known_args(argv[len(words) :])
    for word in words:
        if word not in PRESETS:
            raise UsageError(
                f"unknown preset {word!r}: give {', '.join(PRESETS)}, then options as --name=value"
            )
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], names, 1)
        hint = f"did you mean --{near[0]}?" if near else "python train.py --help lists them"
        raise UsageError(f"unknown option {unknown[0]!r}: {hint}")
    merged = {k: v for word in words for k, v in PRESETS[word].items()} | vars(given)
    if not merged.get("out"):  # runs with different options get different folders
        said = "".join(f"-{k}={v}" for k, v in vars(given).items() if k not in HARMLESS)
        name = "-".join(words or ["card"]) + "".join(c if c.isalnum() or c in "-_=." else "_" for c in said)
        digest = hashlib.sha256(said.encode()).hexdigest()[:8]
        merged["out"] = "out/" + (name if len(name) <= 120 else f"{name[:100]}-{digest}")
    return Options(**merged)


def check(o, world=1):
    """Refuse options out of range and senseless combinations before anything is downloaded or computed."""

    def need(condition, sentence):
        if not condition:
            raise UsageError(sentence)

    for f in dataclasses.fields(o):
        value, allowed = getattr(o, f.name), f.metadata["allowed"]
        if f.type is str:
            need(not allowed or value in allowed, f"--{f.name}={value} is none of {', '.join(allowed)}")
        else:
            need(
                math.isfinite(value) and value >= allowed[0],
                f"--{f.name}={value} must be at least {allowed[0]}",
            )
    need(o.kd_temperature > 0, "--kd_temperature must be above 0")
    need(o.dropout < 1 and o.replay < 1, "--dropout and --replay must be below 1")
    need(o.seed < 2**32, "--seed must be below 2**32")
    need(o.profile == 0 or o.max_steps >= 15, "--profile traces steps 5 to 15: give more --max_steps")
    need(o.dropout == 0 or world == 1, "--dropout would differ between processes: use one, or --dropout=0")
    need(not o.pretrain_steps or 16 % world == 0, "--pretrain_steps needs 1, 2, 4, 8 or 16 processes")
    for name, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        need(
            o.device != name or backend.is_available(),
            f"--device={name}, but torch sees none: use --device=auto",
        )

    if o.init == "scratch":
        config = scratch_config(o)
        old = o.retain not in ("none", "auto")
        need(not o.pretrain_steps or old, "--pretrain_steps trains on the old text: name it with --retain")
    else:
        config = read_config(o.init)
        need(not o.pretrain_steps, "--pretrain_steps is for --init=scratch: other networks are pretrained")
    L, limit, rows = config.n_layer, config.block_size, o.batch_size * o.grad_accum
    need(o.block_size <= limit, f"--block_size={o.block_size} is over the model's {limit}: lower it")
    data.tokenizer_name(config.vocab_size)
    for name in {o.dataset, o.retain} - {"auto", "none"}:
        data.check_name(name)
    need(
        o.dataset not in ("auto", "none"),
        "--dataset must name a text: wikitext2, webtext, docs, code or a file",
    )
    top = o.freeze.removeprefix("top")
    known = o.freeze in ("base", "older", "none") or (
        top.isdecimal() and o.freeze == f"top{top}" and 0 < int(top) <= L
    )
    need(known, f"--freeze={o.freeze} is none of base, older, none, top1 to top{L}")
    known = o.where in ("spread", "upper", "top", "bottom") or (o.where.isdecimal() and int(o.where) <= L)
    need(known, f"--where={o.where} is none of spread, upper, top, bottom, and no index from 0 to {L}")

    if o.max_growths and o.trigger == "schedule":
        late = f"the first growth is due at step {first_growth(o)}, after --max_steps={o.max_steps}"
        need(first_growth(o) <= o.max_steps, f"{late}: lower --grow_every, or give --max_growths=0")
    if o.max_growths and o.trigger == "plateau":
        span = f"--eval_every={o.eval_every}, --patience={o.patience}, --max_steps={o.max_steps}"
        fits = o.eval_every <= o.patience < o.max_steps
        need(fits, f"a plateau needs evaluations within its patience and steps beyond it, not {span}")
    never = "with --first_growth=0 and a frozen base the originals never train"
    need(
        not o.ewc_lambda or not originals_never_train(o),
        f"--ewc_lambda would weigh nothing: {never}; drop it",
    )
    for name in ("ewc_lambda", "replay", *(["kd_weight"] if o.kd_on == "retain" else [])):
        need(not getattr(o, name) or o.retain != "none", f"--{name} needs old text: name it with --retain")
    need(not o.kd_weight or not o.dropout, "distillation shares blocks with its teacher: use --dropout=0")
    need(
        not o.replay or 0 < round(o.replay * rows) < rows,
        f"--replay={o.replay} of {rows} rows is none or all of them",
    )
    for name in ("batch_size", "kd_rows") if o.kd_weight and o.kd_on != "train" else ("batch_size",):
        need(
            getattr(o, name) % world == 0,
            f"--{name}={getattr(o, name)} must be a multiple of the {world} processes",
        )


def first_growth(o):
    return o.grow_every if o.first_growth < 0 else o.first_growth


def originals_never_train(o):
    return bool(o.max_growths) and o.first_growth == 0 and o.freeze in ("base", "older")


def scratch_config(o):
    vocab_size = data.BYTES if o.tokenizer == "bytes" else data.GPT2
    return GPTConfig(vocab_size, o.block_size, o.n_head, o.n_embd, (0,) * o.n_layer, o.dropout)


# ------------------------------------------------------------------------------------------------------------
# The machine


def choose_machine(o):
    """(device, dtype, compile or not, reasons): every choice is printed once, with its reason."""
    if o.device == "auto":
        backends = (("cuda", torch.cuda), ("mps", torch.backends.mps))
        kind, why = (
            next((name for name, b in backends if b.is_available()), "cpu"),
            "the fastest that torch sees",
        )
    else:
        kind, why = o.device, "asked for"
    device = (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    )
    reasons = [f"device {device}: {why}"]

    native_on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if o.dtype != "auto":
        dtype, why = getattr(torch, o.dtype), "asked for"
    elif (kind == "cuda" and torch.cuda.is_bf16_supported(False)) or (kind == "cpu" and native_on_cpu):
        dtype, why = torch.bfloat16, "native here"
    else:
        dtype, why = torch.float16 if kind == "cuda" else torch.float32, "no native bfloat16"
    reasons.append(f"dtype {str(dtype)[6:]}: {why}")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32

    use = o.compile == "1" or (o.compile == "auto" and kind == "cuda")
    why = "asked for" if o.compile != "auto" else "worth it on CUDA" if use else "by default only on CUDA"
    if use:
        # Past its limit of graphs torch would go on eagerly with no more than a log line: let it raise
        # instead.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        except Exception as e:  # no C++ compiler, no Triton ...: whatever it is, eager works
            use, why = False, f"impossible here ({type(e).__name__}), so eagerly"
    reasons.append(f"compile {int(use)}: {why}")
    return device, dtype, use, reasons


def make_optimizer(model, o, device, previous=None):
    """AdamW over what trains now; matrices and embeddings decay. It takes over the state of `previous`."""
    params = grow.trainable(model)
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type != "mps")
    if previous is not None:
        grow.carry_over(previous, optimizer)
    return optimizer


def learning_rate(o, step):
    lr = o.lr * min(1.0, (step + 1) / (o.warmup_steps + 1))
    return lr * 0.5 * (1 + math.cos(math.pi * step / o.max_steps)) if o.lr_schedule == "cosine" else lr


# ------------------------------------------------------------------------------------------------------------
# The objective


class Objective(nn.Module):
    """The loss of one micro-batch, as a module so that DistributedDataParallel can wrap it.

    forward(x (B + K, T), y (B, T)) -> next-token loss and distillation loss, scalars in nats per token.
    The last K rows of x have no targets: the network is only distilled on them. With K = 0 it is distilled
    on x itself."""

    def __init__(self, model, teacher, shared, temperature):
        super().__init__()
        self.model, self.shared, self.temperature, self.compiled = model, shared, temperature, False
        self.__dict__["teacher"] = teacher  # not a submodule: DDP need not know it

    def forward(self, x, y):
        if self.teacher is None:
            return self.losses(self.model.run(self.model.embed(x)), y, None)
        # Up to the lowest grown block a shared teacher is the network itself: compute that part once.
        grown = [i for i, g in enumerate(self.model.config.generation) if g > 0]
        fork = (grown or [self.model.config.n_layer])[0] if self.shared else 0
        below = self.model.run(self.model.embed(x), stop=fork)
        distilled = slice(len(y) if len(x) > len(y) else 0, None)
        with torch.no_grad():
            start = below[distilled].detach() if self.shared else self.teacher.embed(x[distilled])
            target = self.teacher.run(start, start=fork)
        return self.losses(self.model.run(below, start=fork), y, target)

    def losses(self, hidden, y, target):
        """From the last blocks' outputs, of the network and (unless None) of the teacher."""
        if target is None:
            return self.next_token_loss(hidden, y), torch.zeros((), device=hidden.device)
        logits = self.model.head(hidden)
        with torch.no_grad():
            wanted = self.teacher.head(target)
        kd = grow.distillation_loss(logits[-len(target) :], wanted, self.temperature)
        return cross_entropy(logits[: len(y)], y).mean(), kd

    def next_token_loss(self, hidden, y):
        model = self.model
        if model.wte.weight.requires_grad or self.compiled:  # a compiler fuses head and loss by itself
            return model.token_loss(hidden, y).mean()
        return FrozenHeadLoss.apply(model.ln_f(hidden).flatten(0, 1), weight_of(model.wte), y.flatten())


def compile_parts(objective):
    """Compile each block, and the final norm with head and loss: two graphs, however deep the network grows.

    Identical blocks share one graph, of which their parameters are inputs; a compiled whole network would be
    compiled anew at every growth.
    """
    model, teacher = objective.model, objective.teacher
    for block in {*model.h, *(teacher.h if teacher else ())}:
        block.compile(dynamic=False)
    model.token_loss = torch.compile(model.token_loss, dynamic=False)
    objective.compiled = True
    if teacher:
        objective.losses = torch.compile(objective.losses, dynamic=False)


def count_flops(objective, x, y):
    """Floating-point operations of a micro-batch, forward and backward, as things are frozen now.

    torch counts them on one row of each kind; every row costs the same.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count(rows):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(sum(objective(rows, y[:1])), grow.trainable(objective.model))
        return counter.get_total_flops()

    # Eagerly, and with plain matrix products for attention: the counter does not know every fused kernel.
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        if len(x) == len(y):
            return len(y) * count(x[:1])
        one, two = (
            count(x[[0, -1]]),
            count(x[[0, -1, -1]]),
        )  # one learned row, with one and two distilled ones
    return len(y) * (2 * one - two) + (len(x) - len(y)) * (two - one)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and log

CHECKPOINT_VERSION = 1
# What zipfile and torch.load raise at damaged bytes.
DAMAGE = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, OSError, ValueError, RuntimeError, EOFError)
DAMAGE += (LookupError, AttributeError, TypeError, NotImplementedError)


def save_atomically(path, value):
    """Write to a temporary file, flush it to the disk, rename: the file before it survives any failure."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            torch.save({"version": CHECKPOINT_VERSION, **value}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:  # torch reports a failed write as RuntimeError
        reason = f"{e.strerror}" if isinstance(e, OSError) else "the disk may be full"
        raise UserError(
            f"cannot write {path} ({reason}): the one before is intact, continue with --resume"
        ) from e


def load_checkpoint(path):
    """Tensors, numbers, strings, lists and dicts, never code. Raises UserError that names file and fault."""
    try:
        with zipfile.ZipFile(path) as z:
            # torch writes checksums and does not check them; and it would take an entry marked as a folder,
            # by one flipped bit, for an empty tensor.
            bad = z.testzip() or next((entry.filename for entry in z.infolist() if entry.external_attr), None)
        if bad:
            raise ValueError(f"the checksum or the attributes of {bad} are wrong")
        value = torch.load(path, map_location="cpu", weights_only=True)
        if value.get("version") != CHECKPOINT_VERSION:
            raise ValueError(
                f"format version {value.get('version')!r}, this program reads {CHECKPOINT_VERSION}"
            )
        return value
    except DAMAGE as e:
        raise UserError(f"{path}: damaged ({(str(e) or type(e).__name__).splitlines()[0]})") from e


class Log:
    """metrics.jsonl. A checkpoint holds its length; resuming cuts it there, so no row is lost or doubled."""

    def __init__(self, path, length, writes):
        self.file = open(path if writes else os.devnull, "ab")
        if writes and self.file.tell() < length:
            raise UserError(f"{path} is shorter than when the checkpoint was made: restore it, or start anew")
        if writes:
            self.file.truncate(length)

    def write(self, kind, **row):
        self.file.write(json.dumps({"kind": kind, **row}).encode() + b"\n")
        self.file.flush()

    def length(self):
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)


def prepare_folder(o, parameters):
    """Make the run folder, and find out before training whether it can be written and is large enough."""
    out = Path(o.out)
    need = 8 * 4 * parameters  # two checkpoints of weights and two moments each, the best, the export
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        free = shutil.disk_usage(out).free
    except OSError as e:
        raise UserError(
            f"cannot write to the run folder {out} ({e.strerror}): choose another with --out"
        ) from e
    if free < need:
        raise UserError(
            f"{out} has {free / 1e9:.1f} GB free, a run may need {need / 1e9:.1f}: make room, or use --out"
        )


def compare_options(o, stored):
    """Refuse to resume under options that would make it another run. Only the product of batch_size and
    grad_accum matters (and of kd_rows and grad_accum), so that a run can go on in less memory."""

    def meaning(values):
        values = {k: v for k, v in values.items() if k not in HARMLESS}
        accum = values.pop("grad_accum")
        return values | {"batch_size": values["batch_size"] * accum, "kd_rows": values["kd_rows"] * accum}

    now, then = meaning(asdict(o)), meaning(stored)
    if now["kd_weight"] == 0 or now["kd_on"] == "train":
        now["kd_rows"] = then["kd_rows"]
    different = [f"--{k}={v} (now {now.get(k)})" for k, v in then.items() if now.get(k) != v]
    if different:
        raise UsageError(
            f"the run in {o.out} has {', '.join(different)}: resume with those, or give another --out"
        )
    if o.max_steps < stored["max_steps"] or (
        o.lr_schedule == "cosine" and o.max_steps != stored["max_steps"]
    ):
        more = "" if o.lr_schedule == "cosine" else " or more"
        raise UsageError(f"the run in {o.out} has --max_steps={stored['max_steps']}: resume with that{more}")


# ------------------------------------------------------------------------------------------------------------
# What comes from the pretrained network. A checkpoint holds none of it: a resumed run makes it again.


def start_model(o):
    """The network as it is before the run, on the CPU. Whatever its history: here it is the original."""
    if o.init == "scratch" and not o.pretrain_steps:
        torch.manual_seed(o.seed)
        return GPT(scratch_config(o))
    model = GPT.from_pretrained(pretrain(o) if o.init == "scratch" else o.init, o.dropout)
    model.config.generation = (0,) * model.config.n_layer
    return model


def pretrain(o):
    """Train a small network on the old text, once and for all runs; return its folder."""
    p = Options(
        init="scratch", tokenizer=o.tokenizer, n_layer=o.n_layer, n_head=o.n_head, n_embd=o.n_embd,
        dataset=o.retain, retain="none", block_size=o.block_size, max_steps=o.pretrain_steps, batch_size=16,
        lr=o.pretrain_lr, lr_schedule="cosine", warmup_steps=o.pretrain_steps // 10, weight_decay=0.1,
        max_growths=0, eval_every=250, test_windows=64, log_every=100, save_every=250, resume="auto",
        bad_utf8=o.bad_utf8, device=o.device, dtype="float32",
    )  # fmt: skip
    text = data.load(p.dataset, scratch_config(p).vocab_size, p.block_size, p.bad_utf8)["train"]
    key = [hashlib.sha256(text.tobytes()).hexdigest(), p.max_steps]  # made from another text, it is another
    key += [v for k, v in asdict(p).items() if k not in HARMLESS]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    folder = data.cache_dir() / "pretrained" / f"{Path(o.retain).stem}-{o.n_layer}x{o.n_embd}-{digest}"
    with data.lock(folder) if not dist.is_initialized() else contextlib.nullcontext():
        if not (folder / "model").exists():
            print(
                f"pretraining on {o.retain} for {o.pretrain_steps} steps, once, into {folder}",
                file=sys.stderr,
            )
            train(dataclasses.replace(p, out=str(folder)))
        if dist.is_initialized():
            dist.barrier()  # until the first process has written it
    return folder / "model"


def fingerprint(model):
    """sha256 of all weights: what a run started from."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().numpy())
    return digest.hexdigest()


def dream(base, o, device, identity):
    """Text that the pretrained network samples itself, (dreams * T + 1,) tokens, kept in RUN/dreams.bin."""
    source = f"{identity}, {o.dreams} rows of {o.block_size}, seed {o.seed}"
    path, end = Path(o.out) / "dreams.bin", base.config.vocab_size - 1
    tokenizer = data.tokenizer_name(base.config.vocab_size)
    with contextlib.suppress(FileNotFoundError, ValueError):
        return data.read_bin(path, source, tokenizer)
    if not dist.is_initialized() or dist.get_rank() == 0:
        generator = torch.Generator(device).manual_seed(o.seed)
        rows = torch.full((0, o.block_size), end, device=device)
        while len(rows) < o.dreams:
            start = torch.full((min(256, o.dreams - len(rows)), 1), end, device=device)
            sampled = base.generate(start, o.block_size - 1, generator=generator)
            sampled = nn.functional.pad(sampled, (0, o.block_size - sampled.size(1)), value=end)
            rows = torch.cat([rows, sampled])
        stream = nn.functional.pad(rows.flatten(), (0, 1), value=end)  # each window needs a token behind it
        data.write_bin(path, stream.cpu().numpy(), source, tokenizer)
    if dist.is_initialized():
        dist.barrier()
    return data.read_bin(path, source, tokenizer)


def load_retained(o, vocab_size):
    """(splits or None, name). Under --retain=auto a text that cannot be had is done without, and that is
    said."""
    if o.retain == "none":
        return None, "none"
    try:
        name = "webtext" if o.retain == "auto" else o.retain
        return data.load(name, vocab_size, o.block_size, o.bad_utf8), name
    except UserError as e:
        if o.retain != "auto" or o.replay or o.ewc_lambda or (o.kd_weight and o.kd_on == "retain"):
            raise
        print(f"forgetting will not be measured: {e}; or name another text with --retain", file=sys.stderr)
        return None, "none"


def micro_batches(o, learn, retain, dreams, step, device, rank=0, world=1):
    """This rank's (inputs, targets) of each micro-step: a pure function of (seed, step)."""
    rows, T = o.batch_size * o.grad_accum, o.block_size
    replayed = round(o.replay * rows)
    x, y = data.batch(learn["train"], T, rows - replayed, step, o.seed)
    if replayed:
        again = data.batch(retain["train"], T, replayed, step, o.seed + 1)
        x, y = torch.cat([x, again[0]]), torch.cat([y, again[1]])
    x, y = (t.view(o.grad_accum, world, -1, T)[:, rank] for t in (x, y))
    if o.kd_weight and o.kd_on != "train":  # rows to be distilled on follow those to be learned
        source = dreams if o.kd_on == "dream" else retain["train"]
        extra, _ = data.batch(source, T, o.kd_rows * o.grad_accum, step, o.seed + 2)
        x = torch.cat([x, extra.view(o.grad_accum, world, -1, T)[:, rank]], 1)
    if device.type == "cuda":
        x, y = x.pin_memory(), y.pin_memory()
    return list(zip(x.to(device, non_blocking=True), y.to(device, non_blocking=True)))


# ------------------------------------------------------------------------------------------------------------
# The run


class Clock:
    """Seconds spent training: it stands while the run evaluates, grows and saves."""

    def __init__(self, device, seconds=0.0):
        self.device, self.seconds, self.since = device, seconds, None

    def go(self):
        self.since = self.since or time.perf_counter()

    def stop(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.since:
            self.seconds += time.perf_counter() - self.since
        self.since = None


def train(o):
    """Run `o` to its end, or to where a signal stops it."""
    # ----- where -----
    began, out = time.perf_counter(), Path(o.out)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *words, **more: None
    if o.resume == "no" and ((out / "ckpt.pt").exists() or (out / "metrics.jsonl").exists()):
        raise UsageError(f"{out} holds a run: continue it with --resume, or give another --out")
    if o.resume == "yes" and not (out / "metrics.jsonl").exists():
        raise UsageError(
            f"nothing to resume in {out}: leave --resume out, or name the run's folder with --out"
        )
    device, dtype, use_compile, reasons = choose_machine(o)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    # ----- the pretrained network, the two domains, and the checkpoint -----
    base = start_model(o)
    identity, config = fingerprint(base), copy.copy(base.config)
    learn = data.load(o.dataset, config.vocab_size, o.block_size, o.bad_utf8)
    retain, retain_name = load_retained(o, config.vocab_size)
    size = sum(p.numel() for p in base.parameters())
    if rank == 0:
        prepare_folder(o, size)
    saved = load_checkpoint(out / "ckpt.pt") if o.resume != "no" and (out / "ckpt.pt").exists() else None
    if not saved and o.resume != "no" and (out / "model").exists():
        raise UsageError(f"{out} holds a finished run without its ckpt.pt: give another --out")
    if saved:
        compare_options(o, saved["options"])
        if saved["init"] != identity:
            raise UserError(
                f"{out} was started from other weights than {o.init} holds now: restore those to resume"
            )
    base.to(device)

    # ----- what keeps the old: EWC's anchor, dreams, the teacher -----
    ewc = dreams = teacher = None
    if o.ewc_lambda:
        rows = (data.batch(retain["train"], o.block_size, 8, i, o.seed)[0] for i in range(o.ewc_batches))
        ewc = grow.EWC(base, (x.to(device) for x in rows), torch.Generator(device).manual_seed(o.seed))
    if o.kd_weight and o.kd_on == "dream":
        dreams = dream(base, o, device, identity)
    never = originals_never_train(o)  # then the pretrained network stays alive inside the growing one
    if saved:
        model = GPT(GPTConfig(**saved["model_config"])).to(device)
        model.load_state_dict(saved["model"])
    else:
        model = copy.deepcopy(base) if o.kd_weight and not never else base
    if o.kd_weight:
        teacher = grow.original(model) if never else base.requires_grad_(False)
        cast_frozen(teacher, dtype)
    del base

    # ----- the growing network and its optimizer -----
    if o.freeze.startswith("top") or any(model.config.generation):
        grow.freeze(model, o.freeze)
    cast_frozen(model, dtype)
    objective = Objective(model, teacher, never, o.kd_temperature)
    if use_compile:
        compile_parts(objective)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batches = functools.partial(
        micro_batches, o, learn, retain, dreams, device=device, rank=rank, world=world
    )

    def rewire(previous=None):
        """Optimizer, DDP and cost for what trains now. DDP fixes its parameters when built: build it anew."""
        wrapped = DistributedDataParallel(objective) if world > 1 else objective
        cost = world * o.grad_accum * count_flops(objective, *batches(0)[0])
        return make_optimizer(model, o, device, previous), wrapped, cost

    optimizer, wrapped, step_flops = rewire()
    plateau = grow.Plateau(o.patience, o.min_delta)
    trigger = grow.Schedule(o.grow_every, first_growth(o)) if o.trigger == "schedule" else plateau
    step, flops, elapsed, clock, best = 0, 0, 0.0, Clock(device), math.inf
    if saved:
        step, flops, elapsed, clock.seconds = (
            saved[k] for k in ("step", "flops", "seconds", "train_seconds")
        )
        grow.load_optimizer_state(model, optimizer, saved["optimizer"])
        if saved["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
        vars(trigger).update(saved["trigger"])
        best = load_checkpoint(out / "best.pt")["loss"] if (out / "best.pt").exists() else math.inf
    log = Log(out / "metrics.jsonl", saved["log_bytes"] if saved else 0, rank == 0)

    count = {
        name: {k: len(v) for k, v in splits.items()}
        for name, splits in (("learn", learn), ("retain", retain or {}))
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if not saved:
        log.write(
            "header", command=shlex.join(["python", "train.py", *sys.argv[1:]]), config=asdict(o),
            versions=versions, machine=reasons, processes=world, init_sha256=identity,
            layers=config.n_layer, parameters=size, vocab_size=config.vocab_size, tokens=count,
        )  # fmt: skip
    say(" ".join(f"--{k}={v}" for k, v in asdict(o).items()), *reasons, sep="\n")
    say(f"{config.n_layer} layers, {size:,} parameters; learn {o.dataset}, {count['learn']['train']:,} "
        f"training tokens; retain {retain_name}; torch {torch.__version__}")  # fmt: skip
    if saved:
        say(f"resumed at step {step} with {model.config.n_layer} layers")

    # ----- what the loop does: measure, grow, save, report, step -----
    def tokens():
        return step * o.batch_size * o.grad_accum * o.block_size

    def measure():
        """Validation loss on both domains, in nats per token."""
        with autocast():
            domains = {"learn": learn["val"], "retain": retain and retain["val"]}
            args = o.block_size, o.batch_size, o.eval_windows
            return {k: ev.evaluate(model, v, *args) if v is not None else None for k, v in domains.items()}

    @torch.no_grad()
    def logits(x):
        model.eval()
        with autocast():
            result = model(x)[0]
        model.train()
        return result

    def grow_here(before):
        """One growth. The logits on a real batch must be bitwise what they were, or the run stops."""
        layers, at = model.config.n_layer, grow.placement(o.where, model.config.generation, o.max_growths)
        probe = batches(step)[0][0]
        expected = logits(probe)
        torch.manual_seed(o.seed * 1_000_003 + step)  # for block_init=fresh
        block = grow.insert_block(model, at, o.block_init)
        if use_compile:
            block.compile(dynamic=False)
        grow.freeze(model, o.freeze)
        cast_frozen(model, dtype)
        if not torch.equal(expected, logits(probe)):
            raise RuntimeError(f"the growth at step {step} changed the logits: it must be the identity")
        after, added = measure(), sum(p.numel() for p in block.parameters())
        log.write(
            "event", step=step, at=at, layers_before=layers, layers_after=layers + 1, parameters_added=added,
            parameters=sum(p.numel() for p in model.parameters()), flops=flops, tokens=tokens(),
            trainable=sum(p.numel() for p in grow.trainable(model)), identical=True,
            **{f"{k}_before": v for k, v in before.items()}, **{f"{k}_after": v for k, v in after.items()},
        )  # fmt: skip
        say(f"step {step}: grew {layers} -> {layers + 1} layers at index {at}, +{added:,} parameters, logits "
            f"bitwise equal, validation loss {before['learn']:.4f} -> {after['learn']:.4f}")  # fmt: skip

    def save(name, **state):
        """Only the first process writes."""
        if rank == 0:
            weights = {"model": model.state_dict(), "model_config": asdict(model.config)}
            save_atomically(out / name, {"step": step, **weights, **state})

    def save_all():
        save(
            "ckpt.pt", options=asdict(o), init=identity, optimizer=grow.optimizer_state(model, optimizer),
            scaler=scaler.state_dict(), trigger=vars(trigger), flops=flops, train_seconds=clock.seconds,
            seconds=elapsed + time.perf_counter() - began, log_bytes=log.length() if rank == 0 else 0,
        )  # fmt: skip

    pending, reported = [], clock.seconds  # losses still on the device: fetched per log line, not per step

    def report():
        """Fetch the pending losses, stop the run if one is not finite, and log the last."""
        nonlocal pending, reported
        clock.stop()
        if not pending:
            return
        losses = torch.stack([losses for *_, losses in pending])  # (steps, 4)
        if world > 1:
            dist.all_reduce(losses)
            losses /= world
        ms, reported = 1000 * (clock.seconds - reported) / len(pending), clock.seconds
        trains = sum(p.numel() for p in grow.trainable(model))
        for (at, lr, _), (nll, kd, penalty, norm) in zip(pending, losses.tolist()):
            if not math.isfinite(nll + kd + penalty) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise UserError(
                    f"loss {nll}, gradient norm {norm} at step {at}: the run stops. {out}/ckpt.pt, if there "
                    "is one, is from before; try a lower --lr or more --warmup_steps in a new run, or "
                    "--resume with --dtype=float32"
                )
            if at % o.log_every == 0:
                log.write("step", step=at, loss=nll, kd=kd, ewc=penalty, lr=lr, norm=norm, ms=ms)
                terms = (f" kd {kd:.4f}" if teacher else "") + (f" ewc {penalty:.2e}" if ewc else "")
                speed = o.batch_size * o.grad_accum * o.block_size / ms * 1000
                shape = f"depth {model.config.n_layer} trainable {trains / 1e6:.1f}M"
                say(f"step {at}/{o.max_steps} loss {nll:.4f}{terms} lr {lr:.1e} norm {norm:.2f} {ms:.0f} ms "
                    f"{speed:,.0f} tok/s {shape}")  # fmt: skip
        pending = []

    def train_step():
        torch.manual_seed(o.seed * 1_000_003 + step)  # dropout, too, depends on (seed, step) only
        lr = learning_rate(o, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = torch.zeros(4, device=device)
        for i, (x, y) in enumerate(batches(step)):
            last = i == o.grad_accum - 1
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                with autocast():
                    nll, kd = wrapped(x, y)
                loss = (nll + o.kd_weight * kd) / o.grad_accum
                losses[:2] += torch.stack([nll, kd]).detach() / o.grad_accum
                if ewc and last:
                    penalty = ewc.penalty(model)
                    loss = loss + o.ewc_lambda * penalty
                    losses[2] = penalty.detach()
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        losses[3] = nn.utils.clip_grad_norm_(grow.trainable(model), o.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        pending.append((step, lr, losses))

    # ----- the loop, once more than max_steps, so that the last step is measured -----
    stopped_by = 0

    def on_signal(number, frame):
        nonlocal stopped_by
        stopped_by = number
        signal.signal(number, signal.SIG_DFL)  # a second one exits at once

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    resumed, profiler, profile_from = bool(saved), None, step + 5
    model.train()
    while True:
        last = step == o.max_steps
        may_grow = len(set(model.config.generation) - {0}) < o.max_growths
        scheduled = may_grow and o.trigger == "schedule" and trigger.fires(step)
        if not resumed and (step % o.eval_every == 0 or last or scheduled):
            report()
            loss = measure()
            log.write("eval", step=step, **loss)
            say(
                f"step {step}/{o.max_steps} validation: "
                + ", ".join(f"{k} {v:.4f}" for k, v in loss.items() if v)
            )
            if loss["learn"] < best:
                best = loss["learn"]
                save("best.pt", loss=best)
            fires = trigger.fires(step, loss["learn"]) and step >= o.first_growth
            if may_grow and (fires or step == o.first_growth == 0):
                grow_here(loss)
                optimizer, wrapped, step_flops = rewire(optimizer)
        stopping = agree(stopped_by) if world == 1 or step % o.log_every == 0 else 0
        if last or stopping or (step and step % o.save_every == 0 and not resumed):
            report()
            save_all()
        if stopping:
            say(f"stopped at step {step}, saved in {out}: continue with the same command and --resume=auto")
            sys.exit(128 + stopping)
        if last:
            break
        if o.profile and step == profile_from:
            profiler = torch.profiler.profile()
            profiler.start()
        clock.go()
        train_step()
        if step % o.log_every == 0:
            report()
        step, flops, resumed = step + 1, flops + step_flops, False
        if profiler and step == profile_from + 10:
            profiler.stop()
            if rank == 0:
                write_profile(profiler, out, device)
            profiler = None
    for number, handler in handlers.items():
        signal.signal(number, handler)

    # ----- the end: base against grown on the test splits, export, tables -----
    base = grow.original(model) if never else teacher or start_model(o)
    if not (never or teacher) and fingerprint(base) != identity:
        raise UserError(f"{o.init} has other weights than when the run started: restore them and --resume")
    base.to(device)
    with autocast():
        args = o.block_size, o.batch_size, o.test_windows
        learned = ev.compare(base, model, learn["test"], *args)
        kept = (
            ev.compare(base, model, retain["test"], *args) if retain else dict(base=None, grown=None, kl=None)
        )
        use = ev.block_use(model, learn["test"], o.block_size)
    part = f"first {o.test_windows} windows" if o.test_windows else "whole split"
    log.write(
        "result", learn={"dataset": o.dataset, **learned}, retain={"dataset": retain_name, **kept},
        layers=model.config.n_layer, parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in grow.trainable(model)), flops=flops, tokens=tokens(), best=best,
        train_seconds=clock.seconds, seconds=elapsed + time.perf_counter() - began,
        block_use={str(g): u for g, u in zip(model.config.generation, use) if g > 0},
        protocol=f"Test split, {part}, context {o.block_size}, stride {o.block_size}, mean over predicted "
                 f"tokens, {str(dtype)[6:]}.",
    )  # fmt: skip
    if rank == 0:
        run = ev.read_run(out)
        export(model, run, out / "model")
        say("\n" + ev.report(run))


def agree(number):
    """The same signal on every rank: the largest that any has received."""
    if not dist.is_initialized():
        return number
    agreed = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return int(agreed)


def export(model, run, folder):
    """model/: the network in Hugging Face's format with its card, complete or not there."""
    temporary = folder.with_name("model.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        (temporary / "README.md").write_text(ev.model_card(run), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as e:
        raise UserError(
            f"cannot write {folder} ({e.strerror}): the run is safe, --resume writes it again"
        ) from e


def write_profile(profiler, out, device):
    profiler.export_chrome_trace(str(out / "trace.json"))
    sort_by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=5))
    print(f"ten steps traced: open {out}/trace.json in chrome://tracing or ui.perfetto.dev")


def smaller_batch(o, world):
    """The same global batch in more, smaller micro-steps."""
    sizes = ["batch_size", "kd_rows"] if o.kd_weight and o.kd_on != "train" else ["batch_size"]
    for k in range(2, o.batch_size + 1):
        if all(getattr(o, name) % (k * world) == 0 for name in sizes):
            fewer = " ".join(f"--{name}={getattr(o, name) // k}" for name in sizes)
            accum = f"--grad_accum={o.grad_accum * k}"
            return f"{fewer} {accum} is the same global batch; add --resume=auto --out={o.out}"
    return "use a smaller --block_size, or fewer --kd_rows, in a new run"


def main(argv):
    o = parse(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    check(o, world)
    data.set_cache_dir(o.cache_dir)
    if world > 1:
        cuda = o.device in ("auto", "cuda") and torch.cuda.is_available()
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        train(o)
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(e):
            raise
        raise UserError(f"out of memory: {smaller_batch(o, world)}") from e
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    ev.run_main(main)
