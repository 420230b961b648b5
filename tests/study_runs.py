"""The study's runs: which arms there are, the jobs that train them, and what is measured of the networks.

Start it with `python tests/study.py`. A job is one process with one thread: train.py, or tests/controls.py
for what train.py does not offer. A job that has finished is never done again, and one that was stopped goes
on. Seed s draws the same batches in every arm, so arms are compared seed by seed."""

import copy
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import controls  # noqa: E402

import data  # noqa: E402
import eval as ev  # noqa: E402
import grow  # noqa: E402
import train  # noqa: E402
from model import GPT  # noqa: E402


def markdown(rows):
    """A table of rows [(head, value, format)]; None is shown as -."""
    cell = lambda value, form: "-" if value is None else format(value, form)
    return ev.table([{head: cell(value, form) for head, value, form in row} for row in rows])


# ----- What is compared -----

GROW = "--first_growth=0 --grow_every=1"  # all blocks before the third step: the originals never train
FULL, GROW_2 = "--max_growths=0", f"{GROW} --max_growths=2"
ARMS = {  # name: options of train.py, or a method of tests/controls.py
    "full": FULL,
    "LoRA": "lora",
    "widened MLP": "widened",
    "top 2 unfrozen": f"{FULL} --freeze=top2",
    "grow 2": GROW_2,
    "grow 4": f"{GROW} --max_growths=4",
    "grow 2, none frozen": f"{GROW_2} --freeze=none",
}
PLACES = {"grow 2, top": f"{GROW_2} --where=top", "grow 2, spread": f"{GROW_2} --where=spread"}
EXTRA = {  # on the demo's base: defaults of growth, and other learning rates than the preset's 3e-3
    "grow 2, spread": PLACES["grow 2, spread"],
    "grow 2, fresh": f"{GROW_2} --block_init=fresh",
    "full, lr / 3": f"{FULL} --lr=1e-3",
    "LoRA, lr x 2": "lora --lr=6e-3",
    "grow 2, lr x 2": f"{GROW_2} --lr=6e-3",
}
CURES = {  # two strengths of each
    "KD on new text, 0.25": "--kd_weight=0.25",
    "KD on new text, 1": "--kd_weight=1",
    "KD on old text, 0.25": "--kd_weight=0.25 --kd_on=retain",
    "KD on old text, 1": "--kd_weight=1 --kd_on=retain",
    "KD on dreams, 1": "--kd_weight=1 --kd_on=dream",
    "KD on dreams, 4": "--kd_weight=4 --kd_on=dream",
    "replay 1/16": "--replay=0.0625",
    "replay 1/4": "--replay=0.25",
    "EWC 10": "--ewc_lambda=10",
    "EWC 300": "--ewc_lambda=300",
}
CURED = {
    f"{method} + {cure}": f"{start} {options}" + " --freeze=none" * (method != "full" and "EWC" in cure)
    for cure, options in CURES.items()
    for method, start in {"full": FULL, "grow 2": GROW_2}.items()
}  # EWC holds originals that train, so growth with it freezes nothing
OWN = {"full on docs": f"{FULL} --dataset=docs --retain=code",
       "grow 2 on docs": f"{GROW_2} --dataset=docs --retain=code"}  # fmt: skip
ORDERS = [("code", "headers"), ("headers", "code")]  # after docs
SHARES, ALPHAS = (0, 0.001, 0.01, 0.05), (0, 0.25, 0.5, 0.75, 1)
LIMITS, REFERENCE = (0.01, 0.05), 0.25  # forgetting, in nats: along the dial, and of the hypervolume's corner


class Scale(NamedTuple):
    """How large and how long; --quick is tiny."""

    bases: dict  # name: shape and steps of `train.py pretrain`
    steps: dict  # of a run on the base
    seconds: dict  # a step takes so long on one thread
    words: str  # for every run
    windows: int  # of a split that study.py itself measures
    context: int = 128


HALF, WHOLE, LARGE = "2x64 half", "2x64 trained", "4x128"
TRAINED = train.PRESETS["pretrain"]["max_steps"]
NORMAL = Scale(
    {f"{LARGE} trained": f"--n_layer=4 --n_embd=128 --max_steps={TRAINED}",
     WHOLE: f"--n_layer=2 --n_embd=64 --max_steps={TRAINED}",
     HALF: "--n_layer=2 --n_embd=64 --max_steps=600",
     f"{LARGE} half": "--n_layer=4 --n_embd=128 --max_steps=600"},
    {"2x64": 500, LARGE: 400}, {"2x64": 0.050, LARGE: 0.16}, "", 400,
)  # fmt: skip
QUICK_WORDS = "--block_size=32 --eval_every=5 --eval_windows=4 --test_windows=4"
QUICK = Scale(
    {name: f"--n_layer=2 --n_embd=16 --max_steps=10 {QUICK_WORDS}" for name in NORMAL.bases},
    {"2x64": 10, LARGE: 10}, {"2x64": 0.05, LARGE: 0.05}, QUICK_WORDS, 4, 32,
)  # fmt: skip


def arms_on(base):
    """The larger network has fewer arms, steps and seeds."""
    if base.startswith(LARGE):
        return ["full", "LoRA", "grow 2", "grow 4", *(PLACES if base.endswith("trained") else ())]
    return [*ARMS, *(EXTRA if base == WHOLE else ())]


# ----- Jobs -----


class Job(NamedTuple):
    path: Path  # where it writes
    words: list  # a program of the repository, and its options
    seconds: float  # estimated
    after: Path | None = None  # of the job whose network it starts from


def arm_path(out, base, arm, seed):
    return out / base.replace(" ", "-") / (re.sub(r"[^\w.]+", "-", arm) + f"-seed{seed}")


def base_path(out, base):
    return out / base.replace(" ", "-") / "base"


def sequence_paths(out, method, order, seed):
    """Where the runs on the texts of an order lie. The first on `code` is an arm of its own."""
    steps = [("code",), order] if order[0] == "code" else [order[:1], order]
    names = [method if done == ("code",) else f"{method} then {' '.join(done)}" for done in steps]
    return [arm_path(out, WHOLE, name, seed) for name in names]


def options(scale, base, arm, arms):
    """The words of an arm, without its start, seed and folder."""
    size, words = base.partition(" ")[0], arms[arm].split()
    start = ["train.py", "demo"]
    if words[0] in controls.METHODS:
        start = ["tests/controls.py", words.pop(0), "demo"]
    return [*start, *words, f"--max_steps={scale.steps[size]}", *scale.words.split()]


def cost(scale, base, arm):
    """Seconds, roughly: distillation has a teacher and more rows, a deeper network more blocks."""
    size = base.partition(" ")[0]
    factor = 0.7 if arm.startswith("full") else 1.0
    factor += 0.2 * ("KD" in arm) + 0.4 * ("grow 4" in arm) + 0.5 * (arm.startswith("grow 2, none"))
    factor += 0.1 * (arm.startswith("full + EWC")) + 0.5 * (arm.startswith("grow 2 + EWC"))
    return 8 + 8 * ("dreams" in arm) + scale.steps[size] * scale.seconds[size] * factor


def jobs_of(out, scale, seeds):
    """All jobs, each behind the one that it starts from."""
    jobs = []
    for base, words in scale.bases.items():
        steps = int(re.search(r"max_steps=(\d+)", words)[1])
        seconds = 6 + steps * scale.seconds[base.partition(" ")[0]] * 0.9
        jobs.append(Job(base_path(out, base), ["train.py", "pretrain", *words.split()], seconds))

    def add(path, base, arm, arms, seed, start, more=(), seconds=0.0):
        words = [*options(scale, base, arm, arms), f"--init={start}/model", f"--seed={seed}", *more]
        jobs.append(Job(path, words, seconds or cost(scale, base, arm), start))

    on_demo = ARMS | EXTRA | CURED | OWN
    for seed in seeds:
        for arm in on_demo:
            add(arm_path(out, WHOLE, arm, seed), WHOLE, arm, on_demo, seed, base_path(out, WHOLE))
        for arm in ARMS:
            add(arm_path(out, HALF, arm, seed), HALF, arm, ARMS, seed, base_path(out, HALF))
        for method, order in itertools.product(("full", "grow 2"), ORDERS):
            start, old = base_path(out, WHOLE), "docs"
            for path, text in zip(sequence_paths(out, method, order, seed), order):
                if not any(job.path == path for job in jobs):
                    texts = [f"--dataset={text}", f"--retain={old}"]
                    seconds = 1.3 * cost(scale, WHOLE, method)
                    add(path, WHOLE, method, ARMS, seed, start, texts, seconds)
                start, old = path, text
    for seed, base in itertools.product(seeds[:2], (f"{LARGE} trained", f"{LARGE} half")):
        for arm in arms_on(base):
            add(arm_path(out, base, arm, seed), base, arm, ARMS | PLACES, seed, base_path(out, base))
    return jobs


def measuring_jobs(out, seeds, quick):
    """One for each seed, after all others."""
    more = ["--quick"] if quick else []
    return [Job(out / f"measured-seed{s}", ["tests/study.py", f"--measure={s}", *more], 100) for s in seeds]


def finished(path):
    return (path / "finished").exists()


def launch(out, job, quick):
    """Do a job, in a process of its own, unless it is finished; return whether it is."""
    if finished(job.path) or (job.after and not finished(job.after)):
        return finished(job.path)
    job.path.mkdir(parents=True, exist_ok=True)
    program, *words = [*job.words, f"--out={job.path}"]
    words += ["--resume=auto"] if program == "train.py" else []
    if quick:  # in this process: to start one takes longer than the job
        import study

        mains = {"train.py": train.main, "tests/controls.py": controls.main, "tests/study.py": study.main}
        mains[program](words)
        (job.path / "finished").touch()
        return True
    with open(job.path / "stdout.txt", "a") as file:
        command, env = [sys.executable, ROOT / program, *words], dict(os.environ, OMP_NUM_THREADS="1")
        status = subprocess.run(command, stdout=file, stderr=file, env=env).returncode
    if status:
        print(f"{job.path}: exit status {status}, see stdout.txt there", file=sys.stderr)
        return False
    (job.path / "finished").touch()
    return True


def do(out, jobs, workers, quick):
    """All jobs, `workers` at a time. A job waits for the one that it starts from, which began before it."""
    left = [job for job in jobs if not finished(job.path)]
    seconds = sum(job.seconds for job in left)
    each, minutes = seconds / max(len(left), 1), seconds / 60
    print(f"{len(left)} runs x {each:.0f} s = {minutes:.0f} minutes on one thread, {minutes / workers:.0f} "
          f"with {workers} workers; {len(jobs) - len(left)} are done", flush=True)  # fmt: skip
    if quick:
        return [launch(out, job, quick) for job in left]
    futures = {}

    def run(job):
        if job.after in futures:
            futures[job.after].result()
        done = launch(out, job, quick)
        print(f"{job.path.relative_to(out)}: {'done' if done else 'NOT done'}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        for job in left:
            futures[job.path] = pool.submit(run, job)
        try:
            for future in futures.values():
                future.result()
        except BaseException:  # Ctrl-C: what runs stops in order, and nothing more is started
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ----- What is measured after the runs: dials, mixtures, sequences. One file of numbers for each seed -----


def between(base, tuned, alpha):
    """The network at `alpha` of the way from base to tuned: original weights are interpolated (WiSE-FT,
    Wortsman et al., arXiv 2109.01903), output projections of grown blocks scaled (grow.scale_grown)."""
    net, old = copy.deepcopy(tuned), dict(base.named_parameters())
    net.config.versions = (0,)
    with torch.no_grad():
        for name, p in grow.original_parameters(net):
            p.lerp_(old[name], 1 - alpha)
    if grow.grown(net):
        net.config.versions = (0, max(net.config.generation))
        grow.scale_grown(net, alpha)
    return net


def dial(base, tuned, texts, scale):
    """[[learning loss, forgetting] at each of ALPHAS], on the validation windows that the runs log."""
    windows = train.PRESETS["demo"]["eval_windows"] if not scale.words else scale.windows
    how, points = (scale.context, 16, windows), []
    for alpha in ALPHAS:
        net = between(base, tuned, alpha)
        points.append([ev.evaluate(net, texts[name]["val"], *how) for name in ("code", "docs")])
    return [[learn, old - points[0][1]] for learn, old in points]


def switching(first, second, context):
    """Tokens whose every window holds half a window of the one text, then half a window of the other."""
    half = context // 2
    rows = min(len(first), len(second)) // half
    return np.concatenate([text[: rows * half].reshape(rows, half) for text in (first, second)], 1).ravel()


@torch.no_grad()
def mixed_losses(nets, tokens, scale, shares=SHARES):
    """{share: [loss of each network ..., of their mixture]}: eval.evaluate_together with several shares."""
    windows = ev.count_windows(len(tokens), scale.context, scale.windows)
    alone, mixed, predicted = 0, dict.fromkeys(shares, 0), 0
    for net in nets:
        net.eval()
    for _, x, y in ev.window_batches(tokens[: windows * scale.context], scale.context, 16, windows):
        outputs = zip(nets, grow.run_together(nets, x))
        losses = torch.stack(
            [ev.cross_entropy(ev.logits(net, hidden), y) for net, hidden in outputs]
        )  # (K, B, T)
        alone = alone + losses.double().sum((1, 2))
        predicted += (y >= 0).sum().item()
        for share in shares:
            mixed[share] += grow.mix(losses, share).sum().item()
    return {str(share): [*(alone / predicted).tolist(), mixed[share] / predicted] for share in shares}


def mixtures(nets, texts, scale):
    """{split: {stream: mixed_losses}}, and what predicting with all costs."""
    code, docs = texts["code"], texts["docs"]
    halves = [(code["val"], docs["val"]), (docs["val"], code["val"])]
    there, back = (switching(*pair, scale.context) for pair in halves)
    streams = {
        "val": {"learn": code["val"], "retain": docs["val"], "code then docs": there, "docs then code": back},
        "test": {"learn": code["test"], "retain": docs["test"]},
    }
    losses = {split: {name: mixed_losses(nets, tokens, scale) for name, tokens in named.items()}
              for split, named in streams.items()}  # fmt: skip
    fork = grow.shared_blocks(nets)
    stored = {id(p): p.numel() for net in nets for p in net.parameters()}
    passes = fork + sum(len(net.h) - fork for net in nets)
    return losses | {"stored": sum(stored.values()), "passes": passes, "heads": len(nets)}


def measure(out, seed, scale):
    """Everything of a seed that no run logs."""
    texts = {name: data.load(name, data.BYTES, scale.context) for name in ("docs", "code", "headers")}

    def load(path):
        return GPT.from_pretrained(path / "model")

    def arm(name):
        return arm_path(out, WHOLE, name, seed)

    base, found = load(base_path(out, WHOLE)), {"dial": {}, "mixed": {}, "sequence": {}}
    for name in ARMS | EXTRA | CURED:  # a widened MLP is no GPT-2, and has no dial
        if (arm(name) / "model").exists():
            found["dial"][name] = dial(base, load(arm(name)), texts, scale)
    for name in ("grow 2", "LoRA", "full"):
        net = load(arm(name))
        nets = [grow.version(net, g) for g in net.config.versions] if name == "grow 2" else [base, net]
        found["mixed"][name] = mixtures(nets, texts, scale)
    # Low rank is stored once, beside the base that it is added to; merged weights give the same losses.
    added = ev.read_run(arm("LoRA"))["result"]["trainable"]
    found["mixed"]["LoRA"]["stored"] = sum(p.numel() for p in base.parameters()) + added
    for order, method in itertools.product(ORDERS, ("full", "grow 2")):
        nets = [base, *(load(path) for path in sequence_paths(out, method, order, seed))]
        if method == "grow 2":
            nets = [grow.version(nets[-1], g) for g in nets[-1].config.versions]
        columns = [mixed_losses(nets, texts[name]["test"], scale, (0, 0.01)) for name in ("docs", *order)]
        by_share = {share: [column[share] for column in columns] for share in ("0", "0.01")}
        found["sequence"][f"{' '.join(order)} {method}"] = by_share
    return found
