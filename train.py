"""Train a GPT that grows. Read model.py and grow.py first, then `train` below: one function, one loop.

    python train.py               the card: GPT-2 124M on WikiText-2, 12 -> 15 layers in 2,000 steps
    python train.py demo          the same program on embedded text: offline, some minutes on a CPU
    python train.py keep          the card's task; the network it started from stays inside
    python train.py generative    the same; distilled from that network, on text it generates
    python train.py demo replay --seed=2    presets first, then options
    python train.py demo --resume           go on after any interruption
    torchrun --standalone --nproc_per_node=2 train.py demo    several processes, the same global batch

"The card" is the model card "Growing LLM"; the defaults are its recipe. A run writes RUN/metrics.jsonl
(all that is measured), RUN/ckpt.pt (to resume from) and RUN/model/ (in Hugging Face's format)."""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import eval as ev  # isort: skip  (before torch: it sets what OpenMP then reads)

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import grow
from data import need
from model import GPT, GPTConfig, read_config

# ----- Options -----


def option(default, help, least=None, needs="", **more):
    """A command-line option: its least value, what it does nothing without, more for argparse."""
    more["help"] = f"{'|'.join(more.get('choices', []))} {help} [{default}]"
    return field(default=default, metadata=dict(least=least, needs=needs, argparse=more))


@dataclass
class Options:
    # the network and its two texts
    init: str = option("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder, or scratch")
    dataset: str = option("wikitext2", "new text: wikitext2, webtext, docs, code, headers, a path")
    retain: str = option("webtext", "old text, to measure forgetting: the same, or none")
    block_size: int = option(128, "context, in tokens", least=2)
    n_layer: int = option(12, "blocks", least=1, needs="init=scratch")
    n_head: int = option(12, "heads", least=1, needs="init=scratch")
    n_embd: int = option(768, "channels", least=1, needs="init=scratch")
    tokenizer: str = option("gpt2", "of the texts", choices=["gpt2", "bytes"], needs="init=scratch")
    # optimisation
    max_steps: int = option(2000, "optimizer steps", least=1)
    batch_size: int = option(8, "rows per micro-step, over all processes", least=1)
    grad_accum: int = option(1, "micro-steps per optimizer step", least=1)
    lr: float = option(5e-5, "learning rate of AdamW", least=1e-12)
    lr_schedule: str = option("constant", "cosine: 0 at max_steps", choices=["constant", "cosine"])
    warmup_steps: int = option(0, "steps of linear warm-up", least=0)
    weight_decay: float = option(0.01, "of matrices and embeddings", least=0)
    grad_clip: float = option(1.0, "largest gradient norm (0: no clipping)", least=0)
    dropout: float = option(0.0, "probability", least=0)
    seed: int = option(0, "of batches, fresh blocks, dropout, sampled labels", least=0)
    # growth
    trigger: str = option("schedule", "what decides to grow", choices=["schedule", "plateau"])
    grow_every: int = option(500, "schedule: steps between growths", least=1)
    first_growth: int = option(-1, "earliest step (-1: the trigger's; 0: originals never train)", least=-1)
    max_growths: int = option(3, "growths at most (0: an ordinary training run)", least=0)
    where: str = option("upper", "spread, upper (over the upper half), top, bottom, or an index")
    block_init: str = option("copy", "of the block below, or fresh", choices=["copy", "fresh"])
    freeze: str = option("base", "once grown: base, older, none; topN: only N top blocks train")
    patience: int = option(300, "steps without improvement", least=1, needs="trigger=plateau")
    min_delta: float = option(0.01, "an improvement, in nats", least=0, needs="trigger=plateau")
    # keeping the old
    # Distilling, a micro-step holds five tensors of logits, not three: 8 GB at 8 x 1,024 tokens.
    kd_weight: float = option(0.0, "weight of distillation from the pretrained network", least=0)
    kd_temperature: float = option(1.0, "its temperature", least=0.01, needs="kd_weight")
    kd_on: str = option("train", "its text", choices=["train", "retain", "generated"], needs="kd_weight")
    kd_rows: int = option(4, "old or generated rows beside a batch", least=1, needs="kd_weight")
    generated: int = option(2048, "rows the pretrained network writes", least=1, needs="kd_weight")
    ewc_lambda: float = option(0.0, "weight of elastic weight consolidation", least=0)
    ewc_batches: int = option(32, "batches of 8 old rows for its Fisher", least=1, needs="ewc_lambda")
    replay: float = option(0.0, "fraction of a step's rows from the old text", least=0)
    # measuring and saving
    eval_every: int = option(100, "steps between evaluations", least=1)
    eval_windows: int = option(64, "windows of the validation split in each (0: all)", least=0)
    test_windows: int = option(2500, "windows of each test split at the end (0: all)", least=0)
    log_every: int = option(10, "steps between log lines", least=1)
    save_every: int = option(500, "steps between checkpoints; also at the end and Ctrl-C", least=1)
    out: str = option("", "run folder (empty: out/PRESET and the options given)")
    resume: str = option("no", "go on; auto: if begun", choices=["no", "yes", "auto"], nargs="?", const="yes")
    # the machine
    device: str = option("auto", "of torch", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option("auto", "of autocast", choices=["auto", "float32", "bfloat16", "float16"])
    compile: str = option("auto", "auto: on CUDA", choices=["auto", "0", "1"])
    command = ""  # as it was typed; no option

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
        """Rows of old or generated text beside each micro-step's batch."""
        return self.kd_rows if self.kd_weight and self.kd_on != "train" else 0


# fmt: off
PRESETS = {
    "card": {},
    "pretrain": dict(
        init="scratch", tokenizer="bytes", n_layer=2, n_head=4, n_embd=64, dataset="docs", retain="none",
        batch_size=16, max_steps=2500, max_growths=0, lr=8e-3, lr_schedule="cosine", warmup_steps=60,
        weight_decay=0.1, eval_every=250, log_every=100, save_every=250, dtype="float32",
    ),
    "demo": dict(
        init="out/pretrain/model", dataset="code", retain="docs", batch_size=16, max_steps=500, lr=1e-2,
        lr_schedule="cosine", first_growth=0, grow_every=50, where="spread", kd_weight=1.0,
        kd_on="generated", eval_every=50, log_every=25, save_every=100, eval_windows=100, dtype="float32",
    ),
    "keep": dict(first_growth=0, where="spread"),
    "replay": dict(first_growth=0, where="spread", replay=0.25),
    "generative": dict(first_growth=0, where="spread", kd_weight=1.0, kd_on="generated"),
}
# fmt: on
# What may differ on resuming and names no folder: at most rounding depends on it.
MAY_CHANGE = {"out", "resume", "device", "dtype", "compile", "log_every", "save_every"}


def parse(argv):
    """Command line -> Options: presets, then options. What argparse refuses ends the program."""
    p = ev.parser(f"python train.py [{'|'.join(PRESETS)} ...] [--option=value ...]", __doc__)
    p.argument_default = argparse.SUPPRESS  # what is not typed comes from presets and defaults
    p.epilog = "\n".join(f"preset {name}: {values}" for name, values in PRESETS.items())
    for f in fields(Options):
        kind = os.path.expanduser if f.type is str else f.type  # shells leave the ~ in --out=~/run
        p.add_argument(f"--{f.name}", type=kind, metavar="", **f.metadata["argparse"])
    words = list(itertools.takewhile(lambda word: word in PRESETS, argv))
    typed, values = vars(p.parse_args(argv[len(words) :])), {}
    for word in words:
        values |= PRESETS[word]
    o = Options(**values | typed)
    command = shlex.join(["python", "train.py", *argv])
    o.command = re.sub(" --resume([ =](yes|no|auto))?(?= |$)", "", command)  # that makes the run
    if not o.out:  # options that decide what is computed name the folder
        free = MAY_CHANGE | ({"max_steps"} if o.lr_schedule == "constant" else set())  # prolongs a run
        named = [f.name for f in fields(o) if f.name in typed.keys() - free]
        differs = "".join(f"-{name}={typed[name]}" for name in named)
        o.out = "out/" + "-".join(words or ["card"]) + re.sub(r"[^\w.=-]", "_", differs)
    for f in fields(o):
        given, least, needs = getattr(o, f.name), f.metadata["least"], f.metadata["needs"]
        if least is not None and not given >= least:
            p.error(f"--{f.name}={given} must be at least {least}")
        name, _, value = needs.partition("=")
        if f.name in typed and needs and not (getattr(o, name) == value if value else getattr(o, name)):
            p.error(f"--{f.name} does nothing without --{needs}")
    return o


def check(o, world=1):
    """Refuse what cannot work, or would not be the run it seems, before any download."""
    data.check_name(o.dataset)
    if o.retain != "none":
        data.check_name(o.retain)
    divisible = o.batch_size % world == 0 and o.distilled % world == 0
    need(divisible, f"--batch_size and --kd_rows must be multiples of the {world} processes")
    alone = world == 1 and not o.kd_weight  # ranks, and a teacher, would drop out differently
    need(not o.dropout or alone, "several processes and distillation need --dropout=0")
    uses_old = o.ewc_lambda or o.replay or (o.kd_weight and o.kd_on == "retain")
    need(o.retain != "none" or not uses_old, "--ewc_lambda, --replay, --kd_on=retain need a --retain text")
    rows = o.batch_size * o.grad_accum
    whole = math.isclose(o.replay * rows, round(o.replay * rows), rel_tol=1e-5)
    need(whole and o.replay < 1, f"--replay={o.replay}: give a multiple of {1 / rows:g} below 1, or 0")
    with torch.device("meta"):  # without memory: what grow.py refuses, it refuses now
        model = GPT(network_config(o))
    limit = model.config.block_size
    need(o.block_size <= limit, f"--block_size={o.block_size} exceeds {o.init}'s {limit} positions")
    for growth in range(o.max_growths):
        grow.insert_block(model, grow.placement(o.where, model, growth, o.max_growths), o.block_init)
    grow.freeze(model, o.freeze)


# ----- What a run starts from: a network, a checkpoint or none, batches -----


def network_config(o):
    if o.init != "scratch":
        return read_config(o.init)
    vocab_size = data.BYTES if o.tokenizer == "bytes" else data.GPT2
    return GPTConfig(vocab_size, o.block_size, o.n_head, o.n_embd, (0,) * o.n_layer, o.dropout)


def start_model(o):
    """The network as it is before the run, on the CPU."""
    if o.init != "scratch":
        return GPT.from_pretrained(o.init, o.dropout)
    torch.manual_seed(o.seed)
    return GPT(network_config(o))


def find_checkpoint(o):
    """The checkpoint to go on from; None: a new run. Refuses folders that do not fit --resume."""
    out, path = Path(o.out), Path(o.out) / "ckpt.pt"
    begun = path.exists() or (out / "metrics.jsonl").exists()
    need(not begun or o.resume != "no", f"{out} holds a run: give --resume or another --out")
    need(begun or o.resume != "yes", f"no run in {out.absolute()}: name it with --out")
    if not path.exists():
        need(not (out / "model").exists(), f"{out} has a result but no ckpt.pt: give another --out")
        return None
    state = data.load_checkpoint(path)
    state["log"] = json.loads(state["log"])  # torch would take a minute for a million rows
    then, now = state["log"][0]["config"], asdict(o)
    if o.lr_schedule == "constant" and o.max_steps > then["max_steps"]:
        then["max_steps"] = o.max_steps  # a longer run begins the same
    keys = [key for key in then if key in now and key not in MAY_CHANGE]
    differs = [f"--{key}={then[key]} (now {now[key]})" for key in keys if then[key] != now[key]]
    need(not differs, f"the run in {out} has {', '.join(differs)}: give those, or another --out")
    return state


def micro_batches(o, texts, generated, step, device, rank=0, world=1):
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
        source = generated.numpy() if o.kd_on == "generated" else texts["retain"]["train"]
        extra, _ = data.batch(source, T, o.distilled * o.grad_accum, step, o.seed + 2)
        x = torch.cat([x, extra.view(o.grad_accum, world, -1, T)[:, rank]], 1)
    return list(zip(data.to_device(x, device), data.to_device(y, device)))


def learning_rate(o, step):
    lr = o.lr * min(1.0, (step + 1) / (o.warmup_steps + 1))
    return lr * 0.5 * (1 + math.cos(math.pi * step / o.max_steps)) if o.lr_schedule == "cosine" else lr


# ----- The run -----


def train(o):
    """Run `o` to its end, or return the exit status of a signal that stops it. All state is local."""
    # ----- set-up: the machine, the network before the run, its texts -----
    began, out = time.perf_counter(), Path(o.out)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, dtype = ev.choose_machine(o.device, o.dtype)
    compiles = ev.choose_compile(o.compile, device)
    state = find_checkpoint(o)
    base = start_model(o)
    names = {"learn": o.dataset, "retain": o.retain}
    texts = {key: data.load(name, base.config.vocab_size, o.block_size) for key, name in names.items()}

    # ----- set-up: what has happened so far. A new run goes on from step 0. -----
    header = {"kind": "header", "command": o.command, "config": asdict(o), "processes": world}
    header["machine"] = f"{device}, {dtype}, {'compiled' if compiles else 'eager'}"
    header["versions"] = {"torch": str(torch.__version__), "numpy": np.__version__, "python": sys.version}
    header |= {"layers": base.config.n_layer, "vocab_size": base.config.vocab_size}
    header["parameters"] = sum(p.numel() for p in base.parameters())
    header["init_sha256"] = data.sha256(p.detach().numpy() for p in base.parameters())
    header["tokens"] = {key: {k: len(ids) for k, ids in (text or {}).items()} for key, text in texts.items()}
    folders = {key: text and Path(text["train"].filename).parent.name for key, text in texts.items()}
    header["sha256"] = {key: name and name.split("-")[1] for key, name in folders.items()}  # of its source
    if state is None:
        state = dict(step=0, flops=0, seconds=0.0, train_seconds=0.0, optimizer={}, scaler={}, generated=None)
        state |= dict(log=[header], model=base.state_dict(), model_config=asdict(base.config))
    first, flops, log = state["step"], state["flops"], state["log"]
    for key, what in {"init_sha256": o.init, "sha256": "a text"}.items():
        need(log[0][key] == header[key], f"{what} is not what {out} started with: restore it")
    log[0] = header  # of the last start
    least = ev.over_ranks(torch.tensor(first), dist.ReduceOp.MIN)
    most = ev.over_ranks(torch.tensor(first), dist.ReduceOp.MAX)
    need(least == most, f"not all processes see the same {out}: put it on a disk that all share")
    evals = [row for row in log if row["kind"] == "eval"]
    events = [row for row in log if row["kind"] == "event"]

    # ----- set-up: the network that grows, and what keeps the old -----
    base.to(device)
    with torch.device("meta"):
        model = GPT(GPTConfig(**state["model_config"]))
    model.to_empty(device=device).load_state_dict(state["model"])  # a copy
    rows, T = o.batch_size * o.grad_accum, o.block_size  # of a step, over all processes
    ewc, generated = None, state["generated"]
    if o.ewc_lambda:
        text, generator = texts["retain"]["train"], torch.Generator(device).manual_seed(o.seed)
        batches = (data.batch(text, T, 8, i, o.seed)[0].to(device) for i in range(o.ewc_batches))
        ewc = grow.EWC(base, batches, generator)
    if o.kd_weight and o.kd_on == "generated" and generated is None:
        uses = o.max_steps * o.grad_accum * o.distilled
        print(f"the pretrained network generates {o.generated} rows; training draws {uses} from them")
        generated = grow.generate_text(base, o.generated * T + 1, o.seed)
    base.requires_grad_(False)
    if o.originals_never_train:
        base = grow.original(model)  # inside the network that grows: no second copy
    keeps = o.originals_never_train and o.init != "scratch"  # random weights are nothing to keep
    if events or o.freeze.startswith("top"):
        grow.freeze(model, o.freeze)

    # ----- set-up: how it is trained -----
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    objective = grow.Objective(model, base if o.kd_weight else None, o.kd_temperature)
    optimizer = grow.make_optimizer(model, o.lr, o.weight_decay, state["optimizer"])
    ddp = DistributedDataParallel(objective) if world > 1 else objective
    began -= state["seconds"]
    trained, logged = state["train_seconds"], first  # at the last log line
    clock = time.perf_counter() - trained
    del state  # its memory

    # ----- set-up: how it is measured. (DDP waited for all ranks: each has seen the folder.) -----
    if rank == 0:
        _lock = data.lock(out / "lock", wait=False)  # until this returns, no other process gets it
        data.write_jsonl(out / "metrics.jsonl", log, "w")
    not_finite = f"loss or gradient is not finite: try a lower --lr ({out}/ckpt.pt is from before)"

    def record(kind, **row):
        """The one way into the log: what is not finite stops the run."""
        need(all(math.isfinite(v) for v in row.values() if isinstance(v, float)), not_finite)
        log.append({"kind": kind, **row})
        if rank == 0:
            data.write_jsonl(out / "metrics.jsonl", log[-1:], "a")
        return log[-1]

    def sizes():
        found = {"parameters": sum(p.numel() for p in model.parameters())}
        found |= {"trainable": sum(p.numel() for p in grow.trainable(model))}
        return found | {"flops": flops, "tokens": step * rows * T}

    def validate():
        """Nats per token on each validation split: the network's and, with versions kept, the mixture's."""
        losses, nets = {}, grow.networks(model) if keeps else [model]
        for key, text in texts.items():
            with autocast:
                m = ev.measure(nets, text and text["val"], T, o.batch_size, o.eval_windows)
            losses |= {key: m["losses"][-1], f"{key}_mixed": m["mixed"]}
        return losses

    def last_step():
        """The last step's next-token loss, distillation, EWC and gradient norm, over all ranks."""
        *terms, norm = (ev.over_ranks(losses.clone()) / world).tolist()
        return *terms, norm if math.isfinite(norm) or not scaler.is_enabled() else None

    print(f"{o.command} (all options are in {out}/metrics.jsonl)")
    print(f"{header['machine']}; {header['layers']} layers, {header['parameters']:,} parameters")
    if o.init != "scratch" and not keeps:
        print("the pretrained network is not kept; growing with --first_growth=0 --freeze=base keeps it")
    if o.max_growths and o.starts_growing >= o.max_steps:
        print(f"no growth: the first is due at step {o.starts_growing} of {o.max_steps}")
    if first:
        print(f"resumed at step {first} with {model.config.n_layer} layers")

    # ----- the loop -----
    losses = torch.zeros(4, device=device)
    signals, stopped_by = [], 0

    def note(number, frame):  # the loop stops in order; a second signal exits
        signals.append(number)
        if number in (signal.SIGINT, signal.SIGTERM):  # a closed terminal sends its signal twice
            signal.signal(number, signal.SIG_DFL)

    stops = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup asks
        stops.append(signal.SIGHUP)  # a terminal closes
    for number in stops:
        signal.signal(number, note)
    for step in range(first, o.max_steps + 1):  # the last time it only measures and saves
        last = step == o.max_steps
        saves = last or step % o.save_every == 0
        measures = last or step % o.eval_every == 0 or grow.is_due(o, step, evals, events)
        if measures or saves:
            losses.tolist()  # wait for what a GPU has yet to do: it is training
        pause = time.perf_counter()  # the clock runs only while the network trains

        # --- measure, unless a run stopped here has done it
        if measures and not (evals and evals[-1]["step"] == step):
            found = validate()
            loss, _, _, norm = last_step() if step > first else [None] * 4  # for triggers to ask
            evals.append(record("eval", step=step, **found, loss=loss, norm=norm))
            words = [f"{key.replace('_', ' ')} {v:.4f}" for key, v in found.items() if v is not None]
            print(f"step {step}/{o.max_steps} validation: {', '.join(words)}")

        # --- grow, and prove that it changed nothing: logits are bitwise what they were
        if measures and grow.is_due(o, step, evals, events):
            at = grow.placement(o.where, model, len(events), o.max_growths)
            event = {"step": step, "at": at, "layers_before": model.config.n_layer}
            event |= {f"{key}_before": evals[-1][key] for key in texts}
            _, probe, _ = next(ev.window_batches(texts["learn"]["val"], T, o.batch_size, o.batch_size))
            torch.manual_seed(o.seed * 1_000_003 + step)  # fresh weights: a function of (seed, step)
            model.eval()
            with torch.no_grad(), autocast, torch.compiler.set_stance("force_eager"):
                before = model.run(model.embed(probe.to(device)))  # (o.batch_size, T, C)
                grow.insert_block(model, at, o.block_init)
                after = model.run(model.embed(probe.to(device)))
                for a, b in zip(before, after):  # all logits at once may not fit in memory
                    if not (model.head(a) - model.head(b)).abs().max() <= grow.TOLERANCE:
                        raise RuntimeError(f"the growth at step {step} changed the logits, and it must not")
            model.train()
            grow.freeze(model, o.freeze)
            carried = grow.optimizer_state(model, optimizer)
            optimizer = grow.make_optimizer(model, o.lr, o.weight_decay, carried)
            ddp = DistributedDataParallel(objective) if world > 1 else objective
            event |= {"layers_after": model.config.n_layer, "generation": max(model.config.generation)}
            after = validate()
            event |= {f"{key}_after": after[key] for key in texts} | sizes()
            event["parameters_added"] = event["parameters"] - (events[-1] if events else header)["parameters"]
            events.append(record("event", **event))
            added = f"+{event['parameters_added']:,} parameters at index {at}"
            same = f"equal to {grow.TOLERANCE:g}" if grow.TOLERANCE else "bitwise equal"
            print(f"step {step}: grew to {model.config.n_layer} layers, {added}, logits {same}")

        # --- save; at step 0, too, so a folder that cannot be written is found before work is lost
        if world == 1 or device.type == "cpu" or step % o.log_every == 0:  # a GPU waits for this
            received = torch.tensor(max(signals, default=0))
            stopped_by = ev.over_ranks(received, dist.ReduceOp.MAX).item()  # all stop at one step
        if saves or stopped_by:  # a loss scaler makes infinite gradients on purpose and skips them
            need(scaler.is_enabled() or losses.isfinite().all(), not_finite)
        if (saves or stopped_by) and rank == 0:
            data.save_checkpoint(out / "ckpt.pt", {
                "step": step, "flops": flops, "log": json.dumps(log), "generated": generated,
                "model": model.state_dict(), "model_config": asdict(model.config),
                "optimizer": grow.optimizer_state(model, optimizer), "scaler": scaler.state_dict(),
                "train_seconds": pause - clock, "seconds": time.perf_counter() - began,
            })  # fmt: skip
        if stopped_by or last:
            break
        clock += time.perf_counter() - pause

        # --- one optimizer step
        if compiles:
            grow.compile_objective(objective)
        torch.manual_seed(o.seed * 1_000_003 + step)  # dropout is a function of (seed, step), too
        lr = learning_rate(o, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = torch.zeros(4, device=device)  # next token, distillation, EWC, gradient norm
        for i, (x, y) in enumerate(micro_batches(o, texts, generated, step, device, rank, world)):
            last_micro_step = i == o.grad_accum - 1
            ddp.require_backward_grad_sync = last_micro_step  # only then ranks average gradients
            with autocast:
                nll, kd = ddp(x, y)
            loss = (nll + o.kd_weight * kd) / o.grad_accum
            losses[:2] += torch.stack([nll, kd]).detach() / o.grad_accum
            if ewc and last_micro_step:  # it does not depend on the batch: once a step
                penalty = ewc.penalty(model)
                loss, losses[2] = loss + o.ewc_lambda * penalty, penalty.detach()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        losses[3] = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        flops += grow.count_flops(objective, rows, o.distilled * o.grad_accum, T)

        # --- log it. Between two evaluations, the program waits for the device only here.
        if step % o.log_every == 0:
            nll, kd, penalty, norm = last_step()
            ms = 1000 * (time.perf_counter() - clock - trained) / (step + 1 - logged)
            trained, logged = time.perf_counter() - clock, step + 1
            record("step", step=step, loss=nll, kd=kd, ewc=penalty, lr=lr, norm=norm, ms=ms)
            terms = f"loss {nll:.4f}"
            terms += f" kd {kd:.4f}" if o.kd_weight else ""
            terms += f" ewc {penalty:.2e}" if ewc else ""
            speed = f"{ms:.0f} ms {1000 * rows * T / ms:,.0f} tok/s depth {model.config.n_layer}"
            minutes = (o.max_steps - logged) * ms / 60_000
            print(f"step {step} {terms} lr {lr:.1e} norm {norm or 0:.2f} {speed} {minutes:.1f} min left")

    # ----- the end: base against grown on the test splits, export, tables -----
    for number in stops:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if stopped_by:
        print(f"stopped at step {step}, saved in {out}: --resume continues it")
        return 128 + stopped_by
    if data.sha256(p.detach().cpu().numpy() for p in base.parameters()) != header["init_sha256"]:
        raise RuntimeError("the network before the run changed, and it must not")
    # From here on the network is finished: a version itself, beside those inside it.
    versions = model.config.versions if keeps else ()
    model.config.versions = (*versions, max(model.config.generation))
    result = {"layers": model.config.n_layer, "versions": model.config.versions, **sizes()}
    nets = grow.networks(model) if keeps else [base, model]  # last what it was, and what it is
    with autocast:
        for key, text in texts.items():
            m = ev.measure(nets, text and text["test"], T, o.batch_size, o.test_windows, kl=True)
            result[key] = {"dataset": names[key], "windows": m["windows"]}
            result[key] |= {"base": m["losses"][-2], "grown": m["losses"][-1]}
            result[key] |= {"mixed": m["mixed"] if keeps else None, "kl": m["kl"]}
        result["block_use"] = ev.block_use(model, texts["learn"]["test"], T)
    result["protocol"] = ev.protocol("test", T, device, dtype, mixed=keeps)
    result["best"] = min(e["learn"] for e in evals)
    result |= {"train_seconds": pause - clock, "seconds": time.perf_counter() - began}
    run = ev.by_kind(out, [*log, {"kind": "result", **result}])
    if rank == 0:  # the network first: the result row says that all is there
        model.save_pretrained(out / "model", ev.model_card(run))
    record("result", **result)
    print("\n" + ev.report(run))
    if len(events) < o.max_growths:
        print(f"{len(events)} of {o.max_growths} growths happened before the run ended")


def main(argv):
    o = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # one process tells for all
    if world > 1:
        # torch chooses some kernels by timing: another rank's may round differently
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(data.cache_dir() / f"kernels-{rank}"))
        # signals and sums of evaluations pass between CPUs, only gradients between GPUs
        cuda = o.device in ("auto", "cuda") and torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    runs = [o]
    if o.init == PRESETS["demo"]["init"] and not Path(o.init, "config.json").exists():
        runs.insert(0, parse(["pretrain"]))  # which leaves it there
        runs[0].device, runs[0].compile = o.device, o.compile
        runs[0].resume = o.resume = "auto"
    for run in runs:
        check(run, world)
        status = train(run)
        if world > 1:
            dist.barrier()  # until rank 0 has written all
        if status:
            sys.exit(status)
        if run is not o:
            print("\nThe base is ready. Now it grows:\n")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    ev.run_main(main)
