"""Measuring: the one loss, what a run learned and kept, its tables, picture and card, samples.

    python eval.py out/demo                               the tables of a finished run
    python eval.py out/demo out/full --plot=runs.png      one table of several, and a picture
    python eval.py out/demo --prompt "def main():"        sample from it
    python eval.py out/demo --dataset=docs,code           losses of each version, and mixed
    python eval.py gpt2 TUNED --dataset=wikitext2         two models and both mixed
    python eval.py out/demo --version=0 --out=out/before  write a version as a stock GPT-2
    python eval.py gpt2 --dataset=wikitext2               perplexity of any model

Protocol, everywhere: a split is one stream of tokens, cut into windows of block_size tokens that do not
overlap; in each, every token but the first is predicted from those before it. Loss is in nats per predicted
token; perplexity is its exponential. No padding counts, nothing is sampled. The blocks compute in the
precision beside the figures; final norm, head and loss always in float32."""

import argparse
import ctypes
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

# OpenMP's waiting threads spin, and on a busy machine take the core from the thread that they wait for
# (tests/bench.md). It reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import grow
from data import UserError, need
from model import GPT, SIZES

# ----- The machine -----


def choose_machine(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) for two options; sets up torch and the C library."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # no backend passes gradients between MPS devices
    mps = alone and torch.backends.mps.is_available()
    has = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if device == "auto":
        device = next(name for name in has if has[name])  # the best
    need(has[device], f"torch sees no {device} to use here: give --device=auto")
    best = "float32"
    if device == "cpu":
        keep_freed_memory()
        capable = torch.cpu.get_capabilities()
        if any(capable.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):  # x86, x86, ARM
            best = "bfloat16"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        best = "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    return torch.device(device), getattr(torch, best if dtype == "auto" else dtype)


def choose_compile(wish, device):
    """Whether to compile, for --compile=auto, 0 or 1: auto does on CUDA, where it is worth it."""
    if wish == "0" or (wish == "auto" and device.type != "cuda"):
        return False
    # Past its limit of graphs torch would go on eagerly with a log line. Let it raise.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.optimize_ddp = False  # it would cut blocks in two: they are small enough
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as e:  # no C++ compiler, no Triton ...: eager works
        print(f"cannot compile here ({type(e).__name__}): going on eagerly", file=sys.stderr)
        return False
    return True


def keep_freed_memory():
    """Let glibc keep what a step frees: the next asks for the same sizes, and to map and zero new pages is
    up to half of an eager step on a CPU. (mallopt(3))"""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back,
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: and take nothing that must be given back


def over_ranks(tensor, op=dist.ReduceOp.SUM):
    """Reduce a tensor in place over all processes, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


# ----- The one loss -----


def protocol(split, context, device, dtype, mixed=False):
    """What the figures beside it are, in one sentence. On CUDA, float32 matrices are multiplied in TF32."""
    mixed = f"; mixed by Bayes with shares {', '.join(map(str, grow.SHARES))}" if mixed else ""
    tf32 = dtype == torch.float32 and device.type == "cuda" and torch.cuda.is_tf32_supported()
    blocks = "TF32" if tf32 else str(dtype).removeprefix("torch.")
    how = f"{split} split, context {context}, stride {context}, nats per token, mean by token"
    return f"{how}; blocks in {blocks}, logits in float32{mixed}"


def count_windows(count, block_size, windows=0):
    """How many windows `count` tokens have, at most `windows` (0: all). One token predicts nothing."""
    available = math.ceil((count - 1) / block_size)
    return min(windows or available, available)


def window_batches(tokens, block_size, batch_size, windows):
    """Yield (first window's number, inputs, targets), the last two int64 (batch_size, block_size).

    Targets are -1 where nothing is predicted: at a window's last position, and in what fills up the last
    window and batch. If it takes long, a terminal is told how far it is."""
    began = time.perf_counter()
    for first in range(0, windows, batch_size):
        part = tokens[first * block_size : (first + batch_size) * block_size].astype(np.int64)
        ids = torch.full((batch_size, block_size), -1)
        ids.view(-1)[: len(part)] = torch.from_numpy(part)
        seconds = time.perf_counter() - began
        if first and seconds > 5 and sys.stderr.isatty():
            left = seconds / first * (windows - first)
            print(f"\r{first} of {windows} windows, {left:.0f} s left  ", end="", file=sys.stderr)
        yield first, ids.clamp(min=0), F.pad(ids[:, 1:], (0, 1), value=-1)


def logits(model, hidden):
    """(B, T, V) in float32 from the last block's output (B, T, C), under any autocast: near -95, where
    GPT-2's lie, bfloat16 has steps of 0.5."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32 for this one product
    with torch.autocast(hidden.device.type, enabled=False):
        z = model.head(hidden.to(model.wte.weight.dtype)).float()
    torch.set_float32_matmul_precision(before)
    return z


LOGITS = 1 << 24  # so many at a time, or one row's: a batch of long windows takes gigabytes
TOGETHER = 4096  # so many windows at most are kept by token, and mixed in one loop over T


def token_losses(nets, hidden, y, kl=False):
    """Nats (K, B, T) of K networks for targets y (B, T), 0 where y is -1, from their last outputs (B, T, C).
    With `kl`, behind them KL(last but one || last) of each token's distribution: (K + 1, B, T)."""
    rows = max(1, LOGITS // (y.size(1) * nets[-1].config.vocab_size))
    losses = []
    for targets, *outputs in zip(y.split(rows), *(out.split(rows) for out in hidden)):
        nats, log_q = [], None
        for net, x in zip(nets, outputs):
            log_p, log_q = log_q, None  # the one before: nothing else stays in memory
            log_q = F.log_softmax(logits(net, x), -1)  # (rows, T, V)
            nats.append(-log_q.gather(-1, targets.clamp(min=0)[..., None])[..., 0])  # (rows, T)
        if kl:
            nats.append((log_p - log_q).mul_(log_p.exp()).sum(-1))
        losses.append(torch.stack(nats))
    return torch.where(y >= 0, torch.cat(losses, 1), 0.0)


@torch.no_grad()
def measure(nets, tokens, block_size, batch_size=8, windows=0, kl=False):
    """In one pass over the first `windows` windows (0: all) of tokens (N,), by the protocol above, a dict:
    "windows": how many; "losses": of each network; "mixed": of several mixed (grow.mix), else None; "worse":
    on how many windows each, and last the mixture, loses more than a nat to the first network; "kl" if
    asked for, else None: KL(last but one || last), how far the distribution moved, right or wrong.

    Without a text each is None. Ranks share the batches, and all get the result. Raises UserError if
    block_size exceeds a model's or there is nothing to predict."""
    if tokens is None:
        return {"windows": None, "losses": [None] * len(nets), "mixed": None, "worse": None, "kl": None}
    limit = min(net.config.block_size for net in nets)
    need(2 <= block_size <= limit, f"block_size {block_size} is not from 2 to the model's {limit}")
    need(len(tokens) >= 2, "nothing to predict in fewer than two tokens")
    was_training, device, K = nets[-1].training, nets[-1].wte.weight.device, len(nets)
    together = torch.nn.ModuleList(nets).eval()
    windows = count_windows(len(tokens), block_size, windows)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums = torch.zeros(K + 1 + kl, windows + batch_size, dtype=torch.float64)  # for a whole last batch
    nats, numbers = [], []  # of windows not yet in it
    with torch.compiler.set_stance("force_eager"):  # measuring compiles no shapes of its own
        for i, (first, x, y) in enumerate(window_batches(tokens, block_size, batch_size, windows)):
            if i % world == rank:
                x, y = data.to_device(x, device), data.to_device(y, device)
                nats.append(token_losses(nets, grow.run_together(nets, x), y, kl))
                numbers += range(first, first + batch_size)
            if nats and (len(numbers) >= TOGETHER or first + batch_size >= windows):
                nats = torch.cat(nats, 1).cpu().double()  # (K or K + 1, windows, T)
                sums[:, numbers] = torch.stack([*nats.sum(-1), grow.mix(nats[:K]).sum(-1)])
                nats, numbers = [], []
    together.train(was_training)
    sums = over_ranks(sums)[:, :windows]  # each window has one owner: as in one process
    predicted = min(len(tokens), windows * block_size) - windows
    mean = (sums.sum(-1) / predicted).tolist()
    worse = (sums - sums[0] > 1).sum(-1).tolist()
    found = {"windows": windows, "losses": mean[:K], "mixed": mean[-1] if K > 1 else None}
    return found | {"worse": [*worse[:K], worse[-1]], "kl": mean[K] if kl else None}


def evaluate(model, tokens, block_size=None, batch_size=8, windows=0):
    """`measure` for one network: its loss on `tokens` (N,), in nats per predicted token."""
    block_size = block_size or model.config.block_size
    return measure([model], tokens, block_size, batch_size, windows)["losses"][0]


@torch.no_grad()
def block_use(model, tokens, block_size, rows=8):
    """How much each block changes what passes: mean |block(x) - x| / |x| over tokens of the first windows."""
    _, idx, targets = next(window_batches(tokens, block_size, rows, rows))
    use = []
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        x = model.embed(idx.to(model.wte.weight.device))  # (B, T, C)
        for block in model.h:
            before, x = x, block(x)
            changed = ((x - before).norm(dim=-1) / before.norm(dim=-1)).cpu().double()  # (B, T)
            use.append(changed[targets >= 0].mean().item())
    return use


# ----- A run in numbers, all from its metrics.jsonl -----


def by_kind(folder, rows):
    """Rows of a log by kind: header and result are dicts or None, the others lists of dicts."""
    run = {"header": None, "result": None} | {row["kind"]: row for row in rows}
    run |= {kind: [row for row in rows if row["kind"] == kind] for kind in ("step", "eval", "event")}
    return run | {"folder": str(Path(folder)), "name": Path(folder).name}


def read_run(folder, finished=False):
    """A run's metrics.jsonl, by kind. Raises UserError if there is none, or none that is finished."""
    path = Path(folder).absolute() / "metrics.jsonl"
    need(path.exists(), f"no run in {path.parent}; for a model, give --dataset or --prompt")
    run = by_kind(folder, data.read_jsonl(path))
    need(run["result"] or not finished, f"{path.parent} is unfinished: add --resume to its command")
    return run


def forgetting(result, predictor="grown"):
    """Nats of loss on the retained text above the untouched network's; None if not measured."""
    old = result["retain"]
    return None if old[predictor] is None else old[predictor] - old["base"]


def slope(evals, first, last):
    """Nats per 1,000 steps: least squares through validation losses from step `first` to `last`."""
    points = [(e["step"], e["learn"]) for e in evals if first <= e["step"] <= last]
    return 1000 * np.polyfit(*zip(*points), 1)[0] if len(points) > 1 else None


def cells(form, values):
    """Numbers as text, {head: cell}; - for what was not measured."""
    return {head: "-" if value is None else format(value, form) for head, value in values.items()}


def table(rows):
    """Markdown with aligned columns, of rows {head: cell} with the same heads."""
    lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for line in lines:
        line[0] = line[0].ljust(widths[0])  # names to the left, numbers to the right
    return "\n".join("| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines)


def comparison(runs):
    """Losses before and after the runs, alone and mixed, a row each; below, what each run cost."""
    heads = {}
    for key, words in (("learn", "new text"), ("retain", "old text")):
        names = {Path(run["result"][key]["dataset"]).name for run in runs} - {"none"}
        if names:
            heads[key] = f"{words}: {names.pop()}" if len(names) == 1 else words
    same_start = len({run["header"]["init_sha256"] for run in runs}) == 1
    rows, lines = [], sorted({run["result"]["protocol"] for run in runs})
    for run in runs:
        name, start, end = run["name"], run["header"], run["result"]
        before = "before" if same_start else f"before {name}"
        for label, way in ((before, "base"), (f"{name} alone", "grown"), (f"{name} mixed", "mixed")):
            losses = {head: end[key][way] for key, head in heads.items()}
            row = {"nats per token": label} | cells(".4f", losses)
            if set(losses.values()) != {None} and row not in rows:
                rows.append(row)
        new = end["learn"]
        lines.append(
            f"{name}: {start['layers']} -> {end['layers']} layers, {start['parameters']:,} -> "
            f"{end['parameters']:,} parameters, {end['trainable']:,} of them trained at the end; "
            f"{end['tokens']:,} tokens, {end['flops'] / 1e12:,.2f} TFLOP; {end['seconds']:.0f} s in all, "
            f"{end['train_seconds']:.0f} s of them training. Perplexity of the new text "
            f"{np.exp(new['base']):,.2f} -> {np.exp(new['grown']):,.2f}, KL(before, alone) {new['kl']:.4f}."
        )
        if end["retain"]["base"] is not None:
            forgot = cells("+.4f", {"alone": forgetting(end), "mixed": forgetting(end, "mixed")})
            mixed = "" if forgot["mixed"] == "-" else f", {forgot['mixed']} mixed"
            lines.append(f"Above 0 the old text is forgotten: {name} {forgot['alone']} alone{mixed}.")
    return "\n".join([table(rows), "", *lines])


def growths(run):
    """A row for each growth: what it added, that it changed nothing, what came of it. Nothing is
    extrapolated: a few growths make no law."""
    events, evals, start = run["event"], run["eval"], run["header"]
    if not events:
        return "No block was inserted."
    steps = [0, *(e["step"] for e in events), evals[-1]["step"]]
    reached = [*(e["learn_before"] for e in events[1:]), evals[-1]["learn"]]  # just before the next
    generation = [0] * start["layers"]  # of each block, at the end
    for e in events:
        generation[e["at"] : e["at"]] = [e["generation"]] * (e["layers_after"] - e["layers_before"])
    rows = []
    for k, e in enumerate(events):
        before, after = e["learn_before"], e["learn_after"]
        slopes = {"slope before": slope(evals, *steps[k : k + 2])}
        slopes["slope after"] = slope(evals, *steps[k + 1 : k + 3])
        use = [u for u, g in zip(run["result"]["block_use"], generation) if g == e["generation"]]
        row = {"step": e["step"], "layers": f"{e['layers_before']} -> {e['layers_after']}", "at": e["at"]}
        row |= {"added": f"{e['parameters_added']:,}", "tokens": f"{e['tokens']:,}"}
        row |= {"TFLOP": f"{e['flops'] / 1e12:,.2f}", "loss before": f"{before:.6f}"}
        row |= {"loss after": f"{after:.6f}", "delta": f"{after - before:g}"}
        row |= cells("+.3f", slopes)
        row["gain / M params"] = f"{(after - reached[k]) / (e['trainable'] / 1e6):+.4f}"
        rows.append(row | {"use": f"{sum(use) / len(use):.3f}"})
    c = start["config"]
    windows = count_windows(start["tokens"]["learn"]["val"], c["block_size"], c["eval_windows"])
    return f"""{table(rows)}

Losses: on {windows} windows of the validation split, else as above. Delta must be 0: growth keeps every
logit, bit for bit. Slope: nats per 1,000 steps. Gain: nats until the next growth, per million parameters
that trained. Use: |block(x) - x| / |x|."""


def tables(run):
    return f"## Summary of {run['name']}\n{comparison([run])}\n\n## Growths\n{growths(run)}"


def report(run):
    """What a run prints at its end: what came of it, and what can be done with it."""
    folder, end = shlex.quote(run["folder"]), run["result"]
    if not run["event"] and end["retain"]["base"] is None:  # nothing to compare: one line
        losses = f"test loss {end['learn']['base']:.4f} -> {end['learn']['grown']:.4f}"
        return f"{end['learn']['dataset']}: {losses}; the network is in {folder}/model"
    text = f"""{comparison([run])}

The network: {folder}/model
Its growths, and a picture: python eval.py {folder} --plot=run.png
Text from it: python eval.py {folder} --prompt='Once upon a time'"""
    command, c = run["header"]["command"], run["header"]["config"]
    if run["event"] and "--kd" not in command and not (c["replay"] or c["ewc_lambda"]):
        text += f"\nOrdinary fine-tuning: {command} --max_growths=0 --kd_weight=0 --out={folder}-full"
    if len(end["versions"]) > 1:
        texts = [end[key]["dataset"] for key in ("retain", "learn") if end[key]["dataset"] != "none"]
        each = shlex.quote(f"--dataset={','.join(texts)}")
        text += f"\nEvery version on every text: python eval.py {folder} {each} --split=test"
    return text


# ----- Picture and card -----


def plot(runs, path):
    """Losses over steps, growths marked; and the frontier: forgetting against loss on the new text."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from e
    figure = Figure(figsize=(17, 5), layout="constrained")
    new, old, frontier = figure.subplots(1, 3)
    new.set(title="new text, marks: growths", xlabel="step", ylabel="validation loss, nats per token")
    old.set(title="old text", xlabel="step")
    frontier.set(title="test loss; lower left is better", xlabel="new text", ylabel="old text: forgetting")
    frontier.margins(x=0.4)
    frontier.axhspan(-0.1, 0.1, alpha=0)  # so much is seen at least
    for i, run in enumerate(runs):
        name, color, end = run["name"], f"C{i}", run["result"]
        grown = [e["step"] for e in run["event"]]
        for way, suffix, style in (("grown", "", "o-"), ("mixed", "_mixed", "*--")):
            label = f"{name}, mixed" if suffix else name
            for axis, key in ((new, f"learn{suffix}"), (old, f"retain{suffix}")):
                points = [(e["step"], e[key]) for e in run["eval"] if e.get(key) is not None]
                dots = [n for n, (step, _) in enumerate(points) if step in grown]
                if points:
                    axis.plot(*zip(*points), style, color=color, label=label, markevery=dots)
            if end["retain"][way] is not None:
                point = end["learn"][way], forgetting(end, way)
                frontier.plot(*point, style, color=color)
                frontier.annotate(f" {label}", point, va="center")
    for axis in (new, old):
        axis.set_xlim(right=1.35 * axis.get_xlim()[1])  # room for the names
        at, high = axis.get_ylim()
        apart = 0.05 * (high - at)
        for line in sorted(axis.lines, key=lambda line: line.get_ydata()[-1]):
            step, loss = (values[-1] for values in line.get_data())
            at = max(loss, at + apart)  # no name on another
            axis.annotate(f" {line.get_label()}", (step, at), color=line.get_color(), va="center")
    figure.savefig(path, dpi=110)


def model_card(run):
    """The README.md beside a run's export: its numbers and, but for its command, no path of this machine."""
    start, c, result = run["header"], run["header"]["config"], run["result"]
    init, name = Path(c["init"]).name, json.dumps(run["name"])  # JSON is YAML
    learned = Path(result["learn"]["dataset"]).name
    metrics = {"test loss": result["learn"]["grown"], "forgetting": forgetting(result)}
    metrics["test loss on the old text"] = result["retain"]["grown"]
    form = "    - {{type: loss, name: {} in nats per token, value: {:.4f}}}"
    lines = [form.format(*item) for item in metrics.items() if item[1] is not None]
    base = f"base_model: openai-community/{init}\n" if c["init"] in SIZES else ""
    datasets = "datasets: [Salesforce/wikitext]\n" if learned == "wikitext2" else ""
    return f"""---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, growing-network, continual-learning]
{base}{datasets}model-index:
- name: {name}
  results:
  - task: {{type: text-generation}}
    dataset: {{type: {json.dumps(learned)}, name: {json.dumps(learned)}, split: test}}
    metrics:
{chr(10).join(lines)}
---

# Growing GPT: {start["layers"]} -> {result["layers"]} layers
A GPT-2 that started from `{init}` and learned `{learned}`, of which \
{start["tokens"]["learn"]["train"]:,} tokens are for training.

{tables(run)}

## Made by
`{start["command"]}`

## Usage
```python
from transformers import pipeline

generate = pipeline("text-generation", "FOLDER")  # of this file
print(generate("def main():", max_new_tokens={max(1, min(40, c["block_size"] - 11))})[0]["generated_text"])
```

## Limits and licence
One run, one seed: how much runs differ is not shown. transformers loads the last of the versions \
{result["versions"]} alone. The model states falsehoods fluently and repeats the biases of its training text.
Weights derived from OpenAI's GPT-2 are under its Modified MIT License, the code is MIT, and training text
keeps its own licence.
"""


# ----- Samples -----


def sample(nets, prompt, max_new_tokens=100, temperature=0.8, top_k=50, seed=0):
    """The prompt and its continuation as text, by one network or several mixed."""
    vocab_size = nets[-1].config.vocab_size
    ids = torch.tensor([data.encode(prompt, vocab_size).tolist()], device=nets[-1].wte.weight.device)
    net = Mixture(nets) if len(nets) > 1 else nets[0]
    torch.manual_seed(seed)
    ids = net.generate(ids, max_new_tokens, temperature, top_k or None)[0].tolist()
    return data.decode(ids, vocab_size).removesuffix(data.EOT)


class Mixture(torch.nn.Module):
    """K networks that predict together, as one that generates a text; each text needs a new one.

    Their weights move with each token of the prompt but the first, and with each chosen since. Where the
    context is full, its oldest token goes, and the weights stay."""

    generate = GPT.generate

    def __init__(self, nets):
        super().__init__()
        self.nets = torch.nn.ModuleList(nets)
        self.config = min((net.config for net in nets), key=lambda config: config.block_size)
        self.train(nets[-1].training)
        self.log_w = self.log_p = None  # by habit and network (S, K, B), by network (K, B, V)

    def predict(self, idx, cache):
        """Log probabilities (B, V) of what follows idx (B, T); cache: grow.run_together's."""
        hidden = grow.run_together(self.nets, idx, cache=cache)
        if self.log_p is None:  # none predicts the first token: losses of 0 keep weights equal
            y = torch.cat([idx[:, 1:], torch.full_like(idx[:, :1], -1)], 1)  # (B, T)
            losses = token_losses(self.nets, hidden, y).roll(1, -1).cpu().double()  # (K, B, T)
        else:
            losses = -self.log_p.gather(-1, idx[:, -1:].cpu().expand(len(hidden), -1, 1))  # (K, B, 1)
        for loss in losses.unbind(-1):  # (K, B)
            _, self.log_w = grow.mix_token(self.log_w, loss)
        log_p = [logits(net, x[:, -1]) for net, x in zip(self.nets, hidden)]  # of (B, V)
        self.log_p = torch.stack(log_p).cpu().double().log_softmax(-1)
        log_w = self.log_w.logsumexp(0)[..., None]  # of each network (K, B, 1)
        return torch.logsumexp(log_w + self.log_p, 0)


# ----- Command line -----


def parser(usage, description):
    """argparse without abbreviations, with a file's docstring as it stands."""
    lines = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(None, usage, description, formatter_class=lines, allow_abbrev=False)


def arguments(argv):
    p = parser("python eval.py NAME [NAME ...] [--option=value ...]", __doc__)
    add, path = p.add_argument, os.path.expanduser
    add("names", nargs="+", type=path, help="run folders, or models: gpt2 ..., a folder")
    add("--plot", type=path, metavar="FILE.png", help="draw losses and frontier")
    add("--prompt", help="sample a continuation of this text")
    add("--max_new_tokens", type=int, default=100)
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--top_k", type=int, default=50, help="0 samples from all tokens")
    add("--seed", type=int, default=0)
    add("--dataset", help="losses on texts: wikitext2,webtext,docs,code,headers,my.txt ...")
    add("--split", choices=["train", "val", "test"], default="val")
    add("--block_size", type=int, default=0, help="context in tokens (0: the run's or model's)")
    add("--batch_size", type=int, default=8)
    add("--windows", type=int, default=0, help="at most so many (0: all)")
    add("--version", type=int, help="this version alone, as in config.json")
    add("--alpha", type=float, help="0 ... 1: from the last version but one to the last")
    add("--out", type=path, help="write the version, or --alpha's, into a folder")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="float32")
    a = p.parse_args(argv)
    a.texts = a.dataset.split(",") if a.dataset else []
    for text in a.texts:
        data.check_name(text)
    if min(a.temperature, a.top_k, a.block_size, a.windows) < 0:
        p.error("--temperature, --top_k, --block_size and --windows must be 0 or more")
    free = not a.out or (len(a.names) == 1 and not Path(a.out).exists())
    need(free, f"--out={a.out} is for one model, and must be a new folder")
    return a


def measure_texts(a, nets, block_size, device, dtype):
    """A table of losses on --dataset's texts: a row for each of {name: network}, and one for all mixed."""
    networks, found, windows = list(nets.values()), {}, []
    for text in a.texts:
        tokens = data.load(text, networks[0].config.vocab_size, 2)[a.split]
        found[text] = measure(networks, tokens, block_size, a.batch_size, a.windows)
        windows.append(f"{text}, {found[text]['windows']:,} windows of {len(tokens):,} tokens")
    rows = []
    for i, label in enumerate([*nets, "mixed"] if len(nets) > 1 else nets):
        losses = {text: [*m["losses"], m["mixed"]][i] for text, m in found.items()}
        mean = sum(losses.values()) / len(losses)
        losses |= {"average": mean} if len(losses) > 1 else {"perplexity": np.exp(mean)}
        worse = {"worse": sum(m["worse"][i] for m in found.values())}
        rows.append({"network": label} | cells(".4f", losses) | (worse if len(nets) > 1 else {}))
    print(f"{'; '.join(windows)}; {protocol(a.split, block_size, device, dtype, len(nets) > 1)}:\n")
    print(table(rows))
    if len(nets) > 1:
        print("\nworse: windows on which it is worse than the first network by more than a nat")


def find_networks(a, device):
    """({name: network} of all versions of all named models, the context to measure with)."""
    nets, contexts = {}, []
    for name in a.names:
        folder = name
        if Path(name, "metrics.jsonl").exists():  # a run: what it exported
            run, folder = read_run(name, finished=True), f"{name}/model"
            contexts.append(run["header"]["config"]["block_size"])
        model = GPT.from_pretrained(folder).to(device)
        contexts.append(model.config.block_size)
        versions = model.config.versions if a.version is None else [a.version]
        for g in versions if a.alpha is None else versions[-1:]:
            label = f"{name}, version {g}" if len(model.config.versions) > 1 else name
            label += "" if a.alpha is None else f", alpha {a.alpha:g}"
            nets[label] = grow.version(model, g)
            if a.alpha is not None:
                grow.scale_grown(nets[label], a.alpha)
    same = len({net.config.vocab_size for net in nets.values()}) == 1
    need(same, "different tokenizers: measure these networks one by one")
    return nets, a.block_size or min(contexts)


def main(argv):
    a = arguments(argv)
    if a.prompt is None and not (a.texts or a.out):
        runs = [read_run(name, finished=True) for name in a.names]
        if a.plot:
            plot(runs, a.plot)
        print(tables(runs[0]) if len(runs) == 1 else comparison(runs))
        return
    device, dtype = choose_machine(a.device, a.dtype)
    nets, block_size = find_networks(a, device)
    networks = list(nets.values())
    if a.out:
        networks[-1].save_pretrained(a.out)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if a.prompt is not None:
            print(sample(networks, a.prompt, a.max_new_tokens, a.temperature, a.top_k, a.seed))
        if a.texts:
            measure_texts(a, nets, block_size, device, dtype)


def outlive_reader(stream):
    """Let an output go on, by lines, when its terminal or pipe closes: no run is lost with it."""
    stream.reconfigure(line_buffering=True, errors="replace")  # an encoding may lack a character
    write = stream.write

    def write_or_drop(text):
        try:
            write(text)
        except OSError:  # nobody reads any more: the rest goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    stream.write = write_or_drop


def run_main(main):
    """Run a program: what a user can put right becomes one sentence; bugs keep their traceback."""
    outlive_reader(sys.stdout)
    outlive_reader(sys.stderr)
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as e:
        if not data.is_out_of_memory(e):
            raise
        sys.exit("error: out of memory: lower --batch_size (in a new run, raise --grad_accum)")


if __name__ == "__main__":
    run_main(main)
