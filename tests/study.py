"""The study: what growing learns and forgets beside other ways to train, alone and mixed.

    python tests/study.py                          run what is missing, two jobs at a time; write OUT/study.md
    python tests/study.py --out=out/study --workers=2 --seeds=0,1,2
    python tests/study.py --tables                 only tables and picture, of what is there
    python tests/study.py --list                   the jobs
    python tests/study.py --quick                  the whole program on tiny networks, to see that it works

A job is one process with one thread: train.py, or tests/controls.py for what train.py does not offer. A job
that has finished is never done again, and a run of train.py that was stopped goes on. Seed s draws the same
batches in every arm, so arms are compared seed by seed.
"""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import controls  # noqa: E402

import data  # noqa: E402
import eval as ev  # noqa: E402
import train  # noqa: E402
from model import GPT  # noqa: E402

# ----- What is compared -----

GROW = "--first_growth=0 --grow_every=1"  # all blocks before the third step: the originals never train
FULL, GROW_2 = "--max_growths=0", f"{GROW} --max_growths=2"
ARMS = {  # name: options of train.py, or a method of tests/controls.py
    "full": FULL,
    "LoRA": "lora",
    "widened MLP": "widened",
    "top 2 unfrozen": f"{FULL} --freeze=top2",
    "grow 2": GROW_2,
    "grow 2, top": f"{GROW_2} --where=top",
    "grow 2, spread": f"{GROW_2} --where=spread",
    "grow 4": f"{GROW} --max_growths=4",
}
CURES = {  # two strengths of each
    "KD on new text, 0.25": "--kd_weight=0.25",
    "KD on new text, 1": "--kd_weight=1",
    "KD on old text, 0.25": "--kd_weight=0.25 --kd_on=retain",
    "KD on old text, 1": "--kd_weight=1 --kd_on=retain",
    "generative replay, 1": "--kd_weight=1 --kd_on=generated",
    "generative replay, 4": "--kd_weight=4 --kd_on=generated",
    "replay 1/16": "--replay=0.0625",
    "replay 1/4": "--replay=0.25",
    "EWC 10": "--ewc_lambda=10",
    "EWC 300": "--ewc_lambda=300",
}


PLAIN = "--lr=3e-3 --lr_schedule=constant --where=upper --kd_weight=0".split()  # what no arm says


class Scale(NamedTuple):
    bases: dict  # name: its shape, as options of `train.py pretrain`
    words: str  # for every run


SMALL, LARGE = "2x64", "4x128"
NORMAL = Scale({SMALL: "--n_layer=2 --n_embd=64", LARGE: "--n_layer=4 --n_embd=128"}, "--max_steps=500")
TINY = "--max_steps=4 --block_size=32 --eval_every=2 --eval_windows=4 --test_windows=4"
QUICK = Scale(dict.fromkeys(NORMAL.bases, f"--n_layer=2 --n_embd=16 {TINY}"), TINY)


def arms_on(base):
    """{name: options}. Ways to keep the old are tried on the small base, with full training and with growth;
    EWC holds originals that train, so growth with it freezes nothing."""
    cured = {
        f"{method} + {cure}": f"{ARMS[method]} {words}"
        + " --freeze=none" * (method != "full" and "ewc" in words)
        for cure, words in CURES.items()
        for method in ("full", "grow 2")
    }
    return ARMS | (cured if base == SMALL else {})


# ----- Jobs -----


class Job(NamedTuple):
    path: Path  # where it writes
    words: list  # a program of the repository, and its options
    after: Path | None = None  # of the job whose network it starts from


def base_path(out, base):
    return out / base / "base"


def arm_path(out, base, arm, seed):
    return out / base / (re.sub(r"[^\w.]+", "-", arm) + f"-seed{seed}")


def jobs_of(out, scale, seeds):
    """All jobs, the bases first."""
    jobs = [
        Job(base_path(out, base), ["train.py", "pretrain", *shape.split()])
        for base, shape in scale.bases.items()
    ]
    for base, seed in itertools.product(scale.bases, seeds):
        start = base_path(out, base)
        for arm, options in arms_on(base).items():
            program, words = ["train.py"], f"{options} {scale.words}".split()
            if words[0] in controls.METHODS:
                program = ["tests/controls.py", words.pop(0)]
            words = [*program, "demo", *PLAIN, *words, f"--init={start}/model", f"--seed={seed}"]
            jobs.append(Job(arm_path(out, base, arm, seed), words, start))
    return jobs


def finished(path):
    return (path / "finished").exists()


def launch(job, quick):
    """Do a job, unless it is finished, and return whether it is."""
    if finished(job.path) or (job.after and not finished(job.after)):
        return finished(job.path)
    job.path.mkdir(parents=True, exist_ok=True)
    program, *words = [*job.words, f"--out={job.path}"]
    words += ["--resume=auto"] if program == "train.py" else []
    status = 0
    if quick:  # in this process: to start one takes longer than the job
        (train if program == "train.py" else controls).main(words)
    else:
        command, env = [sys.executable, ROOT / program, *words], dict(os.environ, OMP_NUM_THREADS="1")
        with open(job.path / "stdout.txt", "a") as file:
            status = subprocess.run(command, stdout=file, stderr=file, env=env).returncode
    if status:
        print(f"{job.path}: exit status {status}, see stdout.txt there", file=sys.stderr)
    else:
        (job.path / "finished").touch()
    return not status


def do(jobs, workers, quick):
    """All jobs, `workers` at a time. A job waits for the one that it starts from, which began before it."""
    left, futures, began = [job for job in jobs if not finished(job.path)], {}, time.perf_counter()

    def run(job):
        if job.after in futures:
            futures[job.after].result()
        return launch(job, quick)

    with ThreadPoolExecutor(workers) as pool:
        if not quick:
            futures.update((job.path, pool.submit(run, job)) for job in left)
        try:
            for n, job in enumerate(left, 1):
                done = launch(job, quick) if quick else futures[job.path].result()
                minutes = (time.perf_counter() - began) / 60
                print(f"{job.path}: {'done' if done else 'NOT done'}, {n} of {len(left)}, "
                      f"{minutes / n * (len(left) - n):.0f} minutes left", flush=True)  # fmt: skip
        except BaseException:  # Ctrl-C: what runs stops in order, and nothing more is started
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ----- Figures: every one is mean ± standard deviation over seeds, or a difference seed by seed -----


def read(path, base):
    """A run, all losses mixed: of growth by its log; of a network that lost its base, with the stored one."""
    run = ev.read_run(path)
    result, store = run["result"], path / "mixed.json"
    if result["learn"]["mixed"] is not None:
        return run
    if not store.exists():
        nets = [GPT.from_pretrained(folder / "model") for folder in (base, path)]
        T, mixed = run["header"]["config"]["block_size"], {}
        for key in ("learn", "retain"):
            tokens = data.load(result[key]["dataset"], data.BYTES, T)["test"]
            mixed[key] = ev.measure(nets, tokens, T, 16, result[key]["windows"])["mixed"]
        store.write_text(json.dumps(mixed))
    for key, loss in json.loads(store.read_text()).items():
        result[key]["mixed"] = loss
    return run


def mean_sd(values, form=".3f"):
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def differs(values, others):
    """The difference seed by seed, or "=" where it is no larger than its standard deviation."""
    d = [a - b for a, b in zip(values, others)]
    if len(d) < 2:
        return "one seed"
    return "=" if abs(statistics.mean(d)) <= statistics.stdev(d) else mean_sd(d, "+.3f")


def at_operations(run, flops):
    """(learning loss, forgetting) on validation when the run had spent so many operations."""
    evals = run["eval"]
    step = flops / run["result"]["flops"] * evals[-1]["step"]  # every step costs the same
    steps, learn, retain = zip(*((e["step"], e["learn"], e["retain"]) for e in evals))
    return np.interp(step, steps, learn), np.interp(step, steps, retain) - retain[0]


def figures(runs, flops):
    """{head of a column: [of each run]}"""
    results = [run["result"] for run in runs]
    learn, forgetting = zip(*(at_operations(run, flops) for run in runs))
    return {
        "learn": [r["learn"]["grown"] for r in results],
        "forgetting": [ev.forgetting(r) for r in results],
        "mixed: learn": [r["learn"]["mixed"] for r in results],
        "mixed: forgetting": [ev.forgetting(r, "mixed") for r in results],
        "equal operations: learn": learn,
        "equal operations: forgetting": forgetting,
    }


# ----- Tables and picture -----


def arms_table(runs, options):
    """Of {arm: its runs}; beside each figure the difference to full training, or to the arm uncured."""
    budget = min(run["result"]["flops"] for run in itertools.chain(*runs.values()))
    of, rows = {arm: figures(found, budget) for arm, found in runs.items()}, []
    for arm, found in runs.items():
        method, _, cure = arm.partition(" + ")
        plain, result = of[method if cure else "full"], found[0]["result"]
        row = {"arm": arm, "options": f"`{options[arm]}`", "seeds": len(found)}
        row["trainable"] = f"{result['trainable']:,}"
        row["stored"] = f"{runs['full'][0]['result']['parameters'] + result['trainable']:,}"
        row["TFLOP"] = f"{result['flops'] / 1e12:.2f}"
        for head, values in of[arm].items():
            said = mean_sd(values, "+.3f" if "forgetting" in head else ".3f")
            row[head] = f"{said} ({differs(values, plain[head])})"
        rows.append(row)
    return f"{ev.table(rows)}\n\nEqual operations: {budget / 1e12:.2f} TFLOP, where the cheapest arm ends."


def picture(runs, path):
    """Forgetting against learning loss, each arm of {arm: its runs} labelled where it lies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    for axes, predictor in zip(figure.subplots(1, 2), ("grown", "mixed")):
        title = {"grown": "one network alone", "mixed": "mixed with the old network"}[predictor]
        axes.set(title=title, xlabel="learning loss on code, test", ylabel="forgetting on docs, test")
        axes.axhline(0, color="gray", linewidth=0.5)
        for arm, found in runs.items():
            results = [run["result"] for run in found]
            x = statistics.mean(r["learn"][predictor] for r in results)
            y = statistics.mean(ev.forgetting(r, predictor) for r in results)
            axes.plot(x, y, "o", color=f"C{list(ARMS).index(arm.partition(' + ')[0])}")
            axes.annotate(arm, (x, y), (3, 3), textcoords="offset points", fontsize="x-small")
    figure.savefig(path, dpi=130)


def write(out, scale, seeds, command):
    """OUT/study.md and a picture for each base, of the arms whose runs are all finished."""
    parts = []
    for base, shape in scale.bases.items():
        runs, options = {}, arms_on(base)
        for arm in options:
            paths = [arm_path(out, base, arm, seed) for seed in seeds]
            if all(map(finished, paths)):
                runs[arm] = [read(path, base_path(out, base)) for path in paths]
        if "full" not in runs:
            continue
        picture(runs, out / f"study-{base}.png")
        learn, retain = (runs["full"][0]["result"][text]["base"] for text in ("learn", "retain"))
        parts.append(f"""## Base {base}: learn {learn:.3f}, retain {retain:.3f}

`python train.py pretrain {shape} --out=BASE`, then for each arm and seed S \
`python train.py demo OPTIONS {scale.words} --init=BASE/model --seed=S`
(LoRA and the widened MLP: `python tests/controls.py lora demo ...`)

{arms_table(runs, options)}

![Forgetting against learning](study-{base}.png)
""")
    (out / "study.md").write_text(f"""# The study

`{command}`

Learn: test loss on `code`; forgetting: test loss on `docs` minus the base's; nats per token, mean ± standard
deviation over seeds {", ".join(map(str, seeds))}. In brackets the difference seed by seed, to full training
or, with a cure, to the same without it; "=" is one within its own standard deviation, from which nothing
follows. Mixed: with the network before (grow.mix), which growth, LoRA and the widened MLP have inside; for
the others it is stored beside, and counted. LoRA (on all four matrices of every block) and the widened MLP
train as many parameters, within 1%, as growth by {controls.ADDED_BLOCKS} blocks, which come before the first
two steps. At equal operations losses are on validation windows, read off the curves. Seeds differ in batches
and fresh weights; each base is trained once.

{"".join(parts)}""")
    print(f"written: {out}/study.md and its pictures")


def main(argv):
    parser = ev.parser("tests/study.py", __doc__, "[--option=value ...]")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "study")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="print the jobs, run nothing")
    parser.add_argument("--quick", action="store_true", help="tiny networks, few steps, one seed")
    a = parser.parse_args(argv)
    scale, seeds = (QUICK, a.seeds[:1]) if a.quick else (NORMAL, a.seeds)
    jobs = jobs_of(a.out, scale, seeds)
    if a.list:
        for job in jobs:
            print(f"{job.path.relative_to(a.out)}: {' '.join(job.words)}")
        return
    if not a.tables:
        do(jobs, a.workers, a.quick)
        if left := sum(not finished(job.path) for job in jobs):
            raise ev.UserError(f"{left} jobs are not finished (see above): the same command goes on")
    write(a.out, scale, seeds, " ".join(["python", "tests/study.py", *argv]))


if __name__ == "__main__":
    ev.run_main(main)
