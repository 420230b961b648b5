"""What growth is compared with in the study and train.py does not offer: low rank and a wider MLP.

    python tests/controls.py lora demo --init=out/base/model --seed=0 --out=out/lora
    python tests/controls.py widened demo --init=out/base/model --seed=0 --out=out/widened
    python tests/controls.py full ...         nothing added: the same curve as train.py --max_growths=0

One plain loop: batches, learning rate, optimizer, clipping and evaluations of train.py at the same options.
What is added has as many trainable parameters as growth by ADDED_BLOCKS blocks; all else is frozen.
"""

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import eval as ev  # noqa: E402
import grow  # noqa: E402
import train  # noqa: E402

ADDED_BLOCKS = 2
METHODS = ("full", "lora", "widened")


class LowRank(nn.Module):
    """A frozen linear layer plus B A x, where B (out, r) starts at zero (Hu et al., arXiv 2106.09685)."""

    def __init__(self, linear, rank):
        super().__init__()
        out, into = linear.weight.shape
        self.linear = linear
        self.A = nn.Parameter(torch.randn(rank, into) / math.sqrt(into))
        self.B = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x):
        return self.linear(x) + x @ self.A.T @ self.B.T

    def merged(self):
        with torch.no_grad():
            self.linear.weight += self.B @ self.A
        return self.linear


class Widened(nn.Module):
    """An MLP that is frozen, and `units` new hidden units beside its own, whose output rows start at zero:
    growth in width (Net2Net; arXiv 2308.06103, theorem 3.1)."""

    def __init__(self, mlp, units):
        super().__init__()
        C = mlp.c_fc.in_features
        self.mlp, self.c_fc, self.c_proj = mlp, nn.Linear(C, units), nn.Linear(units, C, bias=False)
        nn.init.normal_(self.c_fc.weight, std=0.02)
        nn.init.zeros_(self.c_fc.bias)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x):
        return self.mlp(x) + self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def replace(model, kind, change):
    """Put change(layer) in the place of every layer of a kind in the blocks."""
    for parent in [m for block in model.h for m in (block.attn, block.mlp)]:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, kind):
                setattr(parent, name, change(layer))


def add(method, model):
    """Freeze `model` and add to it what trains. "full" adds nothing and freezes nothing."""
    if method == "full":
        return
    C, L = model.config.n_embd, model.config.n_layer
    budget = ADDED_BLOCKS * (12 * C * C + 13 * C) / L  # what growth trains, for each block
    model.requires_grad_(False)
    if method == "lora":
        rank = round(budget / (16 * C))  # inputs and outputs of attention (3 + 1 + 1 + 1) C, of the MLP 10 C
        replace(model, nn.Linear, lambda linear: LowRank(linear, rank))
    else:
        for block in model.h:
            block.mlp = Widened(block.mlp, round(budget / (2 * C + 1)))


def count_flops(objective, x, y):
    """Of a step, as torch counts: by the rules of grow.count_flops. (The counter does not know every fused
    kernel of attention, but plain products.)"""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(objective(x, y)[0], grow.trainable(objective.model))
    return counter.get_total_flops()


def run(method, o):
    """Train, and write metrics.jsonl (header, evals, result) and, where it is an ordinary GPT-2, model/."""
    began, out = time.perf_counter(), Path(o.out)
    device, dtype = ev.choose_machine(o.device, o.dtype)
    model, base = train.start_model(o).to(device), train.start_model(o).to(device)
    torch.manual_seed(o.seed)
    add(method, model)
    model.to(device).train()
    names = {"learn": o.dataset, "retain": o.retain}
    texts = {key: data.load(name, model.config.vocab_size, o.block_size) for key, name in names.items()}
    optimizer = grow.make_optimizer(model, o.lr, o.weight_decay)
    objective = grow.Objective(model)
    evals = []
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for step in range(o.max_steps + 1):
            if step % o.eval_every == 0 or step == o.max_steps:
                found = {}
                for key, text in texts.items():
                    loss = ev.evaluate(model, text["val"], o.block_size, o.batch_size, o.eval_windows)
                    found |= {key: loss, f"{key}_mixed": None}
                evals.append({"kind": "eval", "step": step, **found})
                print(evals[-1], flush=True)
            if step == o.max_steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(o, step)
            x, y = data.batch(texts["learn"]["train"], o.block_size, o.batch_size, step, o.seed)
            x, y = data.to_device(x, device), data.to_device(y, device)
            if step == 0:
                flops = o.max_steps * count_flops(objective, x, y)
            objective(x, y)[0].backward()
            nn.utils.clip_grad_norm_(grow.trainable(model), o.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        trainable = sum(p.numel() for p in grow.trainable(model))
        replace(model, LowRank, LowRank.merged)
        result = {}
        for key, text in texts.items():
            how = text["test"], o.block_size, o.batch_size, o.test_windows
            result[key] = {"dataset": names[key], **ev.compare(base, model, *how)}
            if method != "full":  # all of the base is still there, so that it can predict, too
                result[key]["mixed"] = ev.measure([base, model], *how)["mixed"]
    if method != "widened":
        model.save_pretrained(out / "model")
    header = {"kind": "header", "command": " ".join(["python", *sys.argv]), "config": asdict(o)}
    size = sum(p.numel() for p in base.parameters()) + (trainable if method != "full" else 0)
    result |= {"kind": "result", "versions": [0], "trainable": trainable,
               "flops": flops, "parameters": size, "tokens": o.max_steps * o.batch_size * o.block_size,
               "seconds": time.perf_counter() - began}  # fmt: skip
    data.write_jsonl(out / "metrics.jsonl", [header, *evals, result], "w")


def main(argv):
    if not argv or argv[0] not in METHODS:
        raise ev.UserError(f"the first word must be one of {', '.join(METHODS)}")
    options = train.parse(argv[1:])
    train.check(options)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    run(argv[0], options)


if __name__ == "__main__":
    ev.run_main(main)
