"""The study: what growing learns and forgets beside other ways to train, alone and mixed.

    python tests/study.py                    run what is missing, then write OUT/tables.md and two pictures
    python tests/study.py --out=out/study --workers=2
    python tests/study.py --tables           only write them, of what is there

An arm is a way to train. It has the learning rate that learns most by the validation loss: from 8e-3 on,
rates are halved or doubled until a rate is better than both its neighbours, with seed 0. Then it runs with
its other seeds. (An arm with `lr_of` has the rate of another.) Seed s draws the same rows of the new text in
every arm without replay. A finished run is a file in OUT and never done again; a stopped one begins again."""

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # a process is one thread: two learn more than one with two

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import controls

import data
import eval as ev
import grow
import train
from model import GPT

# ----- What is compared -----

SMALL, LARGE = "2x64", "4x128"
# Options of `train.py pretrain`
BASES = {SMALL: "--n_layer=2 --n_embd=64", LARGE: "--n_layer=4 --n_embd=128"}
PLAIN = "--max_growths=0 --kd_weight=0"  # the demo grows and distils; an arm's own options follow, and win


class Arm(NamedTuple):
    name: str
    words: str = ""  # options of train.py
    change: Callable | None = None  # or what tests/controls.py does to the network
    base: str = SMALL
    lr_of: str | None = None  # the arm whose learning rate it takes, instead of its own search
    seeds: int = 3
    equal: bool = False  # as many steps as cost what 500 of full fine-tuning cost


def growth(blocks, where="spread", every=1):
    """A block before each of the first steps, or every `every` steps. The originals never train."""
    return f"--max_growths={blocks} --where={where} --grow_every={every}"


ARMS = [
    Arm("full"),
    Arm("fork 1", change=partial(controls.fork, blocks=[1])),
    Arm("fork 2", change=partial(controls.fork, blocks=[0, 1])),
    Arm("LoRA", change=controls.lora),
    Arm("LoRA, rank 8", change=partial(controls.lora, rank=8)),
    Arm("widened", change=controls.widen),
    Arm("widened, copied", change=partial(controls.widen, copied=True)),
    Arm("grow 2", growth(2)),
    Arm("grow 4", growth(4)),
    Arm("grow 6", growth(6)),
    Arm("grow 2, top", growth(2, "top")),
    Arm("grow 2, one by one", growth(2, every=50)),
    Arm("grow 4, one by one", growth(4, every=50)),
    Arm("grow 4, upper", growth(4, "upper")),
    Arm("grow 4, top", growth(4, "top")),
    Arm("grow 6, one by one", growth(6, every=50)),
    Arm("grow 2, none frozen", f"{growth(2)} --freeze=none"),
]
# Ways to keep the old in one network: options, and strengths of which the middle one searches a rate for all.
KEEP = {
    "generated": ("--kd_on=generated --kd_weight={}", (0.3, 1, 3)),  # generative replay
    "new text": ("--kd_on=train --kd_weight={}", (0.3, 1, 3)),  # Learning without Forgetting
    "old text": ("--kd_on=retain --kd_weight={}", (0.3, 1, 3)),
    "replay": ("--replay={}", (0.125, 0.25, 0.5)),
    "EWC": ("--ewc_lambda={}", (0.1, 1, 10)),
}
METHODS = {"full": "", "grow 2": growth(2)}  # with which they are tried
GENERATED = KEEP["generated"][0].format(1)


def keeping():
    middle, others = [], []
    for (keep, (words, strengths)), (method, plain) in itertools.product(KEEP.items(), METHODS.items()):
        if keep == "EWC" and plain:  # it holds originals that train
            method, plain = "grow 2, none frozen", f"{plain} --freeze=none"
        for strength in strengths:
            arm = Arm(f"{method} + {keep} {strength}", f"{plain} {words.format(strength)}")
            if strength == strengths[1]:
                middle.append(arm)
            else:
                others.append(arm._replace(lr_of=f"{method} + {keep} {strengths[1]}", seeds=1))
    middle.append(Arm("grow 2, none frozen + generated 1", f"{growth(2)} --freeze=none {GENERATED}"))
    return middle + others


def more_rows():
    for (method, plain), keep in itertools.product(METHODS.items(), ("generated", "old text")):
        arm = f"{method} + {keep} 1"
        words = f"{plain} {KEEP[keep][0].format(1)} --kd_rows=16"
        words += " --generated=8192" * (keep == "generated")
        yield Arm(f"{arm}, 16 rows", words, lr_of=arm, seeds=1)


def equal_operations():
    names = ["fork 1", "fork 2", "LoRA", "widened", "grow 2", "grow 4", "grow 2, top"]
    for arm in [*ARMS, *keeping()]:
        if arm.name in [*names, "grow 2 + generated 1"]:
            yield arm._replace(name=f"{arm.name}, equal operations", lr_of=arm.name, equal=True)


def longer():
    names = ["full", "fork 2", "LoRA", "grow 4"]
    for arm in [*ARMS, *keeping()]:
        if arm.name in names or (" + " in arm.name and arm.seeds == 3 and "EWC" not in arm.name):
            words = f"{arm.words} --max_steps=1500" + " --generated=6144" * ("generated" in arm.name)
            yield arm._replace(name=f"{arm.name}, long", words=words, lr_of=arm.name, seeds=1)


LARGE_ARMS = [
    Arm("full", base=LARGE),
    Arm("grow 2", growth(2), base=LARGE),
    Arm("LoRA", change=controls.lora, base=LARGE),
    Arm("fork 2", change=partial(controls.fork, blocks=[1, 3]), base=LARGE),
    Arm("fork 2, top", change=partial(controls.fork, blocks=[2, 3]), base=LARGE),
    Arm("grow 2 + generated 1", f"{growth(2)} {GENERATED}", base=LARGE, lr_of="grow 2"),
    Arm("full + generated 1", GENERATED, base=LARGE, lr_of="full"),
    Arm("widened", change=controls.widen, base=LARGE),
    Arm("grow 2, top", growth(2, "top"), base=LARGE),
    Arm("grow 2, upper", growth(2, "upper"), base=LARGE),
]


def sections():
    """{title: its arms}, in the order of what they tell, so that a study that was stopped tells most."""
    return {
        "Learning and forgetting": ARMS,
        "Keeping the old in one network": keeping(),
        "A larger network": LARGE_ARMS,
        "More rows to keep it": list(more_rows()),
        "At equal operations": list(equal_operations()),
        "Three times as long": list(longer()),
    }


def all_arms():
    return list(itertools.chain(*sections().values()))


def arm_named(name, base=SMALL):
    return next(arm for arm in all_arms() if (arm.name, arm.base) == (name, base))


def parent(arm):
    return arm_named(arm.lr_of, arm.base)


# ----- One run -----


class Study(NamedTuple):
    """Where it lies, options of every run, and whether what is missing is trained, or a FileNotFoundError."""

    out: Path
    words: str = ""
    trains: bool = True

    def file(self, arm, lr, seed):
        return self.out / arm.base / re.sub(r"[^\w.]+", "-", f"{arm.name}-{lr:g}-{seed}.json")

    def base(self, name):
        """The folder of a base, trained if need be."""
        out = self.out / f"base-{name}"
        with data.lock(out / "made"):
            if not (out / "model" / "config.json").exists():  # which is written after the weights
                with open(out / "stdout.txt", "a") as file, contextlib.redirect_stdout(file):
                    words = f"{BASES[name]} {self.words} --out={out} --resume=auto"
                    train.main(["pretrain", *words.split()])
        return out / "model"

    def words_of(self, arm, lr, seed):
        """The options of a run. Its base is named by the folder of its file."""
        words = f"{PLAIN} {arm.words} --lr={lr} --seed={seed} {self.words}".split()
        if arm.equal:
            full, own = (self.run(of, self.lr(of), 0) for of in (arm_named("full", arm.base), parent(arm)))
            words.append(f"--max_steps={round(own['steps'] * full['flops'] / own['flops'])}")
        return words

    def run(self, arm, lr, seed):
        """A run's figures: from its file, or made."""
        path, words = self.file(arm, lr, seed), self.words_of(arm, lr, seed)
        if not path.exists() and self.trains:
            with data.lock(path.with_suffix(".lock")):  # another process may be at it
                if not path.exists():
                    found = run(train.parse(["demo", *words, f"--init={self.base(arm.base)}"]), arm.change)
                    found = {"name": arm.name, "lr": lr, "seed": seed, "words": words, **found}
                    with data.replacing(path) as file:
                        file.write(json.dumps(found).encode())
                    print(f"{path.stem}: learn {found['learn']:.4f}, {found['seconds']:.0f} s", flush=True)
        found = json.loads(path.read_text())
        if found["words"] != words:
            raise data.UserError(f"{path} is of a run with other options: remove it")
        return found

    def lr(self, arm):
        """The peak of its cosine: better than half and double of it by validation loss on the new text."""
        if arm.lr_of:
            return self.lr(parent(arm))
        best, at = 0.008, None
        while best != at:
            at = best
            best = min((at, at / 2, at * 2), key=lambda lr: self.run(arm, lr, 0)["val"])
        return at

    def do(self, arm):
        lr = self.lr(arm)
        return [self.run(arm, lr, seed) for seed in range(arm.seeds)]


def count_flops(objective, x, y):
    """Of one step, counted by torch, with attention in plain products: it does not know every fused kernel.
    (What is done once, before the first step, is not counted: generated text, the Fisher of EWC.)"""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(sum(objective(x, y)), grow.trainable(objective.model))
    return counter.get_total_flops()


@functools.cache
def generated_text(init, count, seed):
    return grow.generate_text(GPT.from_pretrained(init), count, seed)


def run(o, change=None):
    """Train with options `o` of train.py in a plain loop, the network changed by `change` before, and return
    the figures. Losses are in nats per token, "val" on new validation text, the others on test."""
    began, T = time.perf_counter(), o.block_size
    device, _ = ev.choose_machine("cpu", "float32")
    base, model = train.start_model(o), train.start_model(o)
    texts = {key: data.load(name, model.config.vocab_size, T)
             for key, name in (("learn", o.dataset), ("retain", o.retain))}  # fmt: skip
    generated, ewc = None, None
    if o.kd_weight and o.kd_on == "generated":
        generated = generated_text(o.init, o.generated * T + 1, o.seed)
    if o.ewc_lambda:
        batches = (data.batch(texts["retain"]["train"], T, 8, i, o.seed)[0] for i in range(o.ewc_batches))
        ewc = grow.EWC(base, batches, torch.Generator().manual_seed(o.seed))
    before = base.requires_grad_(False)
    if o.originals_never_train:
        before = grow.original(model)
    torch.manual_seed(o.seed)
    if change:
        change(model)
    objective = grow.Objective(model, before if o.kd_weight else None, o.kd_temperature)
    optimizer, growths, flops = grow.make_optimizer(model, o.lr, o.weight_decay), 0, 0
    for step in range(o.max_steps):
        grows = growths < o.max_growths and grow.scheduled(step, 0, o.grow_every)
        if grows:
            grow.insert_block(model, grow.placement(o.where, model, growths, o.max_growths))
            grow.freeze(model, o.freeze)
            carried, growths = grow.optimizer_state(model, optimizer), growths + 1
            optimizer = grow.make_optimizer(model, o.lr, o.weight_decay, carried)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(o, step)
        [(x, y)] = train.micro_batches(o, texts, generated, step, device)
        if step == 0 or grows:
            step_flops = count_flops(objective, x, y)
        nll, kd = objective(x, y)
        loss = nll + o.kd_weight * kd
        if ewc:
            loss = loss + o.ewc_lambda * ewc.penalty(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        flops += step_flops
    trainable = sum(p.numel() for p in grow.trainable(model))
    stored = trainable + sum(p.numel() for p in base.parameters())  # so that both can predict
    found = {"steps": o.max_steps, "trainable": trainable, "stored": stored, "flops": flops}
    val = ev.evaluate(model, texts["learn"]["val"], T, 16, 4 * o.eval_windows)
    found["val"] = val if math.isfinite(val) else math.inf
    for key, text in texts.items():
        m = ev.measure([before, model], text["test"], T, 16, o.test_windows, kl=True)
        found |= {f"{key}_before": m["losses"][0], key: m["losses"][1]}
        found |= {f"{key}_mixed": m["mixed"], f"{key}_kl": m["kl"]}
    return found | {"seconds": time.perf_counter() - began}


# ----- Tables: means over seeds, and what is more than chance -----


def figures(found):
    """What the tables and pictures show of a run."""
    return {
        "learn": found["learn"],
        "forgets": found["retain"] - found["retain_before"],
        "learn mixed": found["learn_mixed"],
        "forgets mixed": found["retain_mixed"] - found["retain_before"],
        "KL on new text": found["learn_kl"],
    }


def mean(runs, key):
    return statistics.mean(figures(found)[key] for found in runs)


def sd(runs, key):
    return statistics.stdev(figures(found)[key] for found in runs) if len(runs) > 1 else 0.0


def sigma(runs_of, key):
    """Standard deviation among seeds, pooled over the arms {name: runs} that have several."""
    several = [sd(runs, key) ** 2 for runs in runs_of.values() if len(runs) > 1]
    return math.sqrt(statistics.mean(several)) if several else math.nan


def differs(runs, others, key, sigma):
    """The difference of two arms' means; "=" where it is within two of its own standard deviations, an arm
    varying as its seeds do or as all arms do, whichever is more."""
    d = mean(runs, key) - mean(others, key)
    own = math.sqrt(sum(max(sd(some, key), sigma) ** 2 / len(some) for some in (runs, others)))
    return f"{d:+.3f}" if abs(d) > 2 * own else "="


def arms_table(arms, runs_of, sigmas):
    """Of arms whose runs are in {name: runs}; in brackets differences to full fine-tuning of that length."""
    rows = []
    for arm in arms:
        runs = runs_of[arm.name]
        full = runs_of.get("full, long" if arm.name.endswith(", long") else "full", runs)
        row = {"arm": arm.name, "lr": f"{runs[0]['lr']:g}", "seeds": len(runs), "steps": runs[0]["steps"]}
        row |= {key: f"{runs[0][key]:,}" for key in ("trainable", "stored")}
        row["TFLOP"] = f"{runs[0]['flops'] / 1e12:.2f}"
        for key in sigmas:
            row[key] = f"{mean(runs, key):{'+' * ('forgets' in key)}.3f}"
            if key in ("learn", "forgets"):
                row[key] += f" ± {sd(runs, key):.3f}" if len(runs) > 1 else ""
                row[key] += f" ({differs(runs, full, key, sigmas[key])})"
        rows.append(row)
    return ev.table(rows)


def rates_table(study, arms):
    """What each arm's search found, with seed 0: the rate that learns most is not the one that keeps most."""
    rows = []
    for arm in arms:
        for lr in [0.001 * 2**k for k in range(8)]:
            if arm.lr_of is None and study.file(arm, lr, 0).exists():
                found = study.run(arm, lr, 0)
                kept = found["retain"] - found["retain_before"]
                row = {"arm": arm.name, "lr": f"{lr:g}", "validation": f"{found['val']:.3f}"}
                rows.append(row | {"learn": f"{found['learn']:.3f}", "forgets": f"{kept:+.3f}"})
    return ev.table(rows)


def rank_correlation(runs_of, a, b):
    """Spearman's, over arms."""
    ranks = [np.argsort(np.argsort([mean(runs, key) for runs in runs_of.values()])) for key in (a, b)]
    return np.corrcoef(ranks)[0, 1]


def read(study, base):
    """{name: runs} of the arms on a base that are finished."""
    runs_of = {}
    for arm in all_arms():
        if arm.base == base:
            with contextlib.suppress(FileNotFoundError):
                runs_of[arm.name] = study.do(arm)
    return runs_of


def write(study):
    """OUT/tables.md and two pictures."""
    study, parts = study._replace(trains=False), []
    runs_by_base = {base: read(study, base) for base in BASES}
    data.need(runs_by_base[SMALL], f"no arm is finished in {study.out}: run it without --tables")
    for title, arms in sections().items():
        runs_of = runs_by_base[arms[0].base] if arms else {}
        wanted, arms = len(arms), [arm for arm in arms if arm.name in runs_of]
        if not arms or "full" not in runs_of:
            continue
        sigmas = {key: sigma(runs_of, key) for key in figures(runs_of["full"][0])}
        before = runs_of["full"][0]
        losses = f"new text {before['learn_before']:.3f}, old text {before['retain_before']:.3f}"
        parts.append(f"""## {title} ({len(arms)} of {wanted} arms)

Base {arms[0].base}: {losses}. Sigma of one run: {", ".join(f"{key} {sd:.3f}" for key, sd in sigmas.items())}.

{arms_table(arms, runs_of, sigmas)}
""")
    parts.append(f"""## What the rate does: the arms of the first table at each that was tried, seed 0

{rates_table(study, ARMS)}
""")
    parts.append("## KL on new text as a gauge of forgetting: rank correlation of the two (Spearman)\n")
    for base, runs_of in runs_by_base.items():
        rank = rank_correlation(runs_of, "KL on new text", "forgets") if runs_of else math.nan
        parts.append(f"- {base}: {rank:.2f} over {len(runs_of)} arms\n")
    (study.out / "tables.md").write_text("\n".join(parts))
    picture(runs_by_base[SMALL], "one network alone", "", study.out / "study-alone.png")
    picture(runs_by_base[SMALL], "mixed with the network before", " mixed", study.out / "study-mixed.png")
    print(f"written: {study.out}/tables.md, study-alone.png, study-mixed.png")


# What the pictures show, {arm: color}: the methods as they are, and with what keeps the old.
PICTURED = {"full": "C3", "fork 2": "C1", "LoRA": "C4", "widened": "C5", "grow 2": "C0", "grow 4": "C0"}
PICTURED |= {"grow 2, none frozen": "C2", "grow 2, none frozen + generated 1": "C2"}
PICTURED |= {f"{method} + generated 1": color for method, color in (("full", "C3"), ("grow 2", "C0"))}
PICTURED |= {f"full + {keep}": "C3" for keep in ("old text 1", "new text 1", "replay 0.25", "EWC 1")}
PLACES = ((8, 0, "left"), (-8, 0, "right"), (0, 10, "center"), (0, -10, "center"), (8, 12, "left"))


def picture(runs_of, title, predictor, path):
    """What is forgotten against what is learned, each arm named where it lies, beside what is there."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel="new text: loss", ylabel="old text: loss above that of the network before")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.margins(0.2, 0.15)
    arms = [arm for arm in PICTURED if arm in runs_of]
    points = [[mean(runs_of[arm], key + predictor) for key in ("learn", "forgets")] for arm in arms]
    for arm, point in zip(arms, points):
        axes.plot(*point, "s" if "+" in arm else "o", color=PICTURED[arm])
    figure.draw_without_rendering()  # from here on it is known where things lie, in pixels
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(points)]
    for arm, point in zip(arms, points):
        text = axes.annotate(arm, point, (0, 0), textcoords="offset points", va="center", color=PICTURED[arm])
        for x, y, side in PLACES:
            text.xyann = x, y
            text.set_horizontalalignment(side)
            box = text.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
    figure.savefig(path, dpi=100)


# ----- All runs -----


def do(study, arms, workers):
    """Every run that is missing, an arm at a time in each of `workers` processes. An arm that fails does not
    stop the others; its error comes last."""
    context, errors = multiprocessing.get_context("spawn"), []
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        bases = [pool.submit(study.base, name) for name in dict.fromkeys(arm.base for arm in arms)]
        try:
            for future in [*bases, *[pool.submit(study.do, arm) for arm in arms]]:
                errors += [future.exception()] * (future.exception() is not None)
        except BaseException:  # Ctrl-C: nothing more is begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return errors


def main(argv):
    p = ev.parser("python tests/study.py [--option=value ...]", __doc__)
    p.add_argument("--out", type=Path, default=ROOT / "out" / "study")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--tables", action="store_true", help="run nothing")
    a = p.parse_args(argv)
    errors = [] if a.tables else do(Study(a.out), all_arms(), a.workers)
    write(Study(a.out))
    if errors:
        raise errors[0]


if __name__ == "__main__":
    ev.run_main(main)
