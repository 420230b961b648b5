"""Train a GPT that grows: options, the loop, growth in the loop, checkpoint and resume.

    python train.py                 the card: GPT-2 124M on WikiText-2, 12 -> 15 layers in 2,000 steps
    python train.py demo            the same program on embedded text: no network, two minutes on a CPU
    python train.py best            the card's task with what the study (README) found best
    python train.py demo best --seed=2              presets first, then options
    python train.py demo --resume                   go on after any interruption
    torchrun --standalone --nproc_per_node=2 train.py demo      several processes, the same global batch

It writes RUN/metrics.jsonl (everything measured), ckpt.pt (to resume from), best.pt (lowest validation
loss) and model/ (the result in Hugging Face's format, with its card). Read model.py and grow.py first."""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import difflib
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
from model import GPT, GPTConfig, read_config

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
        -1, "none before this step (-1: grow_every, or any for a plateau; 0: originals never train)", -1
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
    words = argv[: next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))]
    given, unknown = option_parser().parse_known_args(argv[len(words) :])
    for word in words:
        if word not in PRESETS:
            raise UsageError(f"unknown preset {word!r}: give {', '.join(PRESETS)}, then --name=value ...")
    if unknown:
        names = [f.name for f in dataclasses.fields(Options)]
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


def option_parser():
    def words(values):
        return " ".join(f"--{k}={v}" for k, v in values.items()) or "the defaults"

    presets = "\n".join(f"  {name}: {words(values)}" for name, values in PRESETS.items())
    usage = "python train.py [card|demo|best ...] [--option=value ...]"
    parser = ev.Parser("train.py", usage=usage, description=f"{__doc__}\nPresets:\n{presets}")
    without_value = {"resume": {"nargs": "?", "const": "yes"}, "profile": {"nargs": "?", "const": 1}}
    for f in dataclasses.fields(Options):
        choices = ", ".join(f.metadata["allowed"]) if f.type is str else ""
        text = "; ".join(part for part in (f.metadata["help"], choices) if part) + f" [{f.default}]"
        more = {"type": f.type, "help": text, "metavar": "", **without_value.get(f.name, {})}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **more)
    return parser


def check(o, world=1):
    """Refuse options out of range and senseless combinations before anything is downloaded or computed."""
    check_ranges(o)
    check_machine(o, world)
    check_growth(o, check_network(o).n_layer)
    check_keeping(o)


def need(condition, sentence):
    if not condition:
        raise UsageError(sentence)


def check_ranges(o):
    for f in dataclasses.fields(o):
        value, allowed = getattr(o, f.name), f.metadata["allowed"]
        if f.type is str:
            need(not allowed or value in allowed, f"--{f.name}={value} is none of {', '.join(allowed)}")
        else:
            fits = math.isfinite(value) and value >= allowed[0]
            need(fits, f"--{f.name}={value} must be at least {allowed[0]}")
    need(o.kd_temperature > 0, "--kd_temperature must be above 0")
    need(o.dropout < 1 and o.replay < 1, "--dropout and --replay must be below 1")
    need(o.seed < 2**32, "--seed must be below 2**32")
    need(o.profile == 0 or o.max_steps >= 15, "--profile traces steps 5 to 15: give more --max_steps")


def check_machine(o, world):
    for name, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        there = o.device != name or backend.is_available()
        need(there, f"--device={name}, but torch sees none: use --device=auto")
    if o.device in ("auto", "cuda") and torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        need(here <= gpus, f"{here} processes for {gpus} GPUs: start fewer, or give --device=cpu")
    need(o.dropout == 0 or world == 1, "--dropout would differ between processes: use one, or --dropout=0")
    need(not o.pretrain_steps or 16 % world == 0, "--pretrain_steps needs 1, 2, 4, 8 or 16 processes")
    for name in batch_sizes(o):
        value = getattr(o, name)
        need(value % world == 0, f"--{name}={value} must be a multiple of the {world} processes")


def check_network(o):
    """The shape of the network to start from."""
    if o.init == "scratch":
        config = scratch_config(o)
        old = o.retain not in ("none", "auto")
        need(not o.pretrain_steps or old, "--pretrain_steps trains on the old text: name it with --retain")
    else:
        config = read_config(o.init)
        need(not o.pretrain_steps, "--pretrain_steps is for --init=scratch: other networks are pretrained")
    limit = config.block_size
    need(o.block_size <= limit, f"--block_size={o.block_size} is over the model's {limit}: lower it")
    data.tokenizer_name(config.vocab_size)
    for name in {o.dataset, o.retain} - {"auto", "none"}:
        data.check_name(name)
    named = o.dataset not in ("auto", "none")
    need(named, "--dataset must name a text: wikitext2, webtext, docs, code or a file")
    return config


def check_growth(o, L):
    top = o.freeze.removeprefix("top")
    is_top = o.freeze == f"top{top}" and top.isdecimal() and 0 < int(top) <= L
    known = o.freeze in ("base", "older", "none") or is_top
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


def check_keeping(o):
    weighs = not o.ewc_lambda or not originals_never_train(o)
    never = "with --first_growth=0 and a frozen base the originals never train"
    need(weighs, f"--ewc_lambda would weigh nothing: {never}; drop it")
    for name in ("ewc_lambda", "replay", *(["kd_weight"] if o.kd_on == "retain" else [])):
        need(not getattr(o, name) or o.retain != "none", f"--{name} needs old text: name it with --retain")
    need(not o.kd_weight or not o.dropout, "distillation shares blocks with its teacher: use --dropout=0")
    rows = o.batch_size * o.grad_accum
    some = not o.replay or 0 < round(o.replay * rows) < rows
    need(some, f"--replay={o.replay} of {rows} rows is none or all of them")


def batch_sizes(o):
    """Names of the options that say how many rows a micro-step has."""
    return ["batch_size", "kd_rows"] if o.kd_weight and o.kd_on != "train" else ["batch_size"]


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
        kind = next((name for name, backend in backends if backend.is_available()), "cpu")
        why = "the fastest that torch sees"
    else:
        kind, why = o.device, "asked for"
    index = int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None
    device = torch.device(kind, index)
    reasons = [f"device {device}: {why}"]

    capable = torch.cpu.get_capabilities()
    native_on_cpu = any(capable.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # x86, x86, ARM
    if o.dtype != "auto":
        dtype, why = getattr(torch, o.dtype), "asked for"
    elif (kind == "cuda" and torch.cuda.is_bf16_supported(False)) or (kind == "cpu" and native_on_cpu):
        dtype, why = torch.bfloat16, "native here"
    elif kind == "mps":
        dtype, why = torch.float32, "autocast is not used on mps"
    else:
        dtype, why = torch.float16 if kind == "cuda" else torch.float32, "no native bfloat16"
    reasons.append(f"dtype {str(dtype)[6:]}: {why}")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32

    use = o.compile == "1" or (o.compile == "auto" and kind == "cuda")
    why = "asked for" if o.compile != "auto" else "worth it on CUDA" if use else "by default only on CUDA"
    if use:
        # Past its limit of graphs torch would go on eagerly with no more than a log line. Let it raise.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.optimize_ddp = False  # it would cut blocks in two; blocks are small enough
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        except Exception as e:  # no C++ compiler, no Triton ...: whatever it is, eager works
            use, why = False, f"impossible here ({type(e).__name__}), so eagerly"
    reasons.append(f"compile {int(use)}: {why}")
    return device, dtype, use, reasons


def keep_freed_memory():
    """On a CPU: let glibc keep what a step frees, for the next step asks for the same sizes again.

    By default it gives large pieces back, and the system zeroes and maps them anew page by page, which can
    take half of an eager step. (mallopt(3); other allocators are left alone.)
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)  # give nothing back,
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)  # and take nothing that would have to be given back


# ------------------------------------------------------------------------------------------------------------
# The optimizer


def make_optimizer(model, o, previous=None):
    """AdamW over what trains now; matrices and embeddings decay. It takes over the state of `previous`."""
    params = grow.trainable(model)
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    if previous is not None:
        grow.carry_over(previous, optimizer)
    return optimizer


def learning_rate(o, step):
    lr = o.lr * min(1.0, (step + 1) / (o.warmup_steps + 1))
    return lr * 0.5 * (1 + math.cos(math.pi * step / o.max_steps)) if o.lr_schedule == "cosine" else lr


# ------------------------------------------------------------------------------------------------------------
# Speed and cost of the objective (grow.Objective)


def compile_parts(objective):
    """Compile each block, and the final norm with head and loss: two functions, whatever the depth.

    Blocks that do the same work share one graph, of which their parameters are inputs; a compiled whole
    network would be compiled anew at every growth.
    """
    model, teacher = objective.model, objective.teacher
    for block in {*model.h, *(teacher.h if teacher else ())}:
        block.compile(dynamic=False)
    model.token_loss = torch.compile(model.token_loss, dynamic=False)  # for evaluation
    objective.losses = torch.compile(objective.losses, dynamic=False)


def count_flops(objective, x, y):
    """Floating-point operations of a micro-batch, forward and backward, as things are frozen now.

    torch counts them on one row of each kind; every row costs the same.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def of_rows(rows):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(objective(rows, y[:1])[0], grow.trainable(objective.model))
        return counter.get_total_flops()

    # Eagerly, and with plain matrix products for attention: the counter does not know every fused kernel.
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        if len(x) == len(y):
            flops = len(y) * of_rows(x[:1])
        else:
            one, two = of_rows(x[[0, -1]]), of_rows(x[[0, -1, -1]])  # a learned row, and one or two distilled
            flops = len(y) * (2 * one - two) + (len(x) - len(y)) * (two - one)
    return flops


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and log

CHECKPOINT_VERSION = 2
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
        raise UserError(f"cannot write {path} ({reason}): the one before is intact, use --resume") from e


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
            found = value.get("version")
            raise ValueError(f"format version {found!r}, this program reads {CHECKPOINT_VERSION}")
        return value
    except DAMAGE as e:
        raise UserError(f"{path}: damaged ({(str(e) or type(e).__name__).splitlines()[0]})") from e


class Log:
    """metrics.jsonl. A checkpoint holds its length; resuming cuts it there, so no row is lost or doubled."""

    def __init__(self, path, length, writes):
        self.file, self.writes = open(path if writes else os.devnull, "ab"), writes
        if writes and self.file.tell() < length:
            raise UserError(f"{path} is shorter than when the checkpoint was made: restore it, or start anew")
        if writes:
            self.file.truncate(length)

    def write(self, kind, **row):
        self.file.write(json.dumps({"kind": kind, **row}).encode() + b"\n")
        self.file.flush()

    def length(self):
        if not self.writes:
            return 0
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)


def find_checkpoint(o):
    """The checkpoint to go on from, or None for a new run. Refuses a folder that does not fit --resume."""
    out = Path(o.out)
    saved, log, model = ((out / name).exists() for name in ("ckpt.pt", "metrics.jsonl", "model"))
    if o.resume == "no":
        need(not saved and not log, f"{out} holds a run: continue it with --resume, or give another --out")
        return None
    if o.resume == "yes":
        need(log, f"nothing to resume in {out}: leave --resume out, or name the run's folder with --out")
    if not saved:
        need(not model, f"{out} holds a finished run without its ckpt.pt: give another --out")
        return None
    checkpoint = load_checkpoint(out / "ckpt.pt")
    compare_options(o, checkpoint["options"])
    return checkpoint


def check_same_start(o, saved):
    """Refuse processes that would start from different steps, as on several nodes with a disk each."""
    if dist.is_initialized():
        steps = [None] * dist.get_world_size()
        dist.all_gather_object(steps, saved and saved["step"])
        one = len(set(steps)) == 1
        need(one, f"not all processes see the same {o.out}: put it on a disk that all nodes share")


def prepare_folder(o, parameters):
    """Make the run folder, and find out before training whether it can be written and is large enough."""
    out = Path(o.out)
    size = 8 * 4 * parameters  # two checkpoints of weights and two moments each, the best, the export
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        free = shutil.disk_usage(out).free
    except OSError as e:
        raise UserError(f"cannot write to the run folder {out} ({e.strerror}): use another --out") from e
    if free < size:
        has = f"{out} has {free / 1e9:.1f} GB free"
        raise UserError(f"{has}, a run may need {size / 1e9:.1f}: make room, or use another --out")


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
        has = ", ".join(different)
        raise UsageError(f"the run in {o.out} has {has}: resume with those, or give another --out")
    cosine = o.lr_schedule == "cosine"
    if o.max_steps < stored["max_steps"] or (cosine and o.max_steps != stored["max_steps"]):
        more = "" if cosine else " or more"
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
        bad_utf8=o.bad_utf8, device=o.device, dtype="float32", compile=o.compile,
    )  # fmt: skip
    text = data.load(p.dataset, scratch_config(p).vocab_size, p.block_size, p.bad_utf8)["train"]
    key = [hashlib.sha256(text.tobytes()).hexdigest(), p.max_steps]  # made from another text, it is another
    key += [v for k, v in asdict(p).items() if k not in HARMLESS]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    folder = data.cache_dir() / "pretrained" / f"{Path(o.retain).stem}-{o.n_layer}x{o.n_embd}-{digest}"
    with data.lock(folder) if not dist.is_initialized() else contextlib.nullcontext():
        if not (folder / "model").exists():
            said = f"pretraining on {o.retain} for {o.pretrain_steps} steps, once, into {folder}"
            print(said, file=sys.stderr)
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

    def is_there():
        with contextlib.suppress(FileNotFoundError, ValueError):
            return data.read_bin(path, source, tokenizer) is not None

    if (not dist.is_initialized() or dist.get_rank() == 0) and not is_there():
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


# ------------------------------------------------------------------------------------------------------------
# Texts and batches


def load_retained(o, vocab_size):
    """(splits or None, name). Under --retain=auto a text that cannot be had is done without, and said."""
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
    return list(zip(data.to_device(x, device), data.to_device(y, device)))


# ------------------------------------------------------------------------------------------------------------
# The run


class Clock:
    """Seconds spent training: it stands while the run evaluates, grows and saves."""

    def __init__(self, device, seconds):
        self.device, self.seconds, self.since = device, seconds, None

    def go(self):
        self.since = self.since or time.perf_counter()

    def stop(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.device.type == "mps":
            torch.mps.synchronize()
        if self.since:
            self.seconds += time.perf_counter() - self.since
        self.since = None


def count(parameters):
    return sum(p.numel() for p in parameters)


class Run:
    """What the loop (`train`, below) has at hand and does: measure, grow, step, log, save."""

    def __init__(self, o):
        self.o, self.out, self.began = o, Path(o.out), time.perf_counter()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        saved = find_checkpoint(o)
        self.device, self.dtype, self.compiles, self.machine = choose_machine(o)
        check_same_start(o, saved)
        if self.device.type == "cpu":
            keep_freed_memory()
        base = start_model(o)
        self.identity, self.base_layers = fingerprint(base), base.config.n_layer
        size = count(base.parameters())
        if saved and saved["init"] != self.identity:
            raise UserError(f"{o.out} was started from other weights than {o.init} holds now: restore those")
        self.learn = data.load(o.dataset, base.config.vocab_size, o.block_size, o.bad_utf8)
        self.retain, self.retain_name = load_retained(o, base.config.vocab_size)
        if self.rank == 0:
            prepare_folder(o, size)
        self.prepare_networks(base.to(self.device), saved)
        self.prepare_training(saved)
        self.log = Log(self.out / "metrics.jsonl", saved["log_bytes"] if saved else 0, self.rank == 0)
        self.introduce(size, saved)
        self.resumed = saved is not None

    def say(self, *lines):
        if self.rank == 0:
            print(*lines, sep="\n", flush=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batches(self, step):
        texts = self.learn, self.retain, self.dreams
        return micro_batches(self.o, *texts, step, self.device, self.rank, self.world)

    # ----- setting up -----

    def prepare_networks(self, base, saved):
        """The growing network, and what keeps the old: EWC's anchor, dreams, the teacher."""
        o, self.ewc, self.dreams, self.teacher = self.o, None, None, None
        if o.ewc_lambda:
            text, steps = self.retain["train"], range(o.ewc_batches)
            rows = (data.batch(text, o.block_size, 8, i, o.seed)[0].to(self.device) for i in steps)
            self.ewc = grow.EWC(base, rows, torch.Generator(self.device).manual_seed(o.seed))
        if o.kd_weight and o.kd_on == "dream":
            self.dreams = dream(base, o, self.device, self.identity)
        self.shared = originals_never_train(o)  # the pretrained network stays alive inside the growing one
        if saved:
            self.model = GPT(GPTConfig(**saved["model_config"])).to(self.device)
            self.model.load_state_dict(saved["model"])
        else:
            self.model = copy.deepcopy(base) if o.kd_weight and not self.shared else base
        if o.kd_weight:
            self.teacher = grow.original(self.model) if self.shared else base.requires_grad_(False)
        if o.freeze.startswith("top") or any(self.model.config.generation):
            grow.freeze(self.model, o.freeze)
        self.model.train()

    def prepare_training(self, saved):
        """Objective, optimizer, trigger and counters, as they were where a checkpoint was made."""
        o = self.o
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.objective = grow.Objective(self.model, self.teacher, self.shared, o.kd_weight, o.kd_temperature)
        if self.compiles:
            compile_parts(self.objective)
        self.rewire()
        plateau = grow.Plateau(o.patience, o.min_delta)
        schedule = grow.Schedule(o.grow_every, first_growth(o))
        self.trigger = schedule if o.trigger == "schedule" else plateau
        self.step, self.flops, self.seconds, train_seconds = 0, 0, 0.0, 0.0
        self.best, self.best_state = math.inf, None  # lowest validation loss; its weights, until saved
        if saved:
            self.step, self.flops, self.seconds = saved["step"], saved["flops"], saved["seconds"]
            self.best, train_seconds = saved["best"], saved["train_seconds"]
            grow.load_optimizer_state(self.model, self.optimizer, saved["optimizer"])
            if saved["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(saved["scaler"])
            vars(self.trigger).update(saved["trigger"])
        self.clock, self.reported = Clock(self.device, train_seconds), train_seconds
        self.pending = []  # losses still on the device: fetched per log line, not per step

    def rewire(self, previous=None):
        """Optimizer, DDP and cost for what trains now. DDP fixes its parameters when built: build it anew."""
        self.optimizer = make_optimizer(self.model, self.o, previous)
        self.wrapped = DistributedDataParallel(self.objective) if self.world > 1 else self.objective
        micro_step = count_flops(self.objective, *self.batches(0)[0])
        self.step_flops = self.world * self.o.grad_accum * micro_step

    def introduce(self, size, saved):
        o, domains = self.o, {"learn": self.learn, "retain": self.retain or {}}
        tokens = {name: {k: len(v) for k, v in splits.items()} for name, splits in domains.items()}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        if not saved:
            self.log.write(
                "header", command=shlex.join(["python", "train.py", *sys.argv[1:]]), config=asdict(o),
                versions=versions, machine=self.machine, processes=self.world, init_sha256=self.identity,
                layers=self.base_layers, parameters=size, tokens=tokens,
                vocab_size=self.model.config.vocab_size,
            )  # fmt: skip
        self.say(" ".join(f"--{k}={v}" for k, v in asdict(o).items()), *self.machine)
        self.say(f"{self.base_layers} layers, {size:,} parameters; learn {o.dataset}, "
                 f"{tokens['learn']['train']:,} training tokens; retain {self.retain_name}; "
                 f"torch {torch.__version__}")  # fmt: skip
        if saved:
            self.say(f"resumed at step {self.step} with {self.model.config.n_layer} layers")

    # ----- measuring and growing -----

    def tokens(self):
        return self.step * self.o.batch_size * self.o.grad_accum * self.o.block_size

    def sizes(self):
        return dict(parameters=count(self.model.parameters()), trainable=count(grow.trainable(self.model)))

    def eval_rows(self):
        """Windows at a time in evaluations: the few rows of a training step would leave a GPU idle."""
        at_least = 4096 // self.o.block_size if self.device.type == "cuda" else 1
        return max(self.o.batch_size, at_least)

    def measure(self):
        """Validation loss on both domains, in nats per token."""
        args, loss = (self.o.block_size, self.eval_rows(), self.o.eval_windows), {}
        with self.autocast():
            for name, splits in (("learn", self.learn), ("retain", self.retain)):
                loss[name] = splits and ev.evaluate(self.model, splits["val"], *args)
        return loss

    def validate(self):
        """Measure, log, and keep the weights if none before were better."""
        self.log_losses()
        loss = self.measure()
        self.log.write("eval", step=self.step, **loss)
        said = ", ".join(f"{k} {v:.4f}" for k, v in loss.items() if v)
        self.say(f"step {self.step}/{self.o.max_steps} validation: {said}")
        if loss["learn"] < self.best:
            self.best = loss["learn"]
            self.best_state = copy.deepcopy(self.state()) if self.rank == 0 else None
        return loss

    def may_grow(self):
        return len(set(self.model.config.generation) - {0}) < self.o.max_growths

    def growth_is_scheduled(self):
        return self.may_grow() and self.o.trigger == "schedule" and self.trigger.fires(self.step)

    def wants_to_grow(self, loss):
        """Asked once at every evaluation: a plateau counts them."""
        fires = self.trigger.fires(self.step, loss) and self.step >= self.o.first_growth
        return self.may_grow() and (fires or self.step == self.o.first_growth == 0)

    @torch.no_grad()
    def logits(self):
        """Of the first evaluation batch, whose shape the compiler knows."""
        rows = self.eval_rows()
        _, x, _ = next(ev.window_batches(self.learn["val"], self.o.block_size, rows, rows))
        self.model.eval()
        with self.autocast():
            result = self.model(x.to(self.device))[0]
        self.model.train()
        return result

    def grow_block(self, before):
        """One growth. The logits on a real batch must be bitwise what they were, or the run stops."""
        o, model, layers = self.o, self.model, self.model.config.n_layer
        at = grow.placement(o.where, model.config.generation, o.max_growths)
        expected = self.logits()
        self.seed()  # for block_init=fresh
        block = grow.insert_block(model, at, o.block_init)
        if self.compiles:
            block.compile(dynamic=False)
        grow.freeze(model, o.freeze)
        if not torch.equal(expected, self.logits()):
            raise RuntimeError(f"the growth at step {self.step} changed the logits: it must be the identity")
        after, added = self.measure(), count(block.parameters())
        self.log.write(
            "event", step=self.step, at=at, layers_before=layers, layers_after=layers + 1, identical=True,
            parameters_added=added, **self.sizes(), flops=self.flops, tokens=self.tokens(),
            **{f"{k}_before": v for k, v in before.items()}, **{f"{k}_after": v for k, v in after.items()},
        )  # fmt: skip
        self.say(
            f"step {self.step}: grew {layers} -> {layers + 1} layers at index {at}, +{added:,} parameters, "
            f"logits bitwise equal, validation loss {before['learn']:.4f} -> {after['learn']:.4f}"
        )
        self.rewire(self.optimizer)

    # ----- training -----

    def seed(self):
        """Whatever is random, dropout too, depends on (seed, step) only."""
        torch.manual_seed(self.o.seed * 1_000_003 + self.step)

    def train_step(self):
        o = self.o
        self.clock.go()
        self.seed()
        lr = learning_rate(o, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = torch.zeros(4, device=self.device)  # next token, distillation, EWC, gradient norm
        for i, (x, y) in enumerate(self.batches(self.step)):
            last = i == o.grad_accum - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.wrapped.no_sync():
                with self.autocast():
                    parts = self.wrapped(x, y) / o.grad_accum
                loss = parts[0]
                losses[:2] += parts[1:].detach()
                if self.ewc and last:
                    penalty = self.ewc.penalty(self.model)
                    loss = loss + o.ewc_lambda * penalty
                    losses[2] = penalty.detach()
                self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        losses[3] = nn.utils.clip_grad_norm_(grow.trainable(self.model), o.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending.append((self.step, lr, losses))
        self.step, self.flops = self.step + 1, self.flops + self.step_flops

    def log_losses(self):
        """Fetch the pending losses, stop the run if one is not finite, and log the last."""
        self.clock.stop()
        if not self.pending:
            return
        losses = torch.stack([losses for *_, losses in self.pending])  # (steps, 4)
        if self.world > 1:
            dist.all_reduce(losses)
            losses /= self.world
        ms = 1000 * (self.clock.seconds - self.reported) / len(self.pending)
        for (step, lr, _), row in zip(self.pending, losses.tolist()):
            self.refuse_non_finite(step, *row)
            if step % self.o.log_every == 0:
                self.log_step(step, lr, ms, *row)
        self.pending, self.reported = [], self.clock.seconds

    def refuse_non_finite(self, step, nll, kd, penalty, norm):
        """(A loss scaler makes infinite gradients on purpose, and skips those steps.)"""
        if not math.isfinite(nll + kd + penalty) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            self.save_best()
            raise UserError(
                f"loss {nll}, gradient norm {norm} at step {step}: the run stops. {self.out}/ckpt.pt, if "
                "there is one, is from before; try a lower --lr or more --warmup_steps in a new run, or "
                "--resume with --dtype=float32"
            )

    def log_step(self, step, lr, ms, nll, kd, penalty, norm):
        o = self.o
        self.log.write("step", step=step, loss=nll, kd=kd, ewc=penalty, lr=lr, norm=norm, ms=ms)
        terms = (f" kd {kd:.4f}" if self.teacher else "") + (f" ewc {penalty:.2e}" if self.ewc else "")
        speed = o.batch_size * o.grad_accum * o.block_size / ms * 1000
        trains = count(grow.trainable(self.model)) / 1e6
        self.say(f"step {step}/{o.max_steps} loss {nll:.4f}{terms} lr {lr:.1e} norm {norm:.2f} {ms:.0f} ms "
                 f"{speed:,.0f} tok/s depth {self.model.config.n_layer} trainable {trains:.1f}M")  # fmt: skip

    # ----- saving, and the end -----

    def save_best(self):
        if self.best_state:
            save_atomically(self.out / "best.pt", self.best_state)
            self.best_state = None

    def state(self):
        """What best.pt holds, and ckpt.pt among other things."""
        weights = {"model": self.model.state_dict(), "model_config": asdict(self.model.config)}
        return {"step": self.step, "best": self.best, **weights}

    def save(self):
        """Only the first process writes."""
        self.log_losses()
        self.save_best()
        if self.rank == 0:
            save_atomically(self.out / "ckpt.pt", {
                **self.state(), "options": asdict(self.o), "init": self.identity, "flops": self.flops,
                "optimizer": grow.optimizer_state(self.model, self.optimizer),
                "scaler": self.scaler.state_dict(), "trigger": vars(self.trigger),
                "train_seconds": self.clock.seconds, "log_bytes": self.log.length(),
                "seconds": self.seconds + time.perf_counter() - self.began,
            })  # fmt: skip

    def pretrained(self):
        """The network that the run started from: still in memory, or loaded again."""
        if self.shared:
            return grow.original(self.model)
        if self.teacher:
            return self.teacher
        base = start_model(self.o)
        if fingerprint(base) != self.identity:
            raise UserError(f"{self.o.init} has changed since the run started: restore it and --resume")
        for block in base.h if self.compiles else ():
            block.compile(dynamic=False)  # as the grown network's: the same graph, the same rounding
        return base.to(self.device)

    def finish(self):
        """Base against grown on the test splits, export, tables."""
        o, base = self.o, self.pretrained()
        args = o.block_size, self.eval_rows(), o.test_windows
        with self.autocast():
            learned = ev.compare(base, self.model, self.learn["test"], *args)
            kept = self.retain and ev.compare(base, self.model, self.retain["test"], *args)
            use = ev.block_use(self.model, self.learn["test"], o.block_size)
        part = f"first {o.test_windows} windows" if o.test_windows else "whole split"
        windows = f"{part}, context {o.block_size}, stride {o.block_size}"
        self.log.write(
            "result", layers=self.model.config.n_layer, **self.sizes(),
            learn={"dataset": o.dataset, **learned},
            retain={"dataset": self.retain_name, **(kept or dict(base=None, grown=None, kl=None))},
            flops=self.flops, tokens=self.tokens(), best=self.best, train_seconds=self.clock.seconds,
            seconds=self.seconds + time.perf_counter() - self.began,
            block_use={str(g): u for g, u in zip(self.model.config.generation, use) if g > 0},
            protocol=f"Test split, {windows}, mean over predicted tokens, {str(self.dtype)[6:]}.",
        )  # fmt: skip
        if self.rank == 0:
            run = ev.read_run(self.out)
            export(self.model, run, self.out / "model")
            self.say("\n" + ev.report(run))


def train(o):
    """Run `o` to its end, or to where a signal stops it."""
    run = Run(o)
    resumed = run.resumed  # what was due at this step was done before it was saved
    with noted_signals() as signals, profile(run) as profiler:
        while True:  # once more than max_steps, so that the last step is measured
            last = run.step == o.max_steps
            if not resumed and (last or run.step % o.eval_every == 0 or run.growth_is_scheduled()):
                loss = run.validate()
                if run.wants_to_grow(loss["learn"]):
                    run.grow_block(loss)
            stopped_by = agree(signals) if run.world == 1 or run.step % o.log_every == 0 else 0
            if last or stopped_by or (run.step and run.step % o.save_every == 0 and not resumed):
                run.save()
            if stopped_by:
                run.say(f"stopped at step {run.step}, saved in {o.out}: --resume continues it")
                sys.exit(128 + stopped_by)
            if last:
                break
            run.train_step()
            if (run.step - 1) % o.log_every == 0:
                run.log_losses()
            if profiler:
                profiler.step()
            resumed = False
    run.finish()


@contextlib.contextmanager
def noted_signals():
    """A list to which SIGINT and SIGTERM are appended, for the loop to stop in order; a second one exits."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(signals):
    """The signal to stop for, or 0: the same on every rank, the largest that any has received."""
    number = max(signals, default=0)
    if not dist.is_initialized():
        return number
    agreed = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return int(agreed)


def profile(run):
    """With --profile: ten steps of the run as a Chrome trace, and the five largest kernels on the screen."""
    if not run.o.profile or run.rank:
        return contextlib.nullcontext()

    def write(profiler):
        profiler.export_chrome_trace(str(run.out / "trace.json"))
        cuda = run.device.type == "cuda"  # kernels are events of the device, and what launched them is not
        events = [e for e in profiler.key_averages() if (e.device_type.name == "CUDA") == cuda]
        events = [e for e in events if not e.is_user_annotation and not e.key.startswith("ProfilerStep")]
        ms = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1000 for e in events}
        largest = sorted(ms, key=ms.get, reverse=True)[:5]
        rows = [[key, f"{ms[key]:.1f}", f"{ms[key] / sum(ms.values()):.1%}"] for key in largest]
        print(ev.markdown(["kernel", "ms in ten steps", "share"], rows))
        print(f"ten steps traced: open {run.out}/trace.json in chrome://tracing or ui.perfetto.dev")

    ten = torch.profiler.schedule(wait=4, warmup=1, active=10, repeat=1)
    return torch.profiler.profile(schedule=ten, on_trace_ready=write)


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
        raise UserError(f"cannot write {folder} ({e.strerror}): the run is safe, --resume redoes it") from e


def smaller_batch(o, world):
    """The same global batch in more, smaller micro-steps."""
    sizes = batch_sizes(o)
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
        # torch chooses kernels by timing and keeps the choice on the disk. Each rank has its own: another
        # rank's, found after a growth, may round differently. (Read when torch._dynamo is first imported.)
        kernels = data.cache_dir() / f"kernels-{os.environ['RANK']}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
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
