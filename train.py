"""Train a GPT that grows: options, the loop, growth in the loop, checkpoint and resume.

    python train.py                               the card: GPT-2 124M on WikiText-2, 12 -> 15 layers in 2,000 steps
    python train.py demo                          the same program on embedded text: no network, three minutes on a CPU
    python train.py best                          the card's task with what the study (README) found best
    python train.py demo best --seed=2            presets first, then options
    python train.py demo --resume                 go on after any interruption
    torchrun --standalone --nproc_per_node=2 train.py demo        several processes, the same global batch

It writes RUN/metrics.jsonl (everything measured), ckpt.pt (to resume), best.pt (lowest validation loss) and model/ (the
result, in Hugging Face's format with its card). Read model.py and grow.py first.
"""

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
import shutil
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, field
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
from model import GPT, GPTConfig, cross_entropy, read_config

# ------------------------------------------------------------------------------------------------------------
# Options


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    # the network and its two domains
    init: str = option("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder, or scratch")
    dataset: str = option("wikitext2", "what is learned: wikitext2, webtext, docs, code, a .txt file or a folder of text")
    retain: str = option("auto", "what must be kept: the same names, or none (auto: webtext if it can be had)")
    block_size: int = option(128, "context, in tokens")
    bad_utf8: str = option("refuse", "invalid UTF-8 in a file of yours: refuse or replace")
    n_layer: int = option(12, "blocks, with --init=scratch")
    n_head: int = option(12, "heads, with --init=scratch")
    n_embd: int = option(768, "channels, with --init=scratch")
    tokenizer: str = option("gpt2", "gpt2 or bytes, with --init=scratch")
    pretrain_steps: int = option(0, "with --init=scratch: first train this many steps on --retain (cached)")
    pretrain_lr: float = option(1e-3, "peak learning rate of that")
    # optimisation
    max_steps: int = option(2000, "optimizer steps")
    batch_size: int = option(8, "rows per micro-step, over all processes together")
    grad_accum: int = option(1, "micro-steps per optimizer step")
    lr: float = option(5e-5, "learning rate of AdamW")
    lr_schedule: str = option("constant", "constant, or cosine to 0 at max_steps")
    warmup_steps: int = option(0, "steps of linear warm-up")
    weight_decay: float = option(0.01, "of matrices and embeddings")
    grad_clip: float = option(1.0, "largest gradient norm (0: no clipping)")
    dropout: float = option(0.0, "dropout probability")
    seed: int = option(0, "of batches, fresh blocks, dropout, sampled labels")
    # growth
    trigger: str = option("schedule", "schedule, or plateau of the validation loss")
    grow_every: int = option(500, "steps between growths of the schedule")
    first_growth: int = option(-1, "first step that may grow (-1: grow_every; 0: the originals never train)")
    max_growths: int = option(3, "blocks to add at most (0: an ordinary training run)")
    where: str = option("upper", "spread, upper (spread over the upper half), top, bottom, or an index")
    block_init: str = option("copy", "copy (of the block below) or fresh; output projections are zero in both")
    freeze: str = option("base", "from the first growth on: base, older, none; or topN: N top blocks train, from the start")
    patience: int = option(300, "plateau: steps without improvement")
    min_delta: float = option(0.01, "plateau: what counts as improvement, in nats")
    # keeping the old
    kd_weight: float = option(0.0, "weight of distillation from the pretrained network")
    kd_temperature: float = option(2.0, "its temperature")
    kd_on: str = option("train", "distil on: train (the batch), retain (retained text), dream (text it sampled itself)")
    kd_rows: int = option(4, "rows of retained or dreamt text beside each micro-step's batch")
    dreams: int = option(2048, "rows sampled once from the pretrained network, with --kd_on=dream")
    ewc_lambda: float = option(0.0, "weight of elastic weight consolidation")
    ewc_batches: int = option(32, "batches of retained text for its Fisher information")
    replay: float = option(0.0, "fraction of each batch's rows drawn from the retained domain")
    # measuring and saving
    eval_every: int = option(100, "steps between evaluations")
    eval_windows: int = option(64, "windows of the validation split in each (0: all)")
    test_windows: int = option(0, "windows of the test splits at the end (0: all)")
    log_every: int = option(10, "steps between log lines")
    save_every: int = option(500, "steps between checkpoints; one is always made at the end and on Ctrl-C")
    out: str = option("", "run folder (empty: out/PRESET plus the options given)")
    resume: str = option("no", "no; yes or no value: continue the run in the folder; auto: continue if there is one")
    # the machine
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: str = option("auto", "auto, float32, bfloat16, float16: what autocast computes in")
    compile: str = option("auto", "auto (on CUDA), 0, 1")
    profile: int = option(0, "1: write a Chrome trace of ten steps and print the five largest kernels")
    cache_dir: str = option("", "downloads and tokens (empty: ~/.cache/growing-gpt)")


PRESETS = {
    "card": {},
    "demo": dict(
        init="scratch", tokenizer="bytes", n_layer=6, n_head=4, n_embd=128, pretrain_steps=600, dataset="code",
        retain="docs", batch_size=16, max_steps=600, grow_every=150, lr=1e-3, test_windows=512, eval_every=50,
        save_every=150, log_every=25, dtype="float32",
    ),
    "best": dict(first_growth=0, grow_every=1, kd_weight=1.0, kd_on="retain"),
}  # fmt: skip
# Options that do not change what a run computes: they may differ when it is resumed, and give no folder its name.
HARMLESS = {"out", "resume", "device", "dtype", "compile", "profile", "log_every", "save_every", "cache_dir", "max_steps"}


def parse(argv):
    """Command line -> Options. Raises UsageError with one sentence."""
    parser = ev.Parser("train.py", usage="python train.py [card|demo|best ...] [--option=value ...]", allow_abbrev=False)
    parser.description = "Presets: " + "; ".join(
        f"{name}: {' '.join(f'--{k}={v}' for k, v in p.items()) or 'the defaults'}" for name, p in PRESETS.items()
    )
    for f in dataclasses.fields(Options):
        flag = dict(nargs="?", const={"resume": "yes", "profile": 1}.get(f.name)) if f.name in ("resume", "profile") else {}
        help = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=f.type, metavar="", default=argparse_missing, help=help, **flag)
    words = []
    while argv and not argv[0].startswith("-"):
        words.append(argv[0])
        argv = argv[1:]
    given, unknown = parser.parse_known_args(argv)
    given = {k: v for k, v in vars(given).items() if v is not argparse_missing}
    for word in words:
        if word not in PRESETS:
            raise UsageError(f"unknown preset {word!r}: give {', '.join(PRESETS)}, then options as --name=value")
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        near = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(Options)], 1)
        raise UsageError(f"unknown option {unknown[0]!r}" + (f": did you mean --{near[0]}?" if near else " (see --help)"))
    merged = {k: v for word in words for k, v in PRESETS[word].items()} | given
    if not merged.get("out"):
        said = "".join(f"-{k}={v}" for k, v in given.items() if k not in HARMLESS)
        name = "-".join(words or ["card"]) + "".join(c if c.isalnum() or c in "-_=." else "_" for c in said)
        if len(name) > 120:
            name = name[:100] + "-" + hashlib.sha256(said.encode()).hexdigest()[:8]
        merged["out"] = f"out/{name}"
    return Options(**merged)


argparse_missing = object()


def check(o, world=1):
    """Refuse options out of range and senseless combinations, each in one sentence, before anything is computed."""

    def need(condition, sentence):
        if not condition:
            raise UsageError(sentence)

    at_least = {
        2: ["block_size"], 1: ["max_steps", "batch_size", "grad_accum", "grow_every", "patience", "eval_every", "log_every",
            "save_every", "kd_rows", "dreams", "ewc_batches", "n_layer", "n_head", "n_embd"],
        0: ["lr", "pretrain_lr", "warmup_steps", "weight_decay", "grad_clip", "dropout", "max_growths", "kd_weight",
            "ewc_lambda", "replay", "eval_windows", "test_windows", "pretrain_steps", "min_delta", "seed"],
        -1: ["first_growth"],
    }  # fmt: skip
    for least, names in at_least.items():
        for name in names:
            value = getattr(o, name)
            need(math.isfinite(value) and value >= least, f"--{name} must be at least {least}, not {value}")
    one_of = {
        "lr_schedule": ["constant", "cosine"], "trigger": ["schedule", "plateau"], "block_init": ["copy", "fresh"],
        "kd_on": ["train", "retain", "dream"], "bad_utf8": ["refuse", "replace"], "tokenizer": ["gpt2", "bytes"],
        "resume": ["no", "yes", "auto"], "dtype": ["auto", "float32", "bfloat16", "float16"], "compile": ["auto", "0", "1"],
        "profile": [0, 1], "device": ["auto", "cpu", "cuda", "mps"],
    }  # fmt: skip
    for name, values in one_of.items():
        need(getattr(o, name) in values, f"--{name} must be one of {', '.join(map(str, values))}, not {getattr(o, name)}")
    need(0 < o.kd_temperature < math.inf, f"--kd_temperature must be above 0, not {o.kd_temperature}")
    need(o.dropout < 1, f"--dropout must be below 1, not {o.dropout}")
    need(o.replay < 1, f"--replay must be below 1, not {o.replay}")
    need(o.device != "cuda" or torch.cuda.is_available(), "--device=cuda, but torch sees no CUDA GPU: use --device=auto")
    need(o.device != "mps" or torch.backends.mps.is_available(), "--device=mps, but there is none: use --device=auto")

    if o.init == "scratch":
        vocab = data.BYTES if o.tokenizer == "bytes" else data.GPT2
        config = GPTConfig(vocab, o.block_size, o.n_head, o.n_embd, (0,) * o.n_layer)
        need(not o.pretrain_steps or o.retain not in ("none", "auto"), "--pretrain_steps trains on --retain: name a text")
    else:
        config = read_config(o.init)
        need(not o.pretrain_steps, "--pretrain_steps is for --init=scratch: this network is pretrained already")
        need(o.block_size <= config.block_size, f"--block_size={o.block_size} is over the model's {config.block_size}")
    data.tokenizer_name(config.vocab_size)
    data.check_name(o.dataset)
    if o.retain not in ("auto", "none"):
        data.check_name(o.retain)
    tops = o.freeze[3:] if o.freeze.startswith("top") else ""
    need(
        o.freeze in ("base", "older", "none") or (tops.isdigit() and 0 < int(tops) <= config.n_layer),
        f"--freeze must be base, older, none or top1 to top{config.n_layer}, not {o.freeze}",
    )
    index = o.where.lstrip("-").isdigit()
    need(index or o.where in ("spread", "upper", "top", "bottom"), f"--where must be spread, upper, top, bottom or an index, not {o.where}")  # fmt: skip
    need(not index or 0 <= int(o.where) <= config.n_layer, f"--where={o.where} is outside the model: 0 to {config.n_layer}")

    first = o.grow_every if o.first_growth < 0 else o.first_growth
    if o.max_growths and o.trigger == "schedule":
        need(first <= o.max_steps, f"the first growth, at step {first}, is after --max_steps={o.max_steps}: lower --grow_every or give --max_growths=0")  # fmt: skip
    if o.max_growths and o.trigger == "plateau":
        need(o.eval_every <= o.patience < o.max_steps, f"a plateau needs evaluations within its patience and steps beyond it: --eval_every={o.eval_every} <= --patience={o.patience} < --max_steps={o.max_steps}")  # fmt: skip
    never = originals_never_train(o)
    need(not (o.ewc_lambda and never), "--ewc_lambda would weigh nothing: with --first_growth=0 and a frozen base the originals never train; use --freeze=none or leave EWC out")  # fmt: skip
    for name in ("ewc_lambda", "replay"):
        need(not getattr(o, name) or o.retain != "none", f"--{name} needs retained text: name one with --retain")
    if o.kd_weight:
        need(o.kd_on != "retain" or o.retain != "none", "--kd_on=retain needs retained text: name one with --retain")
        need(o.kd_on == "train" or o.kd_rows % world == 0, f"--kd_rows={o.kd_rows} must be a multiple of the {world} processes")
        need(not o.dropout, "distillation compares with a teacher that shares the network's blocks: use --dropout=0")
    need(not o.replay or 1 <= round(o.replay * o.batch_size * o.grad_accum) < o.batch_size * o.grad_accum,
         f"--replay={o.replay} of {o.batch_size * o.grad_accum} rows leaves no row on one side: raise --batch_size")  # fmt: skip
    need(o.batch_size % world == 0, f"--batch_size={o.batch_size} must be a multiple of the {world} processes")


def originals_never_train(o):
    return bool(o.max_growths) and o.first_growth == 0 and o.freeze in ("base", "older")


# ------------------------------------------------------------------------------------------------------------
# The machine


def choose_machine(o):
    """(device, dtype, compile?, reasons): every choice is printed once, with its reason."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if o.device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        why = "the fastest that torch sees here"
    else:
        kind, why = o.device, "asked for"
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    reasons = [f"device {device}: {why}"]
    if o.dtype != "auto":
        dtype, why = getattr(torch, o.dtype), "asked for"
    elif kind == "cuda":
        dtype, why = (torch.bfloat16, "native") if torch.cuda.is_bf16_supported(False) else (torch.float16, "no native bfloat16")
    elif kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        dtype, why = torch.bfloat16, "this processor has bfloat16 arithmetic"
    else:
        dtype, why = torch.float32, "no native bfloat16"
    reasons.append(f"dtype {str(dtype)[6:]}: {why}")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    use = o.compile == "1" or (o.compile == "auto" and kind == "cuda")
    why = "asked for" if o.compile != "auto" else "worth it on CUDA" if use else "auto compiles on CUDA only"
    if use:
        # Too many graphs would otherwise mean eager execution with no more than a log line.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        except Exception as e:  # no C++ compiler, no Triton, an unsupported platform: whatever it is, eager works
            use, why = False, f"impossible here ({type(e).__name__}), going on eagerly"
    reasons.append(f"compile {int(use)}: {why}")
    return device, dtype, use, reasons


def compile_block(block):
    """Identical blocks share one graph (parameters are its inputs), so a grown block costs no compilation."""
    block.compile(dynamic=False)


def make_optimizer(model, o, device, old=None):
    """AdamW over what trains now; matrices and embeddings decay. State of `old` is carried over by parameter."""
    params = grow.trainable(model)
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type == "cuda")
    if old is not None:
        grow.carry_over(old, optimizer)
    return optimizer


def learning_rate(o, step):
    lr = o.lr * min(1.0, (step + 1) / (o.warmup_steps + 1))
    return lr * 0.5 * (1 + math.cos(math.pi * step / o.max_steps)) if o.lr_schedule == "cosine" else lr


# ------------------------------------------------------------------------------------------------------------
# The objective


class Objective(nn.Module):
    """The loss of one micro-batch, as a module so that DistributedDataParallel can wrap it.

    forward(x (B + K, T), y (B, T)) -> (next-token loss, distillation loss), scalars in nats per token. The last K rows
    of x have no targets: the network is only distilled on them. With K = 0 and a teacher, it is distilled on x itself.
    """

    def __init__(self, model, teacher, shared, o):
        super().__init__()
        self.model, self.temperature, self.shared = model, o.kd_temperature, shared
        self.__dict__["teacher"] = teacher  # not a submodule: it has no parameters of its own to train

    def forward(self, x, y):
        if self.teacher is None:
            return self.losses(self.model.run(self.model.embed(x)), y, None)
        rows = slice(y.size(0), None) if len(x) > len(y) else slice(None)
        # Below the lowest grown block a shared teacher is the network itself: compute that part once.
        grown = [i for i, g in enumerate(self.model.config.generation) if g]
        fork = (grown or [self.model.config.n_layer])[0] if self.shared else 0
        below = self.model.run(self.model.embed(x), stop=fork)
        with torch.no_grad():
            start = below[rows] if self.shared else self.teacher.embed(x[rows])
            target = self.teacher.run(start, start=fork)
        return self.losses(self.model.run(below, start=fork), y, target)

    def losses(self, hidden, y, target):
        if target is None:
            return self.model.token_loss(hidden, y).mean(), torch.zeros((), device=hidden.device)
        logits = self.model.head(hidden)
        with torch.no_grad():
            teacher_logits = self.teacher.head(target)
        kd = grow.distillation_loss(logits[-len(target) :], teacher_logits, self.temperature)
        return cross_entropy(logits[: len(y)], y).mean(), kd


def count_flops(objective, x, y):
    """Floating-point operations of forward and backward as things are frozen now, counted by torch itself."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count(rows):
        with FlopCounterMode(display=False) as counter:
            nll, kd = objective(rows, y[:1])
            torch.autograd.grad(nll + kd, grow.trainable(objective.model), allow_unused=True)
        return counter.get_total_flops()

    # Every row costs the same, so one of each kind is counted. Fused attention kernels escape the counter.
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        plain = count(x[:1])
        extra = count(torch.cat([x[:1], x[-1:]])) - plain if len(x) > len(y) else 0
    return plain * len(y) + extra * (len(x) - len(y))


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and log


def save_atomically(path, value):
    """Write to a temporary file, flush it to the disk, rename: the file before it survives any failure."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            torch.save(value, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "the disk is full?"
        raise UserError(f"could not write {path} ({reason}): what was there is intact; make room and continue with --resume") from e


CHECKPOINT_VERSION = 1


def load_checkpoint(path):
    """Tensors, numbers, strings, lists and dicts, never code. Raises UserError that names file and fault."""
    try:
        with zipfile.ZipFile(path) as z:
            bad = z.testzip()  # torch does not check the CRCs that it writes
        if bad:
            raise ValueError(f"the checksum of {bad} is wrong")
        value = torch.load(path, map_location="cpu", weights_only=True)
        if value.get("version") != CHECKPOINT_VERSION:
            raise ValueError(f"its format version is {value.get('version')!r}, this program reads {CHECKPOINT_VERSION}")
        return value
    except FileNotFoundError as e:
        raise UserError(f"nothing to resume: there is no {path}") from e
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, AttributeError, NotImplementedError,
            zipfile.BadZipFile, pickle.UnpicklingError, zlib.error) as e:  # fmt: skip
        raise UserError(f"{path}: damaged ({str(e).splitlines()[0] if str(e) else type(e).__name__})") from e


class Log:
    """metrics.jsonl. A checkpoint stores its length, and resuming cuts it there: no row is lost, doubled or misplaced."""

    def __init__(self, path, length=0):
        if length:
            if not path.exists() or path.stat().st_size < length:
                raise UserError(f"{path} is shorter than when the checkpoint was made: restore it, or start anew")
            os.truncate(path, length)
        self.file = open(path, "ab")

    def write(self, kind, **row):
        self.file.write(json.dumps({"kind": kind, **row}).encode() + b"\n")
        self.file.flush()

    def length(self):
        os.fsync(self.file.fileno())
        return self.file.tell()


class NoLog:
    """What the other ranks write."""

    def write(self, kind, **row): ...

    def length(self):
        return 0


def prepare_folder(o, parameters):
    """Make the run folder, and find out now whether it can be written and is large enough."""
    out = Path(o.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").write_text("")
        (out / ".writable").unlink()
    except OSError as e:
        raise UserError(f"cannot write to the run folder {out} ({e.strerror}): choose another with --out") from e
    need = 4 * parameters * 8  # two checkpoints of weights and two moments, one being written; best; export
    free = shutil.disk_usage(out).free
    if free < need:
        raise UserError(f"{out} has {free / 1e9:.1f} GB free, the run may need {need / 1e9:.1f}: make room or use --out")
    return out


def compare_options(o, stored):
    """Refuse to resume under options that would make another run of it."""
    different = [k for k, v in stored.items() if k not in HARMLESS and getattr(o, k, None) != v]
    if different:
        said = ", ".join(f"--{k}={stored[k]} (now {getattr(o, k, None)})" for k in different)
        raise UsageError(f"the run in {o.out} was made with other options: {said}; give those, or another --out")
    if o.max_steps < stored["max_steps"]:
        raise UsageError(f"the run in {o.out} has --max_steps={stored['max_steps']}: resume with that or more")
    if o.max_steps > stored["max_steps"] and o.lr_schedule == "cosine":
        raise UsageError("a cosine schedule depends on --max_steps: it cannot change when a run is resumed")


# ------------------------------------------------------------------------------------------------------------
# What comes from the pretrained network. None of it is stored in a checkpoint: it is made again when a run is resumed.


def start_model(o):
    """The network as it is before the run, on the CPU."""
    if o.init != "scratch":
        return GPT.from_pretrained(o.init)
    if o.pretrain_steps:
        return GPT.from_pretrained(pretrain(o))
    torch.manual_seed(o.seed)
    vocab = data.BYTES if o.tokenizer == "bytes" else data.GPT2
    return GPT(GPTConfig(vocab, o.block_size, o.n_head, o.n_embd, (0,) * o.n_layer))


def pretrain(o):
    """Train a small network on the retained text, once; return the folder of the result."""
    p = Options(
        init="scratch", tokenizer=o.tokenizer, n_layer=o.n_layer, n_head=o.n_head, n_embd=o.n_embd, retain="none",
        block_size=o.block_size, dataset=o.retain, max_steps=o.pretrain_steps, lr=o.pretrain_lr, lr_schedule="cosine",
        warmup_steps=min(50, o.pretrain_steps // 10), batch_size=16, max_growths=0, eval_every=200, log_every=100,
        weight_decay=0.1, resume="auto", save_every=200, device=o.device, dtype="float32", test_windows=64,
    )  # fmt: skip
    key = {k: v for k, v in dataclasses.asdict(p).items() if k not in HARMLESS} | {
        "python": platform.python_version(),  # which is what the embedded texts come from
        "steps": p.max_steps,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    folder = data.cache_dir() / "pretrained" / f"{Path(o.retain).stem}-{o.n_layer}x{o.n_embd}-{digest}"
    if not (folder / "model").exists():
        print(f"pretraining a network on {o.retain} for {o.pretrain_steps} steps, once, into {folder}", file=sys.stderr)
        with data.lock(folder):
            if not (folder / "model").exists():
                train(dataclasses.replace(p, out=str(folder)))
    return folder / "model"


def fingerprint(model):
    """sha256 of all weights: what a run started from."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().contiguous().numpy())
    return digest.hexdigest()


def dream(base, o, device, out, identity):
    """Text the pretrained network samples itself, as tokens (dreams * T,), kept in RUN/dreams.bin."""
    source = f"{identity}, {o.dreams} rows of {o.block_size}, seed {o.seed}"
    tokenizer, path = data.tokenizer_name(base.config.vocab_size), out / "dreams.bin"
    try:
        return data.read_bin(path, source, tokenizer)
    except (FileNotFoundError, ValueError):
        pass
    if not dist.is_initialized() or dist.get_rank() == 0:
        generator = torch.Generator(device).manual_seed(o.seed)
        rows = []
        for first in range(0, o.dreams, 256):
            start = torch.full((min(256, o.dreams - first), 1), base.config.vocab_size - 1, device=device)
            row = base.generate(start, o.block_size - 1, generator=generator)
            rows.append(nn.functional.pad(row, (0, o.block_size - row.size(1)), value=base.config.vocab_size - 1))
        data.write_bin(path, torch.cat(rows).flatten().cpu().numpy(), source, tokenizer)
    if dist.is_initialized():
        dist.barrier()
    return data.read_bin(path, source, tokenizer)


# ------------------------------------------------------------------------------------------------------------
# The run


class Clock:
    """Seconds spent training: it stands while the run evaluates, grows and saves."""

    def __init__(self, seconds):
        self.seconds, self.since = seconds, None

    def go(self):
        self.since = self.since or time.perf_counter()

    def stop(self, device):
        if device.type == "cuda":
            torch.cuda.synchronize()
        if self.since:
            self.seconds += time.perf_counter() - self.since
        self.since = None
        return self.seconds


def load_retained(o, vocab):
    """(tokens or None, name). Under --retain=auto a text that cannot be had is done without, and that is said."""
    if o.retain == "none":
        return None, "none"
    if o.retain != "auto":
        return data.load(o.retain, vocab, o.block_size, o.bad_utf8), o.retain
    try:
        return data.load("webtext", vocab, o.block_size), "webtext"
    except UserError as e:
        if o.replay or o.ewc_lambda or (o.kd_weight and o.kd_on == "retain"):
            raise
        print(f"nothing will be said about forgetting: {e}; name another text with --retain", file=sys.stderr)
        return None, "none"


def micro_batches(o, learn, retain, dreams, step, device, rank, world):
    """This rank's inputs and targets of a step, one pair per micro-step: a pure function of (seed, step)."""
    rows, T = o.batch_size * o.grad_accum, o.block_size
    old = round(o.replay * rows)
    x, y = data.batch(learn["train"], T, rows - old, step, o.seed)
    if old:
        x, y = (torch.cat(pair) for pair in zip((x, y), data.batch(retain["train"], T, old, step, o.seed + 1)))
    x, y = (t.view(o.grad_accum, world, -1, T)[:, rank] for t in (x, y))
    if o.kd_weight and o.kd_on != "train":  # rows to be distilled on follow those to be learned
        source = dreams if o.kd_on == "dream" else retain["train"]
        extra, _ = data.batch(source, T, o.kd_rows * o.grad_accum, step, o.seed + 2)
        x = torch.cat([x, extra.view(o.grad_accum, world, -1, T)[:, rank]], 1)
    if device.type == "cuda":
        x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
    return list(zip(x.to(device), y.to(device)))


def train(o):
    # ----- where -----
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *words: None
    out = Path(o.out)
    if o.resume == "no" and ((out / "ckpt.pt").exists() or (out / "metrics.jsonl").exists()):
        raise UsageError(f"{out} holds a run: continue it with --resume, or give another --out")
    if o.resume == "yes" and not (out / "metrics.jsonl").exists():
        raise UsageError(f"nothing to resume in {out}: leave --resume out, or name the run's folder with --out")
    device, dtype, use_compile, reasons = choose_machine(o)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    began = time.perf_counter()

    # ----- the network, its two domains, and what resuming brings -----
    base = start_model(o)
    identity, vocab, depth = fingerprint(base), base.config.vocab_size, base.config.n_layer
    size = sum(p.numel() for p in base.parameters())
    learn = data.load(o.dataset, vocab, o.block_size, o.bad_utf8)
    retain, retain_name = load_retained(o, vocab)
    if rank == 0:
        prepare_folder(o, size)
    saved = load_checkpoint(out / "ckpt.pt") if o.resume != "no" and (out / "ckpt.pt").exists() else None
    if saved:
        compare_options(o, saved["options"])
        if saved["init"] != identity:
            raise UserError(f"{out} was started from other weights than {o.init} holds now: restore them to resume")
    base.to(device)

    never = originals_never_train(o)  # then the original blocks inside the model stay the pretrained network
    ewc = dreams = teacher = None
    if o.ewc_lambda:
        rows = (data.batch(retain["train"], o.block_size, o.batch_size, i, o.seed)[0] for i in range(o.ewc_batches))
        ewc = grow.EWC(base, (x.to(device) for x in rows), torch.Generator(device).manual_seed(o.seed))
    if o.kd_weight and o.kd_on == "dream":
        dreams = dream(base, o, device, out, identity)
    if saved:
        model = GPT(GPTConfig(**saved["model_config"])).to(device)
        model.load_state_dict(saved["model"])
    else:
        model = base if never or not o.kd_weight else copy.deepcopy(base)
    if o.kd_weight:
        teacher = grow.original(model) if never else base.requires_grad_(False)
    base = teacher  # without distillation nothing needs the pretrained network until the end
    if o.freeze.startswith("top") or any(model.config.generation):
        grow.freeze(model, o.freeze)

    objective = Objective(model, teacher, never, o)
    wrapped = objective
    if use_compile:
        for block in {*model.h, *(teacher.h if teacher else ())}:
            compile_block(block)
        model.token_loss = torch.compile(model.token_loss, dynamic=False)
        if teacher:
            objective.losses = torch.compile(objective.losses, dynamic=False)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batches = functools.partial(micro_batches, o, learn, retain, dreams, device=device, rank=rank, world=world)

    def rewire(old=None):
        """Optimizer, DDP and cost follow what trains now. DDP fixes its parameters when it is built, so build it anew."""
        ddp = DistributedDataParallel(objective) if world > 1 else objective
        return make_optimizer(model, o, device, old), ddp, world * o.grad_accum * count_flops(objective, *batches(0)[0])

    optimizer, wrapped, step_flops = rewire()

    # ----- state -----
    first = o.grow_every if o.first_growth < 0 else o.first_growth
    trigger = grow.Schedule(o.grow_every, first) if o.trigger == "schedule" else grow.Plateau(o.patience, o.min_delta)
    step, flops, clock, elapsed = 0, 0, Clock(0.0), 0.0
    if saved:
        step, flops, clock, elapsed = saved["step"], saved["flops"], Clock(saved["train_seconds"]), saved["seconds"]
        grow.load_optimizer_state(model, optimizer, saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        vars(trigger).update(saved["trigger"])
    log = Log(out / "metrics.jsonl", saved["log_bytes"] if saved else 0) if rank == 0 else NoLog()
    best = load_checkpoint(out / "best.pt")["loss"] if saved and (out / "best.pt").exists() else math.inf
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if not saved:
        log.write(
            "header", command=" ".join(["python train.py", *sys.argv[1:]]), config=dataclasses.asdict(o),
            versions=versions, machine=reasons, world=world, init_sha256=identity, layers=depth, parameters=size,
            vocab_size=vocab, tokens={"learn": {k: len(v) for k, v in learn.items()},
                                      "retain": retain and {k: len(v) for k, v in retain.items()}},
        )  # fmt: skip
    say(" ".join(f"--{k}={v}" for k, v in dataclasses.asdict(o).items()))
    say("\n".join(reasons))
    say(f"{depth} layers, {size:,} parameters; learn {o.dataset}, {len(learn['train']):,} training tokens; retain {retain_name}")
    if saved:
        say(f"resumed at step {step} with {model.config.n_layer} layers")

    # ----- what the loop calls -----
    def measure():
        with autocast():
            args = o.block_size, o.batch_size, o.eval_windows
            return {
                "learn": ev.evaluate(model, learn["val"], *args),
                "retain": ev.evaluate(model, retain["val"], *args) if retain else None,
            }

    @torch.no_grad()
    def logits(x):
        model.eval()
        with autocast():
            result = model(x)[0]
        model.train()
        return result

    def grow_here(before):
        """One growth. The logits on a real batch must be bitwise what they were, or the run stops."""
        layers, number = model.config.n_layer, sum(p.numel() for p in model.parameters())
        at = grow.placement(o.where, model.config.generation, o.max_growths)
        probe = batches(step)[0][0]
        expected = logits(probe)
        torch.manual_seed(o.seed * 1_000_003 + step)
        block = grow.insert_block(model, at, o.block_init)
        if use_compile:
            compile_block(block)
        grow.freeze(model, o.freeze)
        if not torch.equal(expected, logits(probe)):
            raise RuntimeError(f"the growth at step {step} changed the logits: it must be the identity")
        after, total = measure(), sum(p.numel() for p in model.parameters())
        log.write(
            "event", step=step, at=at, layers_before=layers, layers_after=layers + 1, parameters_added=total - number,
            parameters=total, trainable=sum(p.numel() for p in grow.trainable(model)), identical=True, flops=flops,
            tokens=step * o.batch_size * o.grad_accum * o.block_size,
            **{f"{k}_{when}": v[k] for when, v in (("before", before), ("after", after)) for k in v},
        )  # fmt: skip
        say(f"step {step}: grew {layers} -> {layers + 1} layers at index {at}, +{total - number:,} parameters; "
            f"logits bitwise equal, validation loss {before['learn']:.4f} -> {after['learn']:.4f}")  # fmt: skip

    def save_best():
        if rank == 0:
            state = {"step": step, "loss": best, "model": model.state_dict()}
            config = dataclasses.asdict(model.config)
            save_atomically(out / "best.pt", {"version": CHECKPOINT_VERSION, "model_config": config, **state})

    def save():
        if rank:
            return
        save_atomically(out / "ckpt.pt", {
            "version": CHECKPOINT_VERSION, "options": dataclasses.asdict(o), "init": identity, "step": step,
            "model_config": dataclasses.asdict(model.config), "model": model.state_dict(),
            "optimizer": grow.optimizer_state(model, optimizer), "scaler": scaler.state_dict(),
            "trigger": vars(trigger), "flops": flops, "train_seconds": clock.seconds,
            "seconds": elapsed + time.perf_counter() - began, "log_bytes": log.length(),
        })  # fmt: skip

    pending, seconds_then = [], clock.seconds  # (step, lr, losses) not yet fetched from the device: one transfer per log line, no wait per step

    def flush():
        nonlocal pending, seconds_then
        clock.stop(device)
        if not pending:
            return
        values = torch.stack([v for *_, v in pending])  # (steps, 4)
        if world > 1:
            dist.all_reduce(values)
            values /= world
        ms, seconds_then = 1000 * (clock.seconds - seconds_then) / len(pending), clock.seconds
        for (at, lr), (nll, kd, penalty, norm) in zip([p[:2] for p in pending], values.tolist()):
            if not math.isfinite(nll + kd + penalty) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise UserError(
                    f"loss {nll}, gradient norm {norm} at step {at}: the run stops; {out}/ckpt.pt, if there is one, is "
                    "from before. Try a lower --lr, --warmup_steps, a lower --kd_weight or --ewc_lambda, or resume with "
                    "--dtype=float32"
                )
            if at % o.log_every == 0:
                log.write("step", step=at, loss=nll, kd=kd, ewc=penalty, lr=lr, norm=norm, ms=ms)
                trains = sum(p.numel() for p in grow.trainable(model))
                terms = (f" kd {kd:.4f}" if teacher else "") + (f" ewc {penalty:.2e}" if ewc else "")
                say(f"step {at}/{o.max_steps} loss {nll:.4f}{terms} lr {lr:.1e} norm {norm:.2f} {ms:.0f} ms "
                    f"{o.batch_size * o.grad_accum * o.block_size / ms * 1000:,.0f} tok/s "
                    f"depth {model.config.n_layer} trainable {trains / 1e6:.1f}M")  # fmt: skip
        pending = []

    def train_step():
        torch.manual_seed(o.seed * 1_000_003 + step)  # dropout too depends on (seed, step) only
        lr = learning_rate(o, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        totals = torch.zeros(4, device=device)
        for micro, (x, y) in enumerate(batches(step)):
            last = micro == o.grad_accum - 1
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                with autocast():
                    nll, kd = wrapped(x, y)
                loss = (nll + o.kd_weight * kd) / o.grad_accum
                if ewc and last:
                    penalty = ewc.penalty(model)
                    loss, totals[2] = loss + o.ewc_lambda * penalty, penalty.detach()
                scaler.scale(loss).backward()
            totals[0] += nll.detach() / o.grad_accum
            totals[1] += kd.detach() / o.grad_accum
        scaler.unscale_(optimizer)
        totals[3] = nn.utils.clip_grad_norm_(grow.trainable(model), o.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        pending.append((step, lr, totals))

    # ----- the loop: evaluate, grow, save, step; once more than max_steps, so that the last step is measured ---------
    stopped_by = 0

    def stop(number, frame):
        nonlocal stopped_by
        stopped_by = number
        signal.signal(number, signal.SIG_DFL)  # a second one exits at once

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    resumed, profiler, profile_from = bool(saved), None, step + 5
    model.train()
    while True:
        last = step == o.max_steps
        grows_left = o.max_growths - len(set(model.config.generation) - {0})
        scheduled = grows_left > 0 and o.trigger == "schedule" and trigger.fires(step)
        if not resumed and (step % o.eval_every == 0 or last or scheduled):
            flush()
            loss = measure()
            log.write("eval", step=step, **loss)
            say(f"step {step}/{o.max_steps} validation: " + ", ".join(f"{k} {v:.4f}" for k, v in loss.items() if v))
            if loss["learn"] < best:
                best = loss["learn"]
                save_best()
            if grows_left > 0 and (trigger.fires(step, loss["learn"]) or step == o.first_growth):
                grow_here(loss)
                optimizer, wrapped, step_flops = rewire(optimizer)
        stopped_by = agree(stopped_by) if step % o.log_every == 0 or world == 1 else 0
        if last or stopped_by or (step % o.save_every == 0 and step and not resumed):
            flush()
            save()
        if stopped_by:
            say(f"stopped at step {step}; everything is in {out}: continue with the same command and --resume")
            sys.exit(128 + stopped_by)
        if last:
            break
        if o.profile and step == profile_from:
            profiler = torch.profiler.profile()
            profiler.start()
        clock.go()
        train_step()
        flops += step_flops
        if step % o.log_every == 0:
            flush()
        step, resumed = step + 1, False
        if profiler and step == profile_from + 10:
            profiler.stop()
            write_profile(profiler, out, device)
            profiler = None
    for number, handler in handlers.items():
        signal.signal(number, handler)

    # ----- the end: base against grown on the test splits, tables, export -----
    if never:
        base = grow.original(model)
    elif base is None:
        base = start_model(o).to(device)
    with autocast():
        args = o.block_size, o.batch_size, o.test_windows
        learned = ev.compare(base, model, learn["test"], *args)
        kept = ev.compare(base, model, retain["test"], *args) if retain else dict(base=None, grown=None, kl=None)
        use = ev.block_use(model, learn["test"], o.block_size)
    part = f"the first {o.test_windows} windows" if o.test_windows else "the whole split"
    log.write(
        "result", learn={"dataset": o.dataset, **learned}, retain={"dataset": retain_name, **kept},
        layers=model.config.n_layer, parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in grow.trainable(model)), flops=flops, best=best,
        tokens=step * o.batch_size * o.grad_accum * o.block_size, train_seconds=clock.seconds,
        seconds=elapsed + time.perf_counter() - began,
        block_use={str(g): u for g, u in zip(model.config.generation, use) if g},
        protocol=f"Protocol: test split, {part}, context {o.block_size}, stride {o.block_size}, mean over predicted tokens, "
                 f"{str(dtype)[6:]}.",
    )  # fmt: skip
    if rank == 0:
        run = ev.read_run(out)
        export(model, run, out / "model")
        say("\n" + ev.report(run))


def agree(number):
    """The same signal on every rank: the largest that any has received."""
    if not dist.is_initialized():
        return number
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    agreed = torch.tensor(number, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return int(agreed)


def export(model, run, folder):
    """model/: the network in Hugging Face's format and its card, complete or not there."""
    temporary = folder.with_name("model.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        (temporary / "README.md").write_text(ev.model_card(run))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as e:
        raise UserError(f"could not write {folder} ({e.strerror}): the run is safe in ckpt.pt, --resume writes it again") from e


def write_profile(profiler, out, device):
    profiler.export_chrome_trace(str(out / "trace.json"))
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=5))
    print(f"ten steps traced: open {out}/trace.json in chrome://tracing or ui.perfetto.dev")


def out_of_memory(e):
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)


def main(argv):
    o = parse(argv)
    data.set_cache_dir(o.cache_dir)
    world = int(os.environ.get("WORLD_SIZE", 1))
    check(o, world)
    if world > 1:
        cuda = o.device in ("auto", "cuda") and torch.cuda.is_available()
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        train(o)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        half = o.batch_size // 2
        advice = f"--batch_size={half} --grad_accum={2 * o.grad_accum}" if half else "a smaller --block_size"
        raise UserError(f"out of memory: go on with {advice}, which is the same global batch, and --resume=auto") from e
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    ev.run_main(main)
