"""Measuring: the one loss, what a run learned and kept, its tables, picture and card, samples.

    python eval.py out/demo                                      the result tables of a finished run
    python eval.py out/* --plot=frontier.png                     one table for all runs, and a picture
    python eval.py out/demo --prompt "def main():"               sample from it
    python eval.py gpt2 --dataset=wikitext2 --block_size=1024    perplexity of any model
    python eval.py gpt2 --lambada                                last-word accuracy on LAMBADA

Protocol, everywhere: a split is one stream of tokens, cut into windows of block_size tokens that do not
overlap; in each window every token but the first is predicted from those before it in the window. Loss is
in nats per predicted token; perplexity is its exponential. No padding counts, nothing is sampled."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from data import UsageError, UserError
from model import GPT, SIZES, cross_entropy

# ------------------------------------------------------------------------------------------------------------
# The one loss


def window_batches(tokens, block_size, batch_size, windows):
    """Yield (slice of windows, inputs, targets), tensors of shape (batch_size, block_size); targets are -1
    where nothing is predicted: at each window's last position, and in what fills up the last window and
    the last batch."""
    for first in range(0, windows, batch_size):
        ids = torch.full((batch_size, block_size + 1), -1)
        for row in range(min(batch_size, windows - first)):
            window = tokens[(first + row) * block_size :][:block_size]
            ids[row, : len(window)] = torch.from_numpy(window.astype(np.int64))
        yield slice(first, first + batch_size), ids[:, :-1].clamp(min=0), ids[:, 1:]


@torch.no_grad()
def sum_windows(values, K, device, tokens, block_size, batch_size=8, windows=0):
    """Sums of each window, (K + 1, N) float64, of the K numbers per token that values(x, y) gives, (K, B, T);
    the last row counts the predicted tokens.

    windows = 0 takes the whole split. Ranks share the batches, and all get the whole result."""
    available = max(math.ceil(len(tokens) / block_size) - (len(tokens) % block_size == 1), 1)
    windows = min(windows or available, available)
    sums = torch.zeros(K + 1, windows, dtype=torch.float64)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = []
    for i, (where, x, y) in enumerate(window_batches(tokens, block_size, batch_size, windows)):
        if i % world == rank:
            x, y = data.to_device(x, device), data.to_device(y, device)
            counted = (y >= 0)[None]
            parts.append((where, torch.cat([torch.where(counted, values(x, y), 0.0), counted])))
    for where, part in parts:  # fetched after everything is launched; summed in float64
        sums[:, where] = part.cpu().double().sum(-1)[:, : sums[0, where].numel()]
    if world > 1:  # each window has one owner, so this sum is exact
        sums = sums.to(device)  # nccl adds on the GPU
        dist.all_reduce(sums)
        sums = sums.cpu()
    return sums


def evaluate(model, tokens, block_size=None, batch_size=8, windows=0, average="token"):
    """Loss of `model` on `tokens` (N,), in nats per predicted token, by the protocol above.

    average="token" weighs every predicted token alike; "window" is the mean of the windows' means, as
    published GPT-2 perplexities often are. Raises UserError if block_size exceeds the model's or there is
    nothing to predict."""
    block_size = block_size or model.config.block_size
    limit = model.config.block_size
    if not 2 <= block_size <= limit:
        raise UserError(f"block_size must be from 2 to the model's {limit}, not {block_size}")
    if len(tokens) < 2:
        raise UserError("there is nothing to predict in fewer than two tokens")

    def values(x, y):
        return model.token_loss(model.run(model.embed(x)), y)[None]

    was_training = model.training
    model.eval()
    nats, count = sum_windows(values, 1, model.wte.weight.device, tokens, block_size, batch_size, windows)
    model.train(was_training)
    return ((nats / count).mean() if average == "window" else nats.sum() / count.sum()).item()


def compare(base, grown, tokens, block_size, batch_size=8, windows=0):
    """Losses of both networks and KL(base || grown), how far the distribution moved, right or wrong.

    {"base", "grown", "kl"}, in nats per predicted token.
    """

    def values(x, y):
        logits = [net.head(net.run(net.embed(x))).float() for net in (base, grown)]
        p, q = (F.log_softmax(z, -1) for z in logits)
        kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        return torch.stack([*(cross_entropy(z, y) for z in logits), kl])

    base.eval(), grown.eval()
    *sums, count = sum_windows(values, 3, grown.wte.weight.device, tokens, block_size, batch_size, windows)
    return {name: (s.sum() / count.sum()).item() for name, s in zip(("base", "grown", "kl"), sums)}


@torch.no_grad()
def block_use(model, tokens, block_size, rows=8):
    """For each block, mean over tokens of |block(x) - x| / |x|: how much it changes what passes."""
    model.eval()
    _, x, y = next(window_batches(tokens, block_size, rows, rows))
    x = model.embed(x.to(model.wte.weight.device))
    use = []
    with torch.compiler.set_stance("force_eager"):  # a shape of its own: not worth a compilation
        for block in model.h:
            out = block(x)
            ratio = (out - x).norm(dim=-1) / x.norm(dim=-1)
            use.append(ratio[y.to(x.device) >= 0].mean().item())
            x = out
    return use


@torch.no_grad()
def lambada(model, batch_size=16):
    """Accuracy (every token of the last word greedily right) and perplexity per last word.

    As lm-eval's task lambada_openai measures them.
    """
    if model.config.vocab_size != data.GPT2:
        raise UsageError("LAMBADA is measured in GPT-2's tokens, and this model has another vocabulary")
    device, right, nats = model.wte.weight.device, 0, 0.0
    rows = []
    for text in data.lambada():
        context, word = text.rsplit(" ", 1)
        target = data.encode(" " + word)
        ids = np.concatenate([data.encode(context), target]).astype(np.int64)[-model.config.block_size :]
        rows.append((ids, len(target)))
    rows.sort(key=lambda row: len(row[0]))
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        x = torch.zeros(len(part), len(part[-1][0]), dtype=torch.long)
        y = torch.full_like(x, -1)
        for r, (ids, n) in enumerate(part):
            x[r, : len(ids)] = torch.from_numpy(ids)
            y[r, len(ids) - n - 1 : len(ids) - 1] = torch.from_numpy(ids[-n:])
        x, y = x.to(device), y.to(device)
        hidden = model.run(model.embed(x))
        nats += model.token_loss(hidden, y).sum().item()
        right += ((model.head(hidden).argmax(-1) == y) | (y < 0)).all(1).sum().item()
    return {"accuracy": right / len(rows), "perplexity": math.exp(nats / len(rows)), "passages": len(rows)}


# ------------------------------------------------------------------------------------------------------------
# Tables of a run. Everything in them comes from its metrics.jsonl.


def read_run(folder):
    """A run's metrics.jsonl by kind: header and result are dicts, step, eval and event lists of dicts."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"no run in {folder}; to measure a model, give --dataset, --lambada or --prompt")
    run = {"folder": str(folder), "header": None, "step": [], "eval": [], "event": [], "result": None}
    for row in data.read_jsonl(path):
        kind = row.pop("kind", None) if isinstance(row, dict) else None
        if kind not in run:
            raise UserError(f"{path}: a row of unknown kind {kind!r}")
        if isinstance(run[kind], list):
            run[kind].append(row)
        else:
            run[kind] = row
    if run["header"] is None:
        raise UserError(f"{path}: no header row")
    return run


def finished(run):
    if run["result"] is None:
        raise UserError(f"{run['folder']} is not finished: continue it with the same command and --resume")
    return run["result"]


def ppl(loss):
    return math.exp(min(loss, 700))


def markdown(head, rows):
    """A Markdown table with aligned columns."""
    rows = [[str(c) for c in row] for row in rows]
    width = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(width)], *rows]
    return "\n".join(
        "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, width))) + " |"
        for r in lines
    )


def result_row(run):
    """What `python eval.py RUN ... --json` prints of each run."""
    r = finished(run)
    return {"run": run["folder"], "command": run["header"]["command"], **r, "forgetting": forgetting(r)}


def show(value, form):
    return "-" if value is None else format(value, form)


def forgetting(result):
    """Nats by which the loss on the retained domain exceeds the untouched network's; None if not measured."""
    old = result["retain"]
    return None if old["base"] is None else old["grown"] - old["base"]


def results_table(runs):
    head = ["run", "learn base", "grown", "ppl base", "grown", "retain base", "grown", "forgetting", "KL",
            "layers", "parameters", "trainable", "TFLOP", "minutes"]  # fmt: skip
    rows = []
    for run in runs:
        r = finished(run)
        new, old = r["learn"], r["retain"]
        losses = [show(x, ".4f") for x in (new["base"], new["grown"])]
        losses += [show(ppl(x), ".2f") for x in (new["base"], new["grown"])]
        losses += [show(x, ".4f") for x in (old["base"], old["grown"])]
        kept = [show(forgetting(r), "+.4f"), show(old["kl"], ".4f")]
        size = [r["layers"], f"{r['parameters']:,}", f"{r['trainable']:,}"]
        cost = [f"{r['flops'] / 1e12:,.2f}", f"{r['seconds'] / 60:.1f}"]
        rows.append([Path(run["folder"]).name, *losses, *kept, *size, *cost])
    return markdown(head, rows)


def summary_table(run):
    r, first = finished(run), run["header"]
    new = r["learn"]
    rows = [
        ["layers", first["layers"], r["layers"]],
        ["parameters", f"{first['parameters']:,}", f"{r['parameters']:,}"],
        ["trainable parameters at the end", "", f"{r['trainable']:,}"],
        ["test loss, learn", f"{new['base']:.4f}", f"{new['grown']:.4f}"],
        ["test perplexity, learn", f"{ppl(new['base']):.2f}", f"{ppl(new['grown']):.2f}"],
    ]
    return markdown(["", "initial", "final"], rows)


def events_table(run):
    rows = [
        [e["step"], f"{e['layers_before']} -> {e['layers_after']}", e["at"], f"{e['parameters_added']:,}"]
        + [f"{e['learn_before']:.6f}", f"{e['learn_after']:.6f}", f"{e['learn_after'] - e['learn_before']:g}"]
        for e in run["event"]
    ]
    head = ["step", "layers", "at", "added", "val loss before", "val loss after", "delta"]
    return markdown(head, rows) if rows else "no growth"


def versus_table(run):
    r = finished(run)
    head = ["domain", "loss base", "loss grown", "change", "ppl base", "ppl grown", "KL(base, grown)"]
    rows = []
    for name in ("learn", "retain"):
        d = r[name]
        if d["base"] is not None:
            losses = [f"{d['base']:.4f}", f"{d['grown']:.4f}", f"{d['grown'] - d['base']:+.4f}"]
            rest = [f"{ppl(d['base']):.2f}", f"{ppl(d['grown']):.2f}", f"{d['kl']:.4f}"]
            rows.append([f"{name}: {d['dataset']}", *losses, *rest])
    return markdown(head, rows)


def slope(evals, first, last):
    """Nats per 1,000 steps: least squares through the validation losses from step `first` to `last`."""
    points = sorted({e["step"]: e["learn"] for e in evals if first <= e["step"] <= last}.items())
    return 1000 * np.polyfit(*zip(*points), 1)[0] if len(points) > 1 else None


def scaling_rows(run):
    """One dict per growth. Nothing is extrapolated: a few growths make no law."""
    rows, events, last = [], run["event"], run["eval"][-1]
    for k, e in enumerate(events):
        begin = events[k - 1]["step"] if k else 0
        following = events[k + 1] if k + 1 < len(events) else {**last, "learn_before": last["learn"]}
        end, loss = following["step"], following["learn_before"]
        rows.append({
            **{key: e[key] for key in ("step", "tokens", "parameters", "flops")}, "layers": e["layers_after"],
            "loss_before": e["learn_before"], "loss_after": e["learn_after"],
            "slope_before": slope(run["eval"], begin, e["step"]),
            "slope_after": slope(run["eval"], e["step"], end),
            "gain_per_million": (e["learn_after"] - loss) / (e["parameters_added"] / 1e6),
            "use": (run["result"] or {}).get("block_use", {}).get(str(k + 1)),
        })  # fmt: skip
    return rows


def scaling_table(run):
    head = ["step", "tokens", "layers", "parameters", "TFLOP", "val loss", "delta", "slope before",
            "slope after", "gain / M params", "use"]  # fmt: skip
    rows = []
    for r in scaling_rows(run):
        size = [r["step"], f"{r['tokens']:,}", r["layers"], f"{r['parameters']:,}"]
        size.append(f"{r['flops'] / 1e12:,.2f}")
        loss = [f"{r['loss_before']:.4f}", f"{r['loss_after'] - r['loss_before']:g}"]
        slopes = [show(r["slope_before"], "+.3f"), show(r["slope_after"], "+.3f")]
        rows.append([*size, *loss, *slopes, f"{r['gain_per_million']:+.4f}", show(r["use"], ".3f")])
    return markdown(head, rows) if rows else "no growth"


def report(run):
    """The card's three tables and the scaling analysis of one finished run, as text."""
    r = finished(run)
    return "\n\n".join([
        f"Summary of {run['folder']}", summary_table(run),
        "Growth (validation loss on the same windows just before and just after; delta must be 0)",
        events_table(run),
        f"Base against grown, test splits. {r['protocol']}", versus_table(run),
        "Scaling (slopes: nats per 1,000 steps; gain: nats until the next growth; use: |block(x) - x| / |x|)",
        scaling_table(run),
        f"{r['seconds']:.0f} s in all, {r['train_seconds']:.0f} s of them training; {r['tokens']:,} tokens, "
        f"{r['flops'] / 1e12:,.2f} TFLOP. The model: {run['folder']}/model",
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Picture and card


def plot(runs, path):
    """Loss on both domains over steps with the growths marked, and the frontier: forgetting against new-
    domain loss."""
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (curves, frontier) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    few = len(runs) <= 6
    colors = plt.get_cmap("tab20" if len(runs) > 10 else "tab10").colors
    for i, run in enumerate(runs):
        color, name, r = colors[i % len(colors)], Path(run["folder"]).name, finished(run)
        steps = [e["step"] for e in run["eval"]]
        curves.plot(steps, [e["learn"] for e in run["eval"]], color=color, label=name)
        if r["retain"]["base"] is not None:
            curves.plot(steps, [e["retain"] for e in run["eval"]], "--", color=color)
            x, y = r["learn"]["grown"], forgetting(r)
            frontier.plot(x, y, "o", color=color)
            above = 5 if i % 2 else -11  # neighbours in the list often lie close together
            frontier.annotate(name, (x, y), xytext=(5, above), textcoords="offset points", fontsize=7)
        for e in run["event"]:
            curves.plot(e["step"], e["learn_after"], "^", color=color, markersize=7, markeredgecolor="black")
    curves.set(xlabel="step", ylabel="validation loss, nats per token",
               title="learn (solid) and retain (dashed); triangles: growth")  # fmt: skip
    if few:
        curves.legend()
    frontier.set(xlabel="learn: test loss, nats", ylabel="retain: forgetting, nats",
                 title="frontier: lower left is better")  # fmt: skip
    frontier.axhline(0, color="grey", linewidth=0.8)
    frontier.margins(x=0.15, y=0.1)
    for axis in (curves, frontier):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    try:
        fig.savefig(path, dpi=130)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write the picture {path}: {e}") from e
    plt.close(fig)
    return path


USAGE_BPE = """from transformers import AutoTokenizer, GPT2LMHeadModel

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = GPT2LMHeadModel.from_pretrained("{folder}")
inputs = tokenizer("The history of", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=50)
print(tokenizer.decode(output[0]))"""

USAGE_BYTES = """import torch
from transformers import GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("{folder}")  # byte-level: a token is a byte, no tokenizer files
prompt = torch.tensor([list(b"def main():")])
mask = torch.ones_like(prompt)
output = model.generate(prompt, attention_mask=mask, max_new_tokens={new}, do_sample=True, top_k=50)
print(bytes(i for i in output[0].tolist() if i < 256).decode(errors="replace"))"""


def model_card(run):
    """The README.md that stands beside a run's export, filled with this run's numbers only."""
    r, header, c = finished(run), run["header"], run["header"]["config"]
    usage = USAGE_BYTES if header["vocab_size"] == data.BYTES else USAGE_BPE
    old, new = r["retain"], max(1, min(40, c["block_size"] - 11))  # tokens that fit behind the prompt
    if old["base"] is None:
        retention = "No old domain was measured in this run, so it says nothing about forgetting."
    else:
        retention = (
            f"On `{old['dataset']}` the loss went from {old['base']:.4f} to {old['grown']:.4f} nats per "
            f"token ({old['grown'] - old['base']:+.4f}); mean KL(base, grown) {old['kl']:.4f} nats per token."
        )
    options = markdown(["option", "value"], [[f"--{k}", repr(v)] for k, v in c.items()])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, growing, continual-learning]
---

# Growing GPT: {header["layers"]} -> {r["layers"]} layers

## Description
A GPT-2 that started from `{c["init"]}` with {header["layers"]} blocks and {header["parameters"]:,}
parameters and was trained on `{c["dataset"]}` while {len(run["event"])} identity-initialised blocks were
inserted. It has {r["layers"]} blocks and {r["parameters"]:,} parameters; {r["trainable"]:,} trained at
the end.

## Training data
Learned: `{c["dataset"]}`, {header["tokens"]["learn"]["train"]:,} training tokens; {r["tokens"]:,} were drawn.
To be retained: `{r["retain"]["dataset"]}`.

## Configuration
`{header["command"]}`

{options}

## Growth mechanism
Trigger `{c["trigger"]}`, placement `{c["where"]}`, block init `{c["block_init"]}`, freeze `{c["freeze"]}`.
An inserted block has zero weight and bias in both output projections, so it adds exactly zero: at every
growth the logits on a batch of validation windows were compared before and after, and were bitwise equal.

## Growth events
{events_table(run)}

## Results
{summary_table(run)}

{r["protocol"]}

{versus_table(run)}

## Retention
{retention}

## Usage
```python
{usage.format(folder=run["folder"] + "/model", new=new)}
```

## Limitations
One run, with seed {c["seed"]}: how much runs differ is not shown here. A language model of this size
states falsehoods fluently and repeats the biases of its training text. The numbers hold for the protocol
beside them.

## Licence
Weights derived from OpenAI's GPT-2 are under its Modified MIT License; the code is MIT; training data keeps
its own licence.
"""


# ------------------------------------------------------------------------------------------------------------
# Command line


def sample(model, prompt, max_new_tokens=100, temperature=0.8, top_k=50, seed=0):
    vocab, device = model.config.vocab_size, model.wte.weight.device
    idx = torch.from_numpy(data.encode(prompt, vocab).astype(np.int64))[None].to(device)
    torch.manual_seed(seed)
    ids = model.generate(idx, max_new_tokens, temperature, top_k or None)[0].tolist()
    return data.decode(ids[: len(idx[0])] + [i for i in ids[len(idx[0]) :] if i != vocab - 1], vocab)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with its errors in one sentence."""

    def __init__(self, prog, **more):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, formatter_class=raw, allow_abbrev=False, **more)

    def error(self, message):
        raise UsageError(f"{message} (see python {self.prog} --help)")


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
    p.add_argument("--dataset", help="perplexity on wikitext2, webtext, docs, code, a .txt file or a folder")
    p.add_argument("--split", choices=["train", "val", "test"], default="val")
    p.add_argument("--block_size", type=int, default=0, help="context in tokens (0: the model's)")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--windows", type=int, default=0, help="only the first this many windows (0: all)")
    p.add_argument("--average", choices=["token", "window"], default="token", help="weighed alike")
    p.add_argument("--lambada", action="store_true", help="last-word accuracy and perplexity")
    gpu = torch.cuda.is_available()
    p.add_argument("--device", choices=["cpu", "cuda"] if gpu else ["cpu"], default="cuda" if gpu else "cpu")
    p.add_argument("--cache_dir", default="")
    a = p.parse_args(argv)
    if a.dataset:
        data.check_name(a.dataset)
    if a.batch_size < 1 or a.windows < 0 or a.top_k < 0 or a.max_new_tokens < 1 or a.block_size < 0:
        raise UsageError("batch_size, max_new_tokens must be 1 or more; windows, top_k, block_size 0 or more")
    return a


def load_model(name, device):
    if name not in SIZES and (Path(name) / "metrics.jsonl").exists():
        name = f"{name}/model"
    return GPT.from_pretrained(name).to(device).eval()


def main(argv):
    a = arguments(argv)
    data.set_cache_dir(a.cache_dir)
    if not (a.prompt is not None or a.dataset or a.lambada):
        runs = [read_run(name) for name in a.names]
        if a.json:
            print(json.dumps([{**result_row(run), "scaling": scaling_rows(run)} for run in runs], indent=1))
        else:
            print("\n\n".join([results_table(runs), *(report(run) for run in runs if len(runs) == 1)]))
            protocols = sorted({finished(run)["protocol"] for run in runs})
            print("\nLosses in nats per token.", *protocols, sep="\n")
        if a.plot:
            print(f"picture: {plot(runs, a.plot)}", file=sys.stderr)
        return
    for name in a.names:
        model = load_model(name, a.device)
        if a.prompt is not None:
            print(sample(model, a.prompt, a.max_new_tokens, a.temperature, a.top_k, a.seed))
        if a.lambada:
            r = lambada(model)
            print(f"{name} on LAMBADA ({r['passages']:,} passages, last word): accuracy {r['accuracy']:.4f}, "
                  f"perplexity {r['perplexity']:.2f}")  # fmt: skip
        if a.dataset:
            context = a.block_size or model.config.block_size
            tokens = data.load(a.dataset, model.config.vocab_size, 2)[a.split]
            loss = evaluate(model, tokens, context, a.batch_size, a.windows, a.average)
            part = f"first {a.windows} windows" if a.windows else "whole split"
            protocol = f"{part}, context {context}, stride {context}, mean by {a.average}"
            print(f"{name} on {a.dataset}, {a.split} split ({len(tokens):,} tokens; {protocol}):\n"
                  f"loss {loss:.4f}, perplexity {ppl(loss):.4f}")  # fmt: skip


def run_main(main):
    """Run a program: a UserError becomes one sentence on stderr and status 1; a bug keeps its traceback."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as e:  # the disk, a permission, a file that is no file: nothing that a traceback explains
        print(f"error: {e.filename or 'input or output'}: {e.strerror or e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
