"""Measuring: the one loss, what a run learned and kept, its tables, picture and card, samples.

    python eval.py out/demo                                      the result tables of a finished run
    python eval.py out/demo out/full --plot=frontier.png         one table for several runs, and a picture
    python eval.py out/demo --prompt "def main():"               sample from it
    python eval.py out/demo --dataset=docs,code                  a matrix: each version, and all of them mixed
    python eval.py out/demo --version=0 --out=out/before         write a version as an ordinary GPT-2
    python eval.py gpt2 --dataset=wikitext2 --block_size=1024    perplexity of any model
    python eval.py gpt2 --lambada                                last-word accuracy on LAMBADA

Protocol, everywhere: a split is one stream of tokens, cut into windows of block_size tokens that do not
overlap; in each window every token but the first is predicted from those before it in the window. Loss is
in nats per predicted token; perplexity is its exponential. No padding counts, nothing is sampled. The blocks
compute in the precision that stands beside the figures, final norm, head and loss always in float32."""

import argparse
import ctypes
import functools
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import grow
from data import UsageError, UserError
from model import GPT, SIZES, cross_entropy

# ----- The machine -----


def choose_machine(device="auto", dtype="auto"):
    """(torch.device, torch.dtype, reasons). Sets what torch and the C library need for the device, and says
    every choice with its reason."""
    why = why_dtype = "asked for"
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # no backend passes gradients between MPS devices
    mps = alone and torch.backends.mps.is_available()
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if device == "auto":
        device, why = next(name for name in there if there[name]), "the fastest that torch sees"
    if not there[device]:
        raise UsageError(f"--device={device}, but torch sees none that can be used: use --device=auto")
    chosen, native = torch.device(device), False
    if device == "cpu":
        capable = torch.cpu.get_capabilities()
        native = any(capable.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # x86, x86, ARM
        keep_freed_memory()
    if device == "cuda":
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > max(gpus, 1):
            raise UsageError(f"{processes} processes for {gpus} GPUs: start fewer, or give --device=cpu")
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        native = torch.cuda.is_bf16_supported(False)
    if dtype == "auto":
        dtype = "bfloat16" if native else "float16" if device == "cuda" else "float32"
        why_dtype = "native here" if native else "no native bfloat16"
        if device == "mps":
            dtype, why_dtype = "float32", "autocast is not used on mps"
    return chosen, getattr(torch, dtype), [f"device {chosen}: {why}", f"dtype {dtype}: {why_dtype}"]


def choose_compile(wish, device):
    """(compile or not, the reason) for --compile=auto, 0 or 1."""
    if wish == "0" or (wish == "auto" and device.type != "cuda"):
        return False, "asked for" if wish == "0" else "by default only on CUDA"
    # Past its limit of graphs torch would go on eagerly with no more than a log line. Let it raise.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.optimize_ddp = False  # it would cut blocks in two; blocks are small enough
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as e:  # no C++ compiler, no Triton ...: whatever it is, eager works
        return False, f"impossible here ({type(e).__name__}), so eagerly"
    return True, "asked for" if wish == "1" else "worth it on CUDA"


def keep_freed_memory():
    """On a CPU: let glibc keep what a step frees, for the next step asks for the same sizes again. By default
    it gives large pieces back, and the system maps and zeroes them anew: up to half of an eager step.
    (mallopt(3); other allocators are left alone.)"""
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)  # give nothing back,
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)  # and take nothing that would have to be given back


# ----- The one loss -----


def protocol(split, context, device, dtype, average="token", share=None):
    """What the figures beside it are, in one sentence. On CUDA, products of float32 matrices are in TF32."""
    mixed = "" if share is None else f"; mixed with share {share:g}"
    tf32 = dtype == torch.float32 and device.type == "cuda" and torch.cuda.is_tf32_supported()
    blocks = "TF32" if tf32 else str(dtype).removeprefix("torch.")
    how = f"{split} split, context {context}, stride {context}, nats per token, mean by {average}"
    return f"{how}; blocks in {blocks}, logits in float32{mixed}"


def count_windows(count, block_size, windows=0):
    """How many windows `count` tokens have, at most `windows` (0: all). One token alone predicts nothing."""
    available = max(math.ceil(count / block_size) - (count % block_size == 1), 1)
    return min(windows or available, available)


def window_batches(tokens, block_size, batch_size, windows):
    """Yield (number of the first window, inputs, targets), the last two (batch_size, block_size) int64.

    Targets are -1 where nothing is predicted: at each window's last position, and in what fills up the last
    window and the last batch."""
    for first in range(0, windows, batch_size):
        part = tokens[first * block_size : (first + batch_size) * block_size].astype(np.int64)
        ids = torch.full((batch_size, block_size), -1)
        ids.view(-1)[: len(part)] = torch.from_numpy(part)
        yield first, ids.clamp(min=0), F.pad(ids[:, 1:], (0, 1), value=-1)


def with_time_left(batches, windows):
    """Pass on batches of windows. If it takes long, stderr says how far it is: every second in one line of a
    terminal, every half minute elsewhere."""
    every, end = (1, "\r") if sys.stderr.isatty() else (30, "\n")
    began = said = time.perf_counter()
    for first, x, y in batches:
        now = time.perf_counter()
        if first and now - said > every and now - began > 5:
            left = (now - began) / first * (windows - first)
            print(f"{first} of {windows} windows, {left:.0f} s left  ", end=end, file=sys.stderr, flush=True)
            said = now
        yield first, x, y


def logits(model, hidden):
    """(B, T, V) in float32 from the last block's output (B, T, C), under any autocast: near -95, where those
    of GPT-2 lie, bfloat16 has steps of 0.5."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    with torch.autocast(hidden.device.type, enabled=False):
        z = model.head(hidden.to(model.wte.weight.dtype)).float()
    torch.set_float32_matmul_precision(before)
    return z


@torch.no_grad()
def sum_windows(measure, device, tokens, block_size, batch_size=8, windows=0, mixed_first=0, share=0.0):
    """Add up, in each window, what measure(x, y) says of its predicted tokens: K tensors (B, T).

    Returns (K + 1, windows) in float64: the sums, and how many tokens were predicted. windows = 0 takes the
    whole split. If the `mixed_first` first of the K are losses to be mixed, the sums of their mixture come
    before the others: (K + 2, windows). Ranks share the batches, and all get the whole result."""
    windows = count_windows(len(tokens), block_size, windows)
    batches = window_batches(tokens, block_size, batch_size, windows)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    measured = {}  # number of a batch's first window: what was measured there
    with torch.compiler.set_stance("force_eager"):  # measuring must not compile shapes of its own
        for i, (first, x, y) in enumerate(batches if rank else with_time_left(batches, windows)):
            if i % world == rank:
                x, y = data.to_device(x, device), data.to_device(y, device)
                values = torch.stack([*measure(x, y), (y >= 0).float()])  # (K + 1, B, T)
                measured[first] = torch.where(y >= 0, values, 0.0)
    for first, values in measured.items():  # fetched after everything is launched
        values = values.cpu().double()  # (K + 1, B, T)
        if mixed_first:
            values = torch.cat([grow.mix(values[:mixed_first], share)[None], values])
        measured[first] = values.sum(-1)
    if world > 1:  # each window has one owner, so these are the sums of a single process, to the last bit
        everyone = [None] * world
        dist.all_gather_object(everyone, measured)
        measured = {first: sums for one in everyone for first, sums in one.items()}
    return torch.cat([measured[first] for first in sorted(measured)], 1)[:, :windows]


def evaluate(model, tokens, block_size=None, batch_size=8, windows=0, average="token"):
    """Loss of `model` on `tokens` (N,), in nats per predicted token, by the protocol above.

    average="token" weighs every predicted token alike; "window" is the mean of the windows' means, as
    published GPT-2 perplexities often are. Raises UserError if block_size exceeds the model's or there is
    nothing to predict."""
    return evaluate_together([model], tokens, block_size, batch_size, windows, average)[0]


def evaluate_together(
    nets, tokens, block_size=None, batch_size=8, windows=0, average="token", share=0.0, kl=False
):
    """As `evaluate`, in one pass over the text: [loss of each network ..., loss of their mixture], and with
    `kl` KL(last but one || last), how far the distribution moved, right or wrong."""
    limit = nets[-1].config.block_size
    block_size = block_size or limit
    if not 2 <= block_size <= limit:
        raise UserError(f"block_size must be from 2 to the model's {limit}, not {block_size}")
    if len(tokens) < 2:
        raise UserError("there is nothing to predict in fewer than two tokens")

    def measure(x, y):
        log_q, targets = None, y.clamp(min=0)[..., None]  # (B, T, 1)
        for net, hidden in zip(nets, grow.run_together(nets, x)):
            log_p, log_q = log_q if kl else None, None  # one that is not needed does not stay in memory
            log_q = F.log_softmax(logits(net, hidden), -1)  # (B, T, V)
            yield -log_q.gather(-1, targets)[..., 0]  # (B, T)
        if kl:  # row by row: so no more than p, q and the logits that q is made from are ever alive at once
            yield torch.stack([(p.exp() * (p - q)).sum(-1) for p, q in zip(log_p, log_q)])  # (B, T)

    was_training, device = nets[-1].training, nets[-1].wte.weight.device
    for net in nets:
        net.eval()
    sums = sum_windows(measure, device, tokens, block_size, batch_size, windows, len(nets), share)
    for net in nets:
        net.train(was_training)
    mixed, *each, predicted = sums  # (windows,) each
    each.insert(len(nets), mixed)
    if average == "window":
        return [(nats / predicted).mean().item() for nats in each]
    return [(nats.sum() / predicted.sum()).item() for nats in each]


def compare(base, grown, tokens, block_size, batch_size=8, windows=0, share=0.0):
    """A text's part of a result row: its windows, the losses of `base`, of `grown` and of all versions of
    `grown` mixed (of which `base` is the last but one; None if there is only one), and KL(base || grown), in
    nats per predicted token. All None where there are no tokens."""
    names = ("windows", "base", "grown", "mixed", "kl")
    if tokens is None:
        return dict.fromkeys(names)
    versions = grown.config.versions
    nets = [*(grow.version(grown, g) for g in versions[:-2]), base, grown]
    *_, below, above, mixed, kl = evaluate_together(
        nets, tokens, block_size, batch_size, windows, share=share, kl=True
    )
    count = count_windows(len(tokens), block_size, windows)
    return dict(zip(names, (count, below, above, mixed if len(versions) > 1 else None, kl)))


def block_use(model, tokens, block_size, rows=8):
    """For each block, mean over tokens of |block(x) - x| / |x|: how much it changes what passes."""

    def measure(x, y):
        x = model.embed(x)  # (B, T, C)
        for block in model.h:
            out = block(x)
            yield (out - x).norm(dim=-1) / x.norm(dim=-1)  # (B, T)
            x = out

    model.eval()
    *sums, predicted = sum_windows(measure, model.wte.weight.device, tokens, block_size, rows, rows)
    return [(total.sum() / predicted.sum()).item() for total in sums]


@torch.no_grad()
def lambada(model):
    """Accuracy (every token of the last word greedily right) and perplexity per last word, one passage at a
    time, as lm-eval's task lambada_openai measures them."""
    if model.config.vocab_size != data.GPT2:
        raise UsageError("LAMBADA is measured in GPT-2's tokens, and this model has another vocabulary")
    passages, right, nats = data.lambada(), 0, 0.0
    for text in passages:
        context, word = text.rsplit(" ", 1)
        target = data.encode(" " + word)
        ids = np.concatenate([data.encode(context), target])[-model.config.block_size :].astype(np.int64)
        ids = torch.from_numpy(ids).to(model.wte.weight.device)
        z = logits(model, model.run(model.embed(ids[None, :-1])))[0, -len(target) :]  # (n, V)
        y = ids[-len(target) :]  # (n,)
        nats += cross_entropy(z, y).sum().item()
        right += torch.equal(z.argmax(-1), y)
    count = len(passages)
    return {"accuracy": right / count, "perplexity": ppl(nats / count), "passages": count}


# ----- A run in numbers. Everything comes from its metrics.jsonl. -----


def read_run(folder):
    """A run's metrics.jsonl by kind: header and result are dicts, the others lists of dicts."""
    path = Path(folder).absolute() / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"no run in {path.parent}; to measure a model, give --dataset, --lambada or --prompt")
    run = {"header": None, "step": [], "eval": [], "event": [], "result": None}
    for row in data.read_jsonl(path):
        kind = row.pop("kind", None) if isinstance(row, dict) else None
        if kind not in run:
            raise UserError(f"{path}: a row of unknown kind {kind!r}")
        run[kind] = row if kind in ("header", "result") else [*run[kind], row]
    if run["header"] is None:
        raise UserError(f"{path}: no header row")
    if run["result"] and "versions" not in run["result"]:
        raise UserError(f"{path} is of an earlier program: run its command again, with a new --out")
    return {"folder": str(Path(folder)), **run}


def unfinished(folder):
    return UserError(f"{Path(folder).absolute()} is not finished: run its command again with --resume")


def ppl(loss):
    return math.exp(min(loss, 700))


def forgetting(result, predictor="grown"):
    """Nats by which the loss on the retained text exceeds the untouched network's; None if not measured."""
    old = result["retain"]
    return None if old[predictor] is None else old[predictor] - old["base"]


def slope(evals, first, last):
    """Nats per 1,000 steps: least squares through the validation losses from step `first` to `last`."""
    points = [(e["step"], e["learn"]) for e in evals if first <= e["step"] <= last]
    return 1000 * np.polyfit(*zip(*points), 1)[0] if len(points) > 1 else None


def scaling_rows(run):
    """One dict per growth. Nothing is extrapolated: a few growths make no law."""
    events, evals, rows = run["event"], run["eval"], []
    steps = [0, *(e["step"] for e in events), evals[-1]["step"]]
    reached = [*(e["learn_before"] for e in events[1:]), evals[-1]["learn"]]  # just before what came next
    generation = [0] * run["header"]["layers"]  # of each block, at the end
    for e in events:
        generation[e["at"] : e["at"]] = [e["generation"]] * (e["layers_after"] - e["layers_before"])
    for k, e in enumerate(events):
        use = [u for u, g in zip(run["result"]["block_use"], generation) if g == e["generation"]]
        rows.append({
            **{key: e[key] for key in ("step", "tokens", "parameters", "flops")}, "layers": e["layers_after"],
            "loss_before": e["learn_before"], "loss_after": e["learn_after"],
            "slope_before": slope(evals, *steps[k : k + 2]),
            "slope_after": slope(evals, *steps[k + 1 : k + 3]),
            "gain_per_million": (e["learn_after"] - reached[k]) / (e["trainable"] / 1e6),
            "use": sum(use) / len(use),
        })  # fmt: skip
    return rows


def markdown(rows):
    """A table with aligned columns. A row is a list of (column's head, value, format); None is shown as -."""
    lines = [[head for head, _, _ in rows[0]]]
    lines += [["-" if value is None else format(value, form) for _, value, form in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for line in lines:
        line[0] = line[0].ljust(widths[0])  # names to the left, numbers to the right
    return "\n".join("| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines)


def comparison(runs):
    """Base against grown: a row for each text that a run measured, and below it a line for each run."""
    texts = [(name, run, run["result"][name]) for name in ("learn", "retain") for run in runs]
    rows = [
        [("text", f"{name}: {text['dataset']}", ""), ("run", Path(run["folder"]).name, ""),
         ("loss base", text["base"], ".4f"), ("loss grown", text["grown"], ".4f"),
         ("change", text["grown"] - text["base"], "+.4f"), ("loss mixed", text["mixed"], ".4f"),
         ("change mixed", None if text["mixed"] is None else text["mixed"] - text["base"], "+.4f"),
         ("KL(base, grown)", text["kl"], ".4f"),
         ("ppl base", ppl(text["base"]), ".2f"), ("ppl grown", ppl(text["grown"]), ".2f"),
         ("windows", text["windows"], ",")]
        for name, run, text in texts if text["base"] is not None
    ]  # fmt: skip
    protocols = sorted({run["result"]["protocol"] for run in runs})
    return "\n".join([markdown(rows), "", *protocols, *map(summary, runs)])


def summary(run):
    """What a run changed, and what it cost."""
    r, start = run["result"], run["header"]
    forgot, mixed = forgetting(r), forgetting(r, "mixed")
    forgot = "was not measured" if forgot is None else f"{forgot:+.4f}"
    forgot += "" if mixed is None else f" alone, {mixed:+.4f} mixed"
    return f"""{Path(run["folder"]).name}: {start["layers"]} -> {r["layers"]} layers, \
{start["parameters"]:,} -> {r["parameters"]:,} parameters, {r["trainable"]:,} trainable at the end; \
{r["tokens"]:,} tokens, {r["flops"] / 1e12:,.2f} TFLOP; {r["seconds"]:.0f} s in all, \
{r["train_seconds"]:.0f} s of them training; forgetting {forgot}"""


def growths(run):
    """A row for each growth: what it added, that it changed nothing, and what came of it."""
    rows = [
        [("step", e["step"], ""), ("layers", f"{e['layers_before']} -> {e['layers_after']}", ""),
         ("at", e["at"], ""), ("added", e["parameters_added"], ","), ("tokens", e["tokens"], ","),
         ("TFLOP", e["flops"] / 1e12, ",.2f"), ("loss before", e["learn_before"], ".6f"),
         ("loss after", e["learn_after"], ".6f"), ("delta", e["learn_after"] - e["learn_before"], "g"),
         ("slope before", s["slope_before"], "+.3f"), ("slope after", s["slope_after"], "+.3f"),
         ("gain / M params", s["gain_per_million"], "+.4f"), ("use", s["use"], ".3f")]
        for e, s in zip(run["event"], scaling_rows(run))
    ]  # fmt: skip
    if not rows:
        return "no growth"
    start, c = run["header"], run["header"]["config"]
    windows = count_windows(start["tokens"]["learn"]["val"], c["block_size"], c["eval_windows"])
    return f"""{markdown(rows)}

Losses: on {windows} windows of the validation split, else as above; delta must be 0. Slope: nats per 1,000
steps. Gain: nats until the next growth, per million parameters that trained. Use: |block(x) - x| / |x|."""


def texts_learned(init, retain):
    """The texts on which the versions in a run's `init` ended, in order: as that run's log says, if there is
    one, else the old text that was named."""
    try:
        return read_run(Path(init).parent)["result"]["learned"]
    except (UserError, TypeError, KeyError):  # no run, or none that is finished
        return [] if retain == "none" else [retain]


def as_typed(options, presets=()):
    return shlex.join([*presets, *(f"--{name}={value}" for name, value in options.items())])


def report(run):
    """A finished run in Markdown: printed when it ends, or by eval.py, and part of its card."""
    folder, typed = shlex.quote(run["folder"]), run["header"]["typed"]
    cache = f" --cache_dir={shlex.quote(typed['cache_dir'])}" if "cache_dir" in typed else ""
    text = f"""## Summary of {run["folder"]}
{comparison([run])}

## Growths
{growths(run)}

The model: {folder}/model
These tables again: python eval.py {folder}
A picture of them: python eval.py {folder} --plot=run.png
Text from the model: python eval.py {folder} --prompt='Once upon a time'{cache}"""
    versions, learned = run["result"]["versions"], run["result"]["learned"]
    if 1 < len(versions) == len(learned) and not any("," in name for name in learned):
        texts = shlex.quote(f"--dataset={','.join(learned)}")
        text += f"\nEvery version on every text: python eval.py {folder} {texts} --split=test{cache}"
    if len(versions) > 1 and "headers" not in learned:
        options = typed | {"init": f"{run['folder']}/model", "dataset": "headers"}
        options |= {"retain": run["header"]["config"]["dataset"], "out": f"{run['folder']}-headers"}
        options.pop("resume", None)
        words = as_typed(options, run["header"]["presets"])
        text += f"\nLearn one more and keep all: python train.py {words}"
    return text


# ----- Picture and card -----


def plot(runs, path):
    """Losses over steps with the growths marked, and the frontier: forgetting against the new text's loss."""
    path = Path(path).absolute()
    if path.suffix not in (".png", ".pdf", ".svg") or not path.parent.is_dir():
        raise UsageError(f"--plot={path}: name a .png, .pdf or .svg file in a folder that exists")
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from e
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    curves, frontier = figure.subplots(1, 2)
    curves.set(xlabel="step", ylabel="validation loss", title="learn (solid), retain (dashed), growths")
    frontier.set(xlabel="learn: test loss", ylabel="retain: forgetting", title="lower left is better")
    for i, run in enumerate(runs):
        name, color, r = Path(run["folder"]).name, f"C{i}", run["result"]
        steps, new, old = zip(*((e["step"], e["learn"], e["retain"]) for e in run["eval"]))
        curves.plot(steps, new, color=color, label=name)
        for e in run["event"]:
            curves.plot(e["step"], e["learn_after"], "o", color=color)
        if r["retain"]["base"] is not None:
            curves.plot(steps, old, "--", color=color)
        for predictor, label in {"grown": name, "mixed": f"{name}, mixed"}.items():
            if r["retain"][predictor] is not None:
                point = r["learn"][predictor], forgetting(r, predictor)
                frontier.plot(*point, "o" if predictor == "grown" else "*", color=color)
                frontier.annotate(label, point)
    curves.legend()
    figure.savefig(path, dpi=130)
    print(f"picture: {path}", file=sys.stderr)


def model_card(run):
    """The README.md that stands beside a run's export, filled with this run's numbers only."""
    start, c, folder = run["header"], run["header"]["config"], f"{run['folder']}/model"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    encode, decode = 'tokenizer.encode("def main():")', "tokenizer.decode(ids)"
    if start["vocab_size"] == data.BYTES:
        tokenizer, encode = "# a token is a byte", 'list(b"def main():")'
        decode = 'bytes(i for i in ids if i < 256).decode(errors="replace")'
    versions, mixing, grew = run["result"]["versions"], "", "No block was inserted."
    if run["event"]:
        grew = """While it trained, blocks were inserted, both output projections of each zero: at every
growth, the logits of a batch of validation windows stayed the same, bit for bit."""
    if len(versions) > 1:
        mixing = f"""transformers loads the last version alone: mixing {versions} needs the program that wrote
this. """
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# Growing GPT: {start["layers"]} -> {run["result"]["layers"]} layers
A GPT-2 that started from `{c["init"]}` and learned `{c["dataset"]}`, of which \
{start["tokens"]["learn"]["train"]:,} tokens are for training.
{grew}

{report(run)}

## Options
`{start["command"]}`

{markdown([[("option", f"--{name}", ""), ("value", repr(v), "")] for name, v in c.items()])}

## Usage
```python
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("{folder}")
{tokenizer}
prompt = torch.tensor([{encode}])
mask, new = torch.ones_like(prompt), {max(1, min(40, c["block_size"] - 11))}
ids = model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=50)[0]
print({decode})
```

## Limits and licence
{mixing}One run, one seed: how much runs differ is not shown. The model states falsehoods fluently and repeats
the biases of its training text. Weights derived from OpenAI's GPT-2 are under its Modified MIT License, the
code is MIT, and training text keeps its own licence.
"""


# ----- Command line -----


def sample(nets, prompt, max_new_tokens=100, temperature=0.8, top_k=50, seed=0, share=0.0):
    """The prompt and its continuation, as text: by one network, or by several mixed."""
    vocab_size = nets[-1].config.vocab_size
    prompt = data.encode(prompt, vocab_size).tolist()
    torch.manual_seed(seed)
    ids = torch.tensor([prompt], device=nets[-1].wte.weight.device)
    mixed = mixed_prediction(nets, share) if len(nets) > 1 else None
    ids = nets[-1].generate(ids, max_new_tokens, temperature, top_k or None, next_logits=mixed)[0].tolist()
    return data.decode(prompt + [i for i in ids[len(prompt) :] if i != vocab_size - 1], vocab_size)


def mixed_prediction(nets, share=0.0):
    """For GPT.generate: a function from the ids so far (B, T) to log probabilities (B, V) of what comes next,
    by K networks mixed. It remembers their weights, so each text needs a new one.

    The weights move with each token of the prompt but the first, and with each that was chosen since. Where
    the context is full, its oldest token goes, and the weights stay."""
    log_w = log_p = None  # (K, B), (K, B, V)

    def next_logits(idx):
        nonlocal log_w, log_p
        window = idx[:, -nets[-1].config.block_size :]
        outputs = list(zip(nets, grow.run_together(nets, window)))  # K of (B, T, C)
        if log_p is None:
            losses = [cross_entropy(logits(net, x[:, :-1]), window[:, 1:]) for net, x in outputs]
            losses = torch.stack(losses).cpu().double()  # (K, B, T - 1)
        else:
            losses = -log_p.gather(-1, idx[:, -1:].cpu().expand(len(nets), -1, 1))  # (K, B, 1)
        for loss in losses.unbind(-1):  # (K, B)
            _, log_w = grow.mix_token(log_w, loss, share)
        log_p = torch.stack([logits(net, x[:, -1]) for net, x in outputs]).cpu().double().log_softmax(-1)
        if log_w is None:  # one token in the prompt: nobody has predicted anything yet
            return torch.logsumexp(log_p, 0)
        return torch.logsumexp(log_w[..., None] + log_p, 0)  # (B, V)

    return next_logits


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with its errors in one sentence and its help in long lines."""

    def __init__(self, prog, **more):
        raw = functools.partial(argparse.RawDescriptionHelpFormatter, width=110)
        super().__init__(prog, formatter_class=raw, allow_abbrev=False, **more)

    def error(self, message):
        raise UsageError(f"{message} (see python {self.prog} --help)")


# An option that does nothing without another one, or without one of several.
NEEDS = dict.fromkeys(("--split", "--block_size", "--batch_size", "--windows", "--average"), "--dataset")
NEEDS |= dict.fromkeys(("--max_new_tokens", "--temperature", "--top_k", "--seed"), "--prompt")
NEEDS |= dict.fromkeys(("--device", "--dtype"), "--dataset --prompt --lambada")
NEEDS |= {"--share": "--dataset --prompt", "--out": "--version --alpha"}
NEEDS["--cache_dir"] = "--dataset --prompt --lambada --out"
NEEDS |= dict.fromkeys(("--version", "--alpha"), "--out --dataset --prompt --lambada")


def arguments(argv):
    p = Parser("eval.py", description=__doc__)
    p.add_argument("names", nargs="+", help="run folders, or one model: gpt2, gpt2-medium ..., a folder")
    p.add_argument("--json", action="store_true", help="print results as JSON")
    p.add_argument("--plot", metavar="FILE.png", help="draw losses and frontier of the runs")
    p.add_argument("--prompt", help="sample a continuation of this text")
    p.add_argument("--max_new_tokens", type=int, default=100)
    p.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    p.add_argument("--top_k", type=int, default=50, help="0 samples from all tokens")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dataset", help="perplexity on texts: wikitext2,webtext,docs,code,headers,my.txt ...")
    p.add_argument("--split", choices=["train", "val", "test"], default="val")
    p.add_argument("--block_size", type=int, default=0, help="context in tokens (0: the run's, or model's)")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--windows", type=int, default=0, help="only the first this many windows (0: all)")
    p.add_argument("--average", choices=["token", "window"], default="token",
                   help="what counts alike: every token, or every window")  # fmt: skip
    p.add_argument("--lambada", action="store_true", help="last-word accuracy and perplexity")
    p.add_argument("--version", type=int, help="this version of the model alone, as in its config.json")
    p.add_argument("--share", type=float, help="of the mixture's weights, spread at each token (default: 0)")
    p.add_argument("--alpha", type=float, help="0 ... 1: between the last version but one and the last")
    p.add_argument("--out", help="write the version, or what --alpha makes of the last, into this folder")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="float32")
    p.add_argument("--cache_dir", default="")
    a = p.parse_args(argv)
    if a.dataset:
        a.texts = [a.dataset] if Path(a.dataset).exists() else a.dataset.split(",")
        for text in a.texts:
            data.check_name(text)
    for path in (a.out, f"{Path(a.out)}.tmp") if a.out else ():  # where save_pretrained writes
        if Path(path).exists():
            raise UsageError(f"{Path(path).absolute()} exists: give another --out")
    typed = {word.partition("=")[0] for word in argv if word.startswith("--")}
    refused = {
        f"--out={a.out} is for one model, and {len(a.names)} are named": a.out and len(a.names) > 1,
        "--dataset, --out and --plot need a value": "" in (a.dataset, a.out, a.plot),
        f"--share must be from 0 to 1, not {a.share}": not 0 <= (a.share or 0) <= 1,
        f"--alpha must be from 0 to 1, not {a.alpha}": not 0 <= (a.alpha or 0) <= 1,
        "--seed must be from 0 to 4294967295": not 0 <= a.seed < 2**32,
        "--temperature must be 0, or from 0.01 to 100": a.temperature and not 0.01 <= a.temperature <= 100,
        "--seed and --top_k do nothing with --temperature=0": not a.temperature
        and typed & {"--seed", "--top_k"},
        "--batch_size and --max_new_tokens must be 1 or more": min(a.batch_size, a.max_new_tokens) < 1,
        "--windows, --top_k and --block_size must be 0 or more": min(a.windows, a.top_k, a.block_size) < 0,
    }
    for sentence, is_so in refused.items():
        if is_so:
            raise UsageError(sentence)
    measures = typed & {"--dataset", "--prompt", "--lambada", "--out"}
    for option in sorted(typed):
        if option in NEEDS and not typed.intersection(NEEDS[option].split()):
            raise UsageError(f"{option} does nothing without {NEEDS[option].replace(' ', ' or ')}")
        if option in ("--json", "--plot") and measures:
            raise UsageError(f"{option} is for the tables of runs: not with {', '.join(measures)}")
    return a


def print_tables(a):
    """Of finished runs, as text or as JSON, after their picture."""
    finished, others = [], []
    for name in a.names:
        try:
            run = read_run(name)
            if not run["result"]:
                raise unfinished(name)
            finished.append(run)
        except UserError as e:
            others.append(e)
    if not finished:
        raise others[0]
    for e in others:
        print(e, file=sys.stderr)
    if a.plot:
        plot(finished, a.plot)
    if a.json:
        rows = [
            {"run": run["folder"], "command": run["header"]["command"], **run["result"],
             "forgetting": forgetting(run["result"]), "forgetting_mixed": forgetting(run["result"], "mixed"),
             "scaling": scaling_rows(run)}
            for run in finished
        ]  # fmt: skip
        print(json.dumps(rows, indent=1, allow_nan=False))
    elif len(finished) == 1:
        print(report(finished[0]))
    else:
        print(comparison(finished))


def load_networks(a, name):
    """Of a run or a model: the versions to be mixed, or the one that was asked for; the context in tokens."""
    folder, context = name, 0
    if name not in SIZES and (Path(name) / "metrics.jsonl").exists():  # a run: what it exported
        run, folder = read_run(name), f"{name}/model"
        if not run["result"] or not Path(folder).exists():  # what lies there may be of an earlier end
            raise unfinished(name)
        context = run["header"]["config"]["block_size"]
    model = GPT.from_pretrained(folder).eval()
    nets = [grow.version(model, g) for g in model.config.versions]
    if a.version is not None:
        nets = [grow.version(model, a.version)]
    if a.alpha is not None:
        grow.scale_grown(nets[-1], a.alpha)
        nets = nets[-1:]
    if a.share is not None and len(nets) == 1:
        raise UsageError("--share does nothing where one version is measured alone: leave it out")
    return nets, a.block_size or context or model.config.block_size


def measure_texts(a, name, nets, context, device, dtype):
    """A table of losses on the texts of --dataset: a row for each network, and one for all of them mixed."""
    columns, windows, share = [], [], a.share or 0.0
    for text in a.texts:
        tokens = data.load(text, nets[-1].config.vocab_size, 2)[a.split]
        columns.append(evaluate_together(nets, tokens, context, a.batch_size, a.windows, a.average, share))
        count = count_windows(len(tokens), context, a.windows)
        windows.append(f"{text}, {count:,} windows of {len(tokens):,} tokens")
    how = protocol(a.split, context, device, dtype, a.average, share if len(nets) > 1 else None)
    head = f"{name} on {'; '.join(windows)}; {how}:"
    if len(nets) == len(columns) == 1:
        return f"{head}\nloss {columns[0][0]:.4f}, perplexity {ppl(columns[0][0]):.4f}"
    versions = [net.config.versions[-1] for net in nets] + (["mixed"] if len(nets) > 1 else [])
    versions = versions if a.alpha is None else [f"{versions[0]}, alpha {a.alpha:g}"]
    rows = [
        [("version", version, ""), *((text, losses[k], ".4f") for text, losses in zip(a.texts, columns)),
         ("average", sum(losses[k] for losses in columns) / len(columns), ".4f")]
        for k, version in enumerate(versions)
    ]  # fmt: skip
    rows = rows if len(columns) > 1 else [row[:-1] for row in rows]
    table = f"{head}\n\n{markdown(rows)}"
    if len(nets) != len(columns):
        return table
    earlier = list(enumerate(columns[:-1]))  # version k ended on text k
    last, mixed = (sum(losses[row] - losses[k] for k, losses in earlier) / len(earlier) for row in (-2, -1))
    return f"""{table}

Backward transfer, if the texts are in the order learned, in nats per token: last version {last:+.4f}, mixed \
{mixed:+.4f}. What is positive was forgotten."""


def main(argv):
    a = arguments(argv)
    data.set_cache_dir(a.cache_dir)
    if a.prompt is None and not (a.dataset or a.lambada or a.out):
        return print_tables(a)
    device, dtype, reasons = choose_machine(a.device, a.dtype)
    print(*reasons, sep="; ", file=sys.stderr)
    for name in a.names:
        nets, context = load_networks(a, name)
        if a.out:
            nets[-1].save_pretrained(a.out)
            print(f"written: {Path(a.out).absolute()}")
        for net in nets:
            net.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if a.prompt is not None:
                how = a.max_new_tokens, a.temperature, a.top_k, a.seed, a.share or 0.0
                print(sample(nets, a.prompt, *how))
            if a.lambada:
                r, alone = lambada(nets[-1]), ", last version alone," if len(nets) > 1 else ""
                print(f"{name}{alone} on LAMBADA ({r['passages']:,} passages, last word): "
                      f"accuracy {r['accuracy']:.4f}, perplexity {r['perplexity']:.2f}")  # fmt: skip
            if a.dataset:
                print(measure_texts(a, name, nets, context, device, dtype))


def run_main(main):
    """Run a program: a UserError becomes one sentence on stderr and status 1; a bug keeps its traceback."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.status)
    except (RuntimeError, MemoryError) as e:
        if not data.is_out_of_memory(e):
            raise
        print("error: out of memory: use a smaller model or --batch_size", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as e:  # the disk, a permission, a file that is no file: nothing that a traceback explains
        print(f"error: {e.filename or 'input or output'}: {e.strerror or e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
