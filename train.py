"""Train a GPT that grows. Read model.py and grow.py first, then `train` below: one function, one loop.

    python train.py                 the card: GPT-2 124M on WikiText-2, 12 -> 15 layers in 2,000 steps
    python train.py demo            the same program on embedded text: no network, two minutes on a CPU
    python train.py keep            the card's task; the network it started from stays inside
    python train.py replay          the same, with old text at hand: a quarter of each batch is replayed
    python train.py demo replay --seed=2            presets first, then options
    python train.py demo --resume                   go on after any interruption
    torchrun --standalone --nproc_per_node=2 train.py demo      several processes, the same global batch

"The card" is the model card "Growing LLM", whose recipe the defaults are. A run writes RUN/metrics.jsonl
(everything measured), RUN/ckpt.pt (to resume from) and RUN/model/ (the result in Hugging Face's format)."""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import hashlib
import itertools
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
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

# ----- Options -----


def option(default, help, *allowed, below=math.inf):
    """An option of the command line. `allowed`: the least value of a number, or all values of a string."""
    return field(default=default, metadata={"help": help, "allowed": allowed, "below": below})


@dataclass
class Options:
    # the network and its two texts
    init: str = option("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder with weights, or scratch")
    dataset: str = option("wikitext2", "new text: wikitext2, webtext, docs, code, headers, a file, a folder")
    retain: str = option("webtext", "old text, on which forgetting is measured: the same, or none")
    block_size: int = option(128, "context, in tokens", 2)
    n_layer: int = option(12, "with --init=scratch: blocks", 1)
    n_head: int = option(12, "with --init=scratch: heads", 1)
    n_embd: int = option(768, "with --init=scratch: channels", 1)
    tokenizer: str = option("gpt2", "with --init=scratch", "gpt2", "bytes")
    # optimisation
    max_steps: int = option(2000, "optimizer steps", 1)
    batch_size: int = option(8, "rows per micro-step, over all processes together", 1)
    grad_accum: int = option(1, "micro-steps per optimizer step", 1)
    lr: float = option(5e-5, "learning rate of AdamW", 1e-12)
    lr_schedule: str = option("constant", "constant, or cosine to 0 at max_steps", "constant", "cosine")
    warmup_steps: int = option(0, "steps of linear warm-up", 0)
    weight_decay: float = option(0.01, "of matrices and embeddings", 0)
    grad_clip: float = option(1.0, "largest gradient norm (0: no clipping)", 0)
    dropout: float = option(0.0, "probability", 0, below=1)
    seed: int = option(0, "of batches, fresh blocks, dropout and sampled labels", 0, below=2**32)
    # growth
    trigger: str = option("schedule", "what decides to grow", "schedule", "plateau")
    grow_every: int = option(500, "schedule: steps between growths", 1)
    first_growth: int = option(-1, "none before this step (-1: no limit; 0: at once, so originals stay)", -1)
    max_growths: int = option(3, "growths at most (0: an ordinary training run)", 0)
    where: str = option("upper", "spread, upper (spread over the upper half), top, bottom, or an index")
    block_init: str = option("copy", "a copy of the block below, or fresh weights", "copy", "fresh")
    freeze: str = option("base", "from the first growth on: base, older, none; topN: only N top blocks train")
    patience: int = option(300, "plateau: steps without improvement", 1)
    min_delta: float = option(0.01, "plateau: what counts as an improvement, in nats", 0)
    # keeping the old
    kd_weight: float = option(0.0, "weight of distillation from the pretrained network", 0)
    kd_temperature: float = option(2.0, "its temperature", 0.01)
    kd_on: str = option("train", "the batch, old text, or dreamt text", "train", "retain", "dream")
    kd_rows: int = option(4, "rows of old or dreamt text beside each micro-step's batch", 1)
    dreams: int = option(2048, "rows sampled once from the pretrained network", 1)
    ewc_lambda: float = option(0.0, "weight of elastic weight consolidation", 0)
    ewc_batches: int = option(32, "batches of 8 rows of old text for its Fisher information", 1)
    replay: float = option(0.0, "fraction of each batch's rows drawn from the old text", 0, below=1)
    # measuring and saving
    eval_every: int = option(100, "steps between evaluations", 1)
    eval_windows: int = option(64, "windows of the validation split in each (0: all)", 0)
    test_windows: int = option(2500, "windows of each test split at the end (0: all)", 0)
    log_every: int = option(10, "steps between log lines", 1)
    save_every: int = option(500, "steps between checkpoints; one more at the end and on Ctrl-C", 1)
    out: str = option("", "run folder (empty: out/PRESET and the options given)")
    resume: str = option("no", "yes, or no value: go on; auto: if there is a run", "no", "yes", "auto")
    # the machine
    device: str = option("auto", "", "auto", "cpu", "cuda", "mps")
    dtype: str = option("auto", "what autocast computes in", "auto", "float32", "bfloat16", "float16")
    compile: str = option("auto", "auto: on CUDA", "auto", "0", "1")
    cache_dir: str = option("", "downloads and tokens (empty: ~/.cache/growing-gpt)")

    presets, typed = (), {}  # what the command line gave: words, and options beyond them

    @property
    def starts_growing(self):
        """No growth before this step."""
        if self.first_growth >= 0:
            return self.first_growth
        return self.grow_every if self.trigger == "schedule" else 0

    @property
    def originals_never_train(self):
        return self.max_growths > 0 and self.first_growth == 0 and self.freeze in ("base", "older")

    @property
    def distilled(self):
        """Rows of old or dreamt text beside each micro-step's batch."""
        return self.kd_rows if self.kd_weight and self.kd_on != "train" else 0


PRETRAINED = "out/pretrained"  # the demo starts from the network that the preset `pretrain` leaves here
# fmt: off
PRESETS = {
    "card": {},
    "pretrain": dict(
        init="scratch", tokenizer="bytes", n_layer=2, n_head=4, n_embd=64, dataset="docs", retain="none",
        batch_size=16, max_steps=2500, max_growths=0, lr=8e-3, lr_schedule="cosine", warmup_steps=60,
        weight_decay=0.1, eval_every=250, log_every=100, save_every=250, test_windows=64, dtype="float32",
        out=PRETRAINED,
    ),
    "demo": dict(
        init=f"{PRETRAINED}/model", dataset="code", retain="docs", batch_size=16, max_steps=600, lr=3e-3,
        first_growth=0, grow_every=150, max_growths=3, eval_every=50, log_every=25, save_every=150,
        eval_windows=100, test_windows=400, dtype="float32",
    ),
    "keep": dict(first_growth=0),
    "replay": dict(first_growth=0, replay=0.25),
}
# What may differ when a run is resumed, and names no folder of its own: it changes at most the rounding of
# what is computed. (More max_steps prolong the run, and a GPU draws other dropout and EWC labels than a CPU.)
MAY_CHANGE = {"out", "resume", "device", "dtype", "compile", "log_every", "save_every", "cache_dir",
              "max_steps"}
# fmt: on


def parse(argv):
    """Command line -> Options: presets, then options. Raises UsageError, one sentence."""
    words, fields = list(itertools.takewhile(PRESETS.__contains__, argv)), dataclasses.fields(Options)
    presets = "\n".join(f"  {name}: {ev.as_typed(v) or 'the defaults'}" for name, v in PRESETS.items())
    p = ev.Parser("train.py", usage="python train.py [preset ...] [--option=value ...]", description=__doc__)
    p.epilog = f"presets:\n{presets}"
    for f in fields:
        choices = f" ({', '.join(f.metadata['allowed'])})" if f.type is str and f.metadata["allowed"] else ""
        alone = {"nargs": "?", "const": "yes"} if f.name == "resume" else {}  # --resume alone means yes
        help = f"{f.metadata['help']}{choices} [{f.default}]"
        p.add_argument(f"--{f.name}", type=f.type, help=help, metavar="", default=argparse.SUPPRESS, **alone)
    typed, unknown = p.parse_known_args(argv[len(words) :])
    if unknown:
        known = {name: name for name in PRESETS} | {f.name: f"--{f.name}" for f in fields}
        near = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], known, 1)
        hint = f"did you mean {known[near[0]]}? " if near and known[near[0]] != unknown[0] else ""
        p.error(f"unknown word {unknown[0]!r}: {hint}presets come first, then --option=value")
    values, typed = {}, vars(typed)
    for word in words:
        values |= PRESETS[word]
    # Options that decide what is computed name the folder. That of a preset is for the preset alone.
    differs = "".join(f"-{name}={v}" for name, v in typed.items() if name not in MAY_CHANGE)
    if len(words) > 1 or differs or typed.keys() & {"dtype", "max_steps"}:
        values.pop("out", None)
    values |= typed
    if not values.get("out"):
        name = "-".join(words or ["card"]) + re.sub(r"[^\w.=-]", "_", differs)
        digest = hashlib.sha256(differs.encode()).hexdigest()[:8]
        values["out"] = "out/" + (name if len(name) <= 120 else f"{name[:100]}-{digest}")
    o = Options(**values)
    o.presets, o.typed = words, typed
    return o


def need(condition, sentence):
    if not condition:
        raise UsageError(sentence)


def check(o, world=1):
    """Refuse options out of range and senseless combinations before anything is downloaded or computed."""
    for f in dataclasses.fields(o):
        value, allowed, below = getattr(o, f.name), f.metadata["allowed"], f.metadata["below"]
        if f.type is str:
            need(not allowed or value in allowed, f"--{f.name}={value} is none of {', '.join(allowed)}")
        else:
            bounds = f"at least {allowed[0]}" + (f" and below {below}" if below < math.inf else "")
            need(allowed[0] <= value < below, f"--{f.name}={value} must be {bounds}")
    for name in {o.dataset, o.retain} - {"none"}:
        data.check_name(name)
    for name, rows in {"batch_size": o.batch_size, "kd_rows": o.distilled}.items():
        need(rows % world == 0, f"--{name}={rows} must be a multiple of the {world} processes")
    rows, grows, on_old = o.batch_size * o.grad_accum, o.max_growths > 0, o.kd_weight and o.kd_on == "retain"
    nearest = min(max(round(o.replay * rows), 1), rows - 1)
    later = o.max_growths > 1 or o.first_growth != 0  # a growth behind step 0
    # fmt: off
    refused = {
        "--dataset must name a text: wikitext2, webtext, docs, code, headers or a file": o.dataset == "none",
        "--dropout would differ between processes: use one, or --dropout=0": o.dropout and world > 1,
        "distillation shares blocks with its teacher: use --dropout=0": o.dropout and o.kd_weight,
        "--ewc_lambda, --replay and --kd_on=retain need old text: name it with --retain":
            o.retain == "none" and (o.ewc_lambda or o.replay or on_old),
        f"--replay={o.replay} of {rows} rows is not a whole number of rows: give --replay={nearest / rows:g}":
            o.replay and not math.isclose(o.replay * rows, nearest, rel_tol=1e-5),  # six digits are said
        f"--retain={o.retain} is --dataset, too: what is learned is not old text": o.retain == o.dataset,
        "--ewc_lambda would weigh nothing: with --first_growth=0 the originals never train":
            o.ewc_lambda and o.originals_never_train,
        f"the first growth is due at step {o.starts_growing}, at or after --max_steps={o.max_steps}: lower "
        "--grow_every or --first_growth, or give --max_growths=0": grows and o.starts_growing >= o.max_steps,
        "a plateau needs evaluations within its patience and steps beyond it: --eval_every <= --patience < "
        "--max_steps": grows and later and o.trigger == "plateau"
            and not o.eval_every <= o.patience < o.max_steps,
    }
    # fmt: on
    for sentence, is_so in refused.items():
        need(not is_so, sentence)
    useful = {  # options that do nothing without another
        "--init=scratch": ("n_layer n_head n_embd tokenizer", o.init == "scratch"),
        "--max_growths of 1 or more": ("trigger grow_every first_growth where block_init", grows),
        "--trigger=schedule": ("grow_every", o.trigger == "schedule"),
        "--trigger=plateau": ("patience min_delta", grows and o.trigger == "plateau"),
        "a second growth": ("grow_every", o.max_growths > 1 or o.first_growth < 0),
        "a growth behind step 0": ("patience min_delta", later),
        "--kd_weight": ("kd_temperature kd_on", o.kd_weight),
        "--kd_weight and --kd_on=retain or dream": ("kd_rows", o.distilled),
        "--kd_weight and --kd_on=dream": ("dreams", o.kd_weight and o.kd_on == "dream"),
        "--ewc_lambda": ("ewc_batches", o.ewc_lambda),
        "--max_growths of 1 or more, or topN": ("freeze", grows or o.freeze.startswith("top")),
    }
    for condition, (names, met) in useful.items():
        for name in o.typed.keys() & names.split():
            need(met, f"--{name} does nothing without {condition}: leave it out")
    ev.choose_machine(o.device, o.dtype)
    rehearse(o)


def rehearse(o):
    """Perform all growths and the freeze on a network without memory: what grow.py would refuse in the middle
    of a run is refused before it."""
    config = network_config(o)
    limit = config.block_size
    need(o.block_size <= limit, f"--block_size={o.block_size} is over the model's {limit}: lower it")
    data.tokenizer_name(config.vocab_size)
    with torch.device("meta"):
        model = GPT(config)
    try:
        for growth in range(o.max_growths):
            grow.insert_block(model, grow.placement(o.where, model, growth, o.max_growths), o.block_init)
        grow.freeze(model, o.freeze)
    except UserError as e:
        raise UsageError(f"--where={o.where} --freeze={o.freeze}: {e}") from e


def network_config(o):
    """The shape of the network to start from. (The demo's may not be trained yet.)"""
    if o.init == "scratch":
        vocab_size = data.BYTES if o.tokenizer == "bytes" else data.GPT2
        return GPTConfig(vocab_size, o.block_size, o.n_head, o.n_embd, (0,) * o.n_layer, o.dropout)
    if o.init == f"{PRETRAINED}/model" and not Path(o.init).exists():
        return network_config(Options(**PRESETS["pretrain"]))
    return read_config(o.init)


# ----- What a run starts from: a checkpoint or none, the pretrained network, batches -----


def find_checkpoint(o, world):
    """The checkpoint to go on from, or None for a new run. Refuses a folder that does not fit --resume."""
    out, saved = Path(o.out), None
    has_checkpoint = (out / "ckpt.pt").exists()
    begun = has_checkpoint or (out / "metrics.jsonl").exists()
    need(not begun or o.resume != "no", f"{out} holds a run: go on with --resume, or give another --out")
    runs = ", ".join(sorted(str(path.parent) for path in out.parent.glob("*/metrics.jsonl"))[:5]) or "none"
    here = f"nothing to resume in {out.absolute()} (runs beside it: {runs})"
    need(begun or o.resume != "yes", f"{here}: leave out --resume, or name the run's folder with --out")
    if has_checkpoint:
        saved = data.load_checkpoint(out / "ckpt.pt")
        compare_options(o, saved["options"])
    need(saved or not (out / "model").exists(), f"{out} holds a result without ckpt.pt: give another --out")
    steps = set(gather(saved and saved["step"], world))  # on several nodes with a disk each they may differ
    need(len(steps) == 1, f"not all processes see the same {out}: put it on a disk that all nodes share")
    return saved


def compare_options(o, stored):
    """Refuse to resume under options that would make it another run. Only the product of batch_size and
    grad_accum matters (and of kd_rows and grad_accum), so that a run can go on in less memory."""
    then, now = dict(stored), asdict(o)
    for values in (then, now) if not o.dropout else ():  # which is drawn for each micro-step
        accum = values.pop("grad_accum")
        values["batch_size x grad_accum"] = accum * values.pop("batch_size")
        values["kd_rows x grad_accum"] = (accum if o.distilled else 0) * values.pop("kd_rows")
    differs = differing(then, now)
    need(not differs, f"the run in {o.out} has {differs}: resume with those, or give another --out")
    steps = f"the run in {o.out} has --max_steps={stored['max_steps']}: resume with that"
    if o.lr_schedule == "constant":
        need(o.max_steps >= stored["max_steps"], f"{steps} or more")
    else:
        need(o.max_steps == stored["max_steps"], steps)


def differing(then, now):
    """The options that decide what is computed and differ, as a phrase. (A fork's new option is left out.)"""
    decide = [name for name in then if name not in MAY_CHANGE and then[name] != now.get(name, then[name])]
    names = {name: f"--{name}=" if hasattr(Options, name) else f"{name} " for name in decide}
    return ", ".join(f"{names[name]}{then[name]} (now {now[name]})" for name in decide)


def start_model(o):
    """The network as it is before the run, on the CPU."""
    if o.init == "scratch":
        torch.manual_seed(o.seed)
        return GPT(network_config(o))
    return GPT.from_pretrained(o.init, o.dropout)


def pretrain(o, world):
    """Train the network that the demo starts from, if it is not there. One that other options, another torch
    or another text has made is refused."""
    p = dataclasses.replace(Options(**PRESETS["pretrain"]), device=o.device, compile=o.compile, resume="auto")
    p.presets = ["pretrain"]
    if not Path(o.init).exists():
        print(f"pretraining on {p.dataset}, once, into {PRETRAINED}", file=sys.stderr)
        check(p, world)
        stopped_by = train(p)
        if stopped_by:
            sys.exit(stopped_by)
        gather(None, world)  # until its log is whole
    header, text = ev.read_run(PRETRAINED)["header"], data.load(p.dataset, data.BYTES, p.block_size)
    c, text_sha256 = header["config"], data.sha256(text.values())
    made = {"torch": header["versions"]["torch"], "text": header["sha256"]["learn"]}
    made |= {"steps": c["max_steps"], "precision": c["dtype"]}
    here = {"torch": torch.__version__, "text": text_sha256, "steps": p.max_steps, "precision": p.dtype}
    differs = differing(c | made, asdict(p) | here)
    need(not differs, f"{PRETRAINED} was made with {differs}: delete it, and it is trained again")


def micro_batches(o, texts, dreams, step, device, rank=0, world=1):
    """This rank's (inputs, targets) of each micro-step: a pure function of (seed, step)."""
    rows, T = o.batch_size * o.grad_accum, o.block_size
    replayed = round(o.replay * rows)
    x, y = data.batch(texts["learn"]["train"], T, rows - replayed, step, o.seed)  # (rows, T) each
    if replayed:
        again = data.batch(texts["retain"]["train"], T, replayed, step, o.seed + 1)
        x, y = torch.cat([x, again[0]]), torch.cat([y, again[1]])
    # (grad_accum, rows of a rank, T) each; contiguous, as pinned memory must be
    x, y = (t.view(o.grad_accum, world, -1, T)[:, rank].contiguous() for t in (x, y))
    if o.distilled:  # rows to be distilled on follow those to be learned
        source = dreams if o.kd_on == "dream" else texts["retain"]["train"]
        extra, _ = data.batch(source, T, o.distilled * o.grad_accum, step, o.seed + 2)
        x = torch.cat([x, extra.view(o.grad_accum, world, -1, T)[:, rank]], 1)
    return list(zip(data.to_device(x, device), data.to_device(y, device)))


def learning_rate(o, step):
    lr = o.lr * min(1.0, (step + 1) / (o.warmup_steps + 1))
    return lr * 0.5 * (1 + math.cos(math.pi * step / o.max_steps)) if o.lr_schedule == "cosine" else lr


def gather(value, world):
    """[the value of every rank]"""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def note_signals():
    """A list to which SIGINT and SIGTERM are appended, for the loop to stop in order; a second one exits."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return received


# ----- The run -----


def train(o):
    """Run `o` to its end, or to where a signal stops it, and return that signal's exit status. All state is
    local, and in sight of the loop."""
    # ----- set-up: checkpoint, machine, pretrained network, texts -----
    began, out = time.perf_counter(), Path(o.out)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    saved = find_checkpoint(o, world)
    device, dtype, machine = ev.choose_machine(o.device, o.dtype)
    compiles, why = ev.choose_compile(o.compile, device)
    machine.append(f"compile {int(compiles)}: {why}")
    base = start_model(o)
    init_sha256 = data.sha256(p.detach().numpy() for p in base.parameters())
    if saved and saved["init_sha256"] != init_sha256:
        raise UserError(f"{out} was started from other weights than {o.init} holds now: restore those")
    # Beside a GPU there is memory for a copy: the base need not be loaded again to be compared with.
    untouched = None if device.type == "cpu" or o.originals_never_train else copy.deepcopy(base)
    base.to(device)
    names = {"learn": o.dataset, "retain": o.retain}
    texts = {key: None if name == "none" else data.load(name, base.config.vocab_size, o.block_size)
             for key, name in names.items()}  # fmt: skip
    text_sha256 = {key: text and data.sha256(text.values()) for key, text in texts.items()}
    if saved and saved["log"][0]["sha256"] != text_sha256:
        raise UserError(f"{o.dataset} or {o.retain} is not the text that {out} was started with: restore it")
    _lock = data.lock_run(out) if rank == 0 else None  # until this returns, a second process is refused

    # ----- set-up: what keeps the old, from the pretrained network -----
    ewc = dreams = teacher = None
    if o.ewc_lambda:
        steps, text = range(o.ewc_batches), texts["retain"]["train"]
        old_rows = (data.batch(text, o.block_size, 8, i, o.seed)[0].to(device) for i in steps)  # (8, T) each
        ewc = grow.EWC(base, old_rows, torch.Generator(device).manual_seed(o.seed))
    if o.kd_weight and o.kd_on == "dream":
        dreams = saved["dreams"] if saved else grow.sample_dreams(base, o.dreams, o.block_size, o.seed)
        dreams = dreams.numpy()

    # ----- set-up: the growing network, its teacher, objective and optimizer -----
    model = base
    if saved:
        with torch.device("meta"):
            model = GPT(GPTConfig(**saved["model_config"]))
        model.load_state_dict(saved["model"], assign=True)
        model.to(device)
    elif o.kd_weight and not o.originals_never_train:
        model = copy.deepcopy(base)
    if o.kd_weight:  # originals that never train are the pretrained network: no second copy
        teacher = grow.original(model) if o.originals_never_train else base.requires_grad_(False)
    del base
    if o.freeze.startswith("top") or grow.grown(model):
        grow.freeze(model, o.freeze)
    model.train()
    objective = grow.Objective(model, teacher, o.kd_temperature)
    if compiles:
        grow.compile_objective(objective)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    rows = o.batch_size * o.grad_accum  # of a step, over all processes

    def rebuild(previous=None):
        """The parameters that train, and what depends on them: optimizer, DDP, the cost of a step."""
        optimizer = grow.make_optimizer(model, o.lr, o.weight_decay, previous)
        ddp = DistributedDataParallel(objective) if world > 1 else objective
        cost = grow.count_flops(objective, rows, o.distilled * o.grad_accum, o.block_size)
        return grow.trainable(model), optimizer, ddp, cost

    params, optimizer, ddp, step_flops = rebuild()
    step, flops, train_seconds, log = 0, 0, 0.0, []
    command = f"python train.py {ev.as_typed(o.typed, o.presets)}".strip()
    started = {"command": command, "presets": o.presets, "typed": o.typed}
    if saved:
        step, flops, train_seconds, log = (saved[k] for k in ("step", "flops", "train_seconds", "log"))
        log[0] |= {**started, "config": asdict(o)}  # the header tells of the last start
        began -= saved["seconds"]
        grow.load_optimizer_state(model, optimizer, saved["optimizer"])
        if saved["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])

    # ----- set-up: the log. Its rows are all that triggers and tables know, and a checkpoint holds them -----
    evals, events = ([row for row in log if row["kind"] == kind] for kind in ("eval", "event"))
    if rank == 0:
        data.write_jsonl(out / "metrics.jsonl", log, "w")

    def record(kind, **row):
        log.append({"kind": kind, **row})
        if rank == 0:
            data.write_jsonl(out / "metrics.jsonl", log[-1:], "a")
        return log[-1]

    def say(text):
        if rank == 0:
            print(text, flush=True)

    def sizes():
        counts = [sum(p.numel() for p in ps) for ps in (model.parameters(), grow.trainable(model))]
        tokens = step * rows * o.block_size
        return {"parameters": counts[0], "trainable": counts[1], "flops": flops, "tokens": tokens}

    eval_rows = o.batch_size  # windows at a time: on a GPU more, if they are short
    if device.type == "cuda":
        eval_rows = max(eval_rows, min(4 * o.batch_size, 4096 // o.block_size))
    probe = next(ev.window_batches(texts["learn"]["val"], o.block_size, eval_rows, eval_rows))[1].to(device)

    def refuse_non_finite(*numbers):
        if all(map(math.isfinite, numbers)):
            return
        if step == 0:
            raise UserError(f"the losses of {o.init} are not finite: give an --init whose weights are whole")
        finer = "" if dtype == torch.float32 else ", or --resume with --dtype=float32"
        raise UserError(
            f"a loss or the gradient norm is not finite at or before step {step - 1}: the run stops. "
            f"{out}/ckpt.pt is from before; try a lower --lr or more --warmup_steps in a new run{finer}"
        )

    def measure():
        """Validation losses of both texts, in nats per token."""
        args = o.block_size, eval_rows, o.eval_windows
        with autocast:
            found = {key: text and ev.evaluate(model, text["val"], *args) for key, text in texts.items()}
        refuse_non_finite(*(loss for loss in found.values() if loss is not None))
        return found

    @torch.no_grad()
    def probe_logits():
        """On real text, eagerly."""
        model.eval()
        with autocast, torch.compiler.set_stance("force_eager"):
            result = model(probe)[0]  # (eval_rows, T, V)
        model.train()
        return result

    if not saved:
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        record(
            "header", **started, config=asdict(o),
            versions=versions | {"numpy": np.__version__}, machine=machine, processes=world,
            init_sha256=init_sha256, layers=model.config.n_layer, parameters=sizes()["parameters"],
            vocab_size=model.config.vocab_size,
            tokens={key: {k: len(ids) for k, ids in (text or {}).items()} for key, text in texts.items()},
            sha256=text_sha256,
        )  # fmt: skip
    typed = ev.as_typed(o.typed) or "as the preset has them"
    say("\n".join([f"options: {typed} (all of them are in {out}/metrics.jsonl)", *machine]))
    say(f"{log[0]['layers']} layers, {log[0]['parameters']:,} parameters; learn {o.dataset}, "
        f"{len(texts['learn']['train']):,} training tokens; retain {o.retain}")  # fmt: skip
    windows = f"at most {o.eval_windows} windows" if o.eval_windows else "all windows"
    say(f"validation: {windows}, {ev.protocol('val', o.block_size, device, dtype)}")
    if o.init != "scratch" and not o.originals_never_train:
        until, how = "to the end", "to grow with --first_growth=0 and --freeze=base"
        if o.max_growths and o.freeze in ("base", "older"):
            until = f"until step {o.starts_growing}" if o.trigger == "schedule" else "until the first growth"
            how = "--first_growth=0"
        say(f"originals train {until}: the pretrained network is not kept; {how} keeps it")
    if saved:
        say(f"resumed at step {step} with {model.config.n_layer} layers")
    del saved  # its memory

    def stop_signal():
        """The signal to stop for, or 0: the same on every rank."""
        return max(gather(max(signals, default=0), world))

    # ----- the loop -----
    signals = note_signals()
    losses, lr, since, since_step = None, 0.0, 0.0, 0  # of the last step, and since when the clock runs
    total = torch.zeros((), device=device)  # of all losses since the start, to see if one was not finite
    while True:  # max_steps + 1 times: the last time it only measures and saves
        last = step == o.max_steps
        # Several processes must agree, and a GPU would wait for that: there they ask only at log lines.
        asks = world == 1 or device.type == "cpu" or step % o.log_every == 0
        stopped_by = stop_signal() if asks else 0
        may_grow = len(events) < o.max_growths and o.starts_growing <= step < o.max_steps
        due = may_grow and step == o.first_growth == 0  # whatever the trigger, or the originals would train
        if may_grow and o.trigger == "schedule":
            due = due or grow.scheduled(step, o.starts_growing, o.grow_every)
        measures = last or due or step % o.eval_every == 0
        saves = last or stopped_by or step % o.save_every == 0

        # --- log line of the step before. Here, and only here, the program waits for the device: a loss that
        # is not finite stays in `total`, so reading it now and then misses none.
        logs = (step - 1) % o.log_every == 0
        if losses is not None and (logs or measures or saves):
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds = time.perf_counter() - since
            train_seconds, ms = train_seconds + seconds, 1000 * seconds / (step - since_step)
            losses = torch.cat([losses, total[None]])
            if world > 1:
                dist.all_reduce(losses)
                losses /= world
            nll, kd, penalty, norm, so_far = losses.tolist()
            losses = None  # they are read: the clock starts anew
            # A loss scaler makes infinite gradients on purpose, and skips those steps.
            refuse_non_finite(nll, kd, penalty, so_far, 0.0 if scaler.is_enabled() else norm)
            if logs:
                finite_norm = norm if math.isfinite(norm) else None
                record("step", step=step - 1, loss=nll, kd=kd, ewc=penalty, lr=lr, norm=finite_norm, ms=ms)
                terms = (f" kd {kd:.4f}" if teacher else "") + (f" ewc {penalty:.2e}" if ewc else "")
                speed, millions = 1000 * rows * o.block_size / ms, sizes()["trainable"] / 1e6
                left = timedelta(seconds=min(round((o.max_steps - step) * ms / 1000), 10**9))
                say(f"step {step - 1}/{o.max_steps} loss {nll:.4f}{terms} lr {lr:.1e} norm {norm:.2f} "
                    f"{ms:.0f} ms {speed:,.0f} tok/s depth {model.config.n_layer} trainable {millions:.1f}M "
                    f"{left} left")  # fmt: skip

        # --- measure, unless a run that was stopped here has done it
        if measures and not (evals and evals[-1]["step"] == step):
            evals.append(record("eval", step=step, **measure()))
            said = ", ".join(f"{key} {evals[-1][key]:.4f}" for key, text in texts.items() if text)
            say(f"step {step}/{o.max_steps} validation: {said}")

        # --- grow, unless done, and prove that it changed nothing: logits are bitwise what they were
        if may_grow and o.trigger == "plateau" and step % o.eval_every == 0:
            grown_at = events[-1]["step"] if events else 0
            # Only evaluations on schedule: a run resumed past its old end grows where another would.
            history = [(e["step"], e["learn"]) for e in evals if e["step"] % o.eval_every == 0]
            due = due or grow.plateau(history, o.patience, o.min_delta, grown_at)
        if due and not (events and events[-1]["step"] == step):
            before, layers, size = evals[-1], model.config.n_layer, sizes()["parameters"]
            expected = probe_logits()
            at = grow.placement(o.where, model, len(events), o.max_growths)
            if o.block_init == "fresh":
                torch.manual_seed(o.seed * 1_000_003 + step)
            grow.insert_block(model, at, o.block_init)
            grow.freeze(model, o.freeze)
            if not torch.equal(expected, probe_logits()):
                raise RuntimeError(f"the growth at step {step} changed the logits: it must be the identity")
            del expected  # its memory
            if compiles:
                grow.compile_objective(objective)
            params, optimizer, ddp, step_flops = rebuild(optimizer)
            after, now, depth = measure(), sizes(), model.config.n_layer
            added = now["parameters"] - size
            events.append(record(
                "event", step=step, at=at, generation=max(model.config.generation), layers_before=layers,
                layers_after=depth, parameters_added=added, **now,
                **{f"{key}_before": before[key] for key in texts},
                **{f"{key}_after": after[key] for key in texts},
            ))  # fmt: skip
            say(f"step {step}: grew {layers} -> {depth} layers at index {at}, +{added:,} parameters, logits "
                f"bitwise equal, validation loss {before['learn']:.4f} -> {after['learn']:.4f}")  # fmt: skip
            if ewc and not ewc.weighs(model):
                say("EWC weighs nothing from here on: every parameter that it holds is frozen")

        # --- save; at step 0, too, so that a folder that cannot be written is found before work is lost
        if measures and not stopped_by:  # a signal that came while it measured
            stopped_by = stop_signal()
        if (saves or stopped_by) and rank == 0:
            data.save_checkpoint(out / "ckpt.pt", {
                "step": step, "model": model.state_dict(), "model_config": asdict(model.config),
                "optimizer": grow.optimizer_state(model, optimizer), "scaler": scaler.state_dict(),
                "dreams": None if dreams is None else torch.from_numpy(dreams), "log": log,
                "options": asdict(o), "init_sha256": init_sha256, "flops": flops,
                "train_seconds": train_seconds, "seconds": time.perf_counter() - began,
            })  # fmt: skip
        if stopped_by or last:
            break

        # --- one optimizer step
        if losses is None:  # the clock runs while the network trains, and only then
            since, since_step = time.perf_counter(), step
        if o.dropout:  # it is a function of (seed, step), too
            torch.manual_seed(o.seed * 1_000_003 + step)
        lr = learning_rate(o, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = torch.zeros(4, device=device)  # next token, distillation, EWC, gradient norm
        for i, (x, y) in enumerate(micro_batches(o, texts, dreams, step, device, rank, world)):
            last_micro_step = i == o.grad_accum - 1  # only then do ranks average their gradients
            with contextlib.nullcontext() if last_micro_step or world == 1 else ddp.no_sync():
                with autocast:
                    nll, kd = ddp(x, y)
                loss = (nll + o.kd_weight * kd) / o.grad_accum
                losses[:2] += torch.stack([nll, kd]).detach() / o.grad_accum
                if ewc and last_micro_step:
                    penalty = ewc.penalty(model)
                    loss, losses[2] = loss + o.ewc_lambda * penalty, penalty.detach()
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        losses[3] = nn.utils.clip_grad_norm_(params, o.grad_clip or math.inf)
        total += losses[:3].sum()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step, flops = step + 1, flops + step_flops

    # ----- the end: base against grown on the test splits, export, tables -----
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stopped_by:
        how = "run the same command again" if o.resume == "auto" else "--resume continues it"
        say(f"stopped at step {step}, saved in {out}: {how}")
        return 128 + stopped_by
    kept = o.originals_never_train and o.init != "scratch"
    base = grow.original(model) if kept else teacher or (untouched or start_model(o)).to(device)
    if untouched is None and data.sha256(p.detach().cpu().numpy() for p in base.parameters()) != init_sha256:
        if kept:
            raise RuntimeError("an original changed, and none may train from step 0 on")
        raise UserError(f"{o.init} has changed since the run started: restore it and --resume")
    # From here on the network is finished: a version itself, beside those that are in it as they were.
    versions = (*(model.config.versions if kept else ()), max(model.config.generation))
    learned = [*(ev.texts_learned(o.init, o.retain) if kept else ()), o.dataset]
    model.config.versions = versions
    args = o.block_size, eval_rows, o.test_windows
    with autocast:
        result = {key: {"dataset": names[key], **ev.compare(base, model, text and text["test"], *args)}
                  for key, text in texts.items()}  # fmt: skip
        use = ev.block_use(model, texts["learn"]["test"], o.block_size)
    if rank == 0:  # a network of a shorter run must not stand beside this result
        shutil.rmtree(out / "model", ignore_errors=True)
    record(
        "result", layers=model.config.n_layer, versions=versions, learned=learned, **sizes(), **result,
        best=min(e["learn"] for e in evals),
        train_seconds=train_seconds, seconds=time.perf_counter() - began,
        block_use=use,
        protocol=ev.protocol("test", o.block_size, device, dtype, share=0.0 if len(versions) > 1 else None),
    )  # fmt: skip
    if rank == 0:
        run = ev.read_run(out)
        try:
            model.save_pretrained(out / "model", ev.model_card(run))
        except OSError as e:
            raise UserError(f"cannot write {out}/model ({e.strerror}): --resume writes it again") from e
        say("\n" + ev.report(run))
        if len(events) < o.max_growths:
            happened = f"{len(events)} of {o.max_growths} growths happened"
            say(f"{happened}: the run ended at step {step}, before the next was due")


def smaller_batch(o, world):
    """The same global batch in more, smaller micro-steps."""
    sizes = {"batch_size": o.batch_size} | ({"kd_rows": o.kd_rows} if o.distilled else {})
    for k in range(2, o.batch_size + 1):
        if all(rows % (k * world) == 0 for rows in sizes.values()):
            smaller = {name: rows // k for name, rows in sizes.items()} | {"grad_accum": o.grad_accum * k}
            if not o.dropout:  # whose masks would be others
                smaller |= {"resume": "auto", "out": o.out}
            return f"the same global batch in less memory: {ev.as_typed(smaller)}"
    fewer = ", or fewer --kd_rows," if o.distilled else ""
    return f"use a smaller --block_size{fewer} in a new run"


def main(argv):
    o = parse(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    data.set_cache_dir(o.cache_dir)
    # Compiled kernels are kept where a restart finds them, not in the folder for temporary files. torch
    # chooses some by timing: another rank's choice, found after a growth, may round differently. (It reads
    # this when torch._dynamo is first imported, which the check of the options does.)
    kernels = data.cache_dir() / f"kernels-{os.environ.get('RANK', 0)}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    check(o, world)
    if world > 1:  # signals and sums of evaluations pass between CPUs, and only gradients between GPUs
        cuda = o.device in ("auto", "cuda") and torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        if o.init == f"{PRETRAINED}/model":
            pretrain(o, world)
        stopped_by = train(o)
        if stopped_by:
            sys.exit(stopped_by)
    except KeyboardInterrupt:  # the loop notes Ctrl-C and saves: this came before it, or behind it
        if (Path(o.out) / "ckpt.pt").exists():
            print(f"stopped; {o.out} is saved: --resume goes on, and redoes the tables", file=sys.stderr)
        raise
    except (RuntimeError, MemoryError) as e:
        if not data.is_out_of_memory(e):
            raise
        raise UserError(f"out of memory: {smaller_batch(o, world)}") from e
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    ev.run_main(main)
