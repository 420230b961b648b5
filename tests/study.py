"""The study: when growing pays, what keeps the old, and what predicting with the old network is worth.

    python tests/study.py                          run what is missing, two jobs at a time; write OUT/study.md
    python tests/study.py --out=out/study --workers=2 --seeds=0,1,2
    python tests/study.py --tables                 only tables and picture, of what is there
    python tests/study.py --list                   the jobs, with the seconds that they should take
    python tests/study.py --quick                  the whole program on tiny networks, to see that it works

Learning and forgetting are losses on `code` and `docs`. The arms and their jobs are in tests/study_runs.py.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import controls  # noqa: E402
from study_runs import (  # noqa: E402
    ALPHAS,
    ARMS,
    CURED,
    CURES,
    EXTRA,
    FULL,
    GROW_2,
    LARGE,
    LIMITS,
    NORMAL,
    ORDERS,
    OWN,
    QUICK,
    REFERENCE,
    ROOT,
    SHARES,
    WHOLE,
    arm_path,
    arms_on,
    do,
    finished,
    jobs_of,
    markdown,
    measure,
    measuring_jobs,
    options,
)  # fmt: skip

import eval as ev  # noqa: E402

# ----- Figures: every one is mean ± standard deviation over seeds, or a difference seed by seed -----


def mean_sd(values, form=".3f"):
    """Of numbers. A word instead of a number says why a seed has none, and is counted."""
    words = [v for v in values if isinstance(v, str)]
    if words:
        return ", ".join(f"{w} ({words.count(w)} of {len(values)} seeds)" for w in sorted(set(words)))
    there = list(values)
    spread = f" ± {statistics.stdev(there):{form.lstrip('+')}}" if len(there) > 1 else ""
    return f"{statistics.mean(there):{form}}{spread}"


def differs(values, others):
    """The difference seed by seed, or "=" where it is no larger than its standard deviation."""
    d = [a - b for a, b in zip(values, others)]
    if len(d) < 2:
        return "one seed"
    return "=" if abs(statistics.mean(d)) <= statistics.stdev(d) else mean_sd(d, "+.3f")


def lowest_at(points, limit):
    """The lowest learning loss along a dial where forgetting is at most `limit`; straight between alphas."""
    path = np.array(points)
    fine = np.concatenate([np.linspace(a, b, 101) for a, b in itertools.pairwise(path)])
    return float(fine[fine[:, 1] <= limit, 0].min())


def hypervolume(points):
    """Area between the dial and the corner (the base's learning loss, REFERENCE nats forgotten): the gain at
    each limit of forgetting from 0 to REFERENCE, integrated. What is forgotten less than 0 counts as 0."""
    gains = [points[0][0] - lowest_at(points, limit) for limit in np.linspace(0, REFERENCE, 51)]
    return float(np.mean(gains)) * REFERENCE


def retained_at(evals, target, after):
    """Forgetting on validation where the learning loss first falls to `target`. Not within the first `after`
    steps, where Adam's first large steps forget what is soon learned again: there it is "early"."""
    for a, b in itertools.pairwise(evals):
        if b["learn"] <= target < a["learn"]:
            part = (a["learn"] - target) / (a["learn"] - b["learn"])
            there = a["retain"] + part * (b["retain"] - a["retain"]) - evals[0]["retain"]
            return there if a["step"] >= after else "early"
    return "not reached"


def at_operations(run, flops):
    """(learning loss, forgetting) on validation when the run had spent so many operations."""
    evals, r = run["eval"], run["result"]
    step = flops / r["flops"] * evals[-1]["step"]  # every step costs the same
    steps, learn, retain = zip(*((e["step"], e["learn"], e["retain"]) for e in evals))
    return np.interp(step, steps, learn), np.interp(step, steps, retain) - retain[0]


def runs_of(out, base, arm, seeds):
    paths = [arm_path(out, base, arm, seed) for seed in seeds]
    return [ev.read_run(path) for path in paths if finished(path)]


def learned(runs):
    return [run["result"]["learn"]["grown"] for run in runs]


def forgot(runs):
    return [ev.forgetting(run["result"]) for run in runs]


# ----- Tables -----


def when_growing_pays(out, scale, seeds, base):
    runs = {arm: found for arm in arms_on(base) if (found := runs_of(out, base, arm, seeds))}
    budget = min(run["result"]["flops"] for run in itertools.chain(*runs.values()))
    full, rows = runs["full"], []
    at = {arm: [at_operations(run, budget) for run in found] for arm, found in runs.items()}
    for arm, found in runs.items():
        r = found[0]["result"]
        learn, old = zip(*at[arm])
        rows.append([
            ("arm", arm, ""), ("seeds", len(found), ""), ("trainable", r["trainable"], ","),
            ("TFLOP", r["flops"] / 1e12, ".2f"), ("learn", mean_sd(learned(found)), ""),
            ("- full", differs(learned(found), learned(full)), ""),
            ("forgetting", mean_sd(forgot(found), "+.3f"), ""),
            ("- full ", differs(forgot(found), forgot(full)), ""),
            ("learn, equal operations", mean_sd(learn), ""),
            ("- full  ", differs(learn, list(zip(*at["full"]))[0]), ""),
            ("forgetting, equal operations", mean_sd(old, "+.3f"), ""),
        ])  # fmt: skip
    start = full[0]["result"]
    return f"""### Base {base}: learn {start["learn"]["base"]:.3f}, retain {start["retain"]["base"]:.3f}

`python train.py pretrain {scale.bases[base]} --out=BASE`, then for each arm and seed S \
`python {" ".join(options(scale, base, "full", {"full": "OPTIONS"}))} --init=BASE/model --seed=S`

{markdown(rows)}

At equal tokens on the test splits; at equal operations ({budget / 1e12:.2f} TFLOP, where the cheapest ends)
on validation windows, read off the curves."""


def what_keeps_the_old(out, scale, seeds):
    runs = {arm: found for arm in ("full", "grow 2", *CURED) if (found := runs_of(out, WHOLE, arm, seeds))}
    end = statistics.mean(run["eval"][-1]["learn"] for run in runs["grow 2"]) + 0.02
    middle = statistics.mean(run["eval"][len(run["eval"]) // 2]["learn"] for run in runs["full"])
    after, rows = min(100, scale.steps["2x64"] // 5), []
    for arm, found in runs.items():
        plain = runs[arm.partition(" +")[0]]
        rows.append([
            ("arm", arm, ""), ("options", f"`{CURES.get(arm.partition(' + ')[2], 'no more')}`", ""),
            ("learn", mean_sd(learned(found)), ""),
            ("- plain", differs(learned(found), learned(plain)), ""),
            ("forgetting", mean_sd(forgot(found), "+.3f"), ""),
            ("- plain ", differs(forgot(found), forgot(plain)), ""),
            *((f"forgetting at learn = {target:.2f}",
               mean_sd([retained_at(run["eval"], target, after) for run in found], "+.3f"), "")
              for target in (middle, end)),
        ])  # fmt: skip
    own = []
    for arm in OWN:
        if found := runs_of(out, WHOLE, arm, seeds):
            gain = [run["result"]["learn"]["grown"] - run["result"]["learn"]["base"] for run in found]
            own.append(
                [("trained on docs alone", arm, ""), ("change of loss on docs", mean_sd(gain, "+.3f"), "")]
            )
    command, table = " ".join(options(scale, WHOLE, "full", {"full": "OPTIONS"})), markdown(rows)
    early = f'"Early" is before step {after}: Adam\'s first steps forget what is soon learned again.'
    return f"""`python {command} --init=BASE/model --seed=S`

{table}

OPTIONS are those of the row and, for full, `{FULL}`, for grow 2,
`{GROW_2}` (with EWC and `--freeze=none`). "Plain" is the same without
its cure. Forgetting at an equal learning loss is on validation windows, where the loss first falls to what
full fine-tuning reaches half-way ({middle:.2f}), and to 0.02 above the end of growth ({end:.2f}).
{early if "early" in table else ""}

What the base gains on its own text in as many steps, so that replay's gain is not mistaken for retention:

{markdown(own) if own else ""}"""


def frontier(measured):
    """All arms along their dials."""
    rows, full = [], [m["dial"]["full"] for m in measured]
    for arm in measured[0]["dial"]:
        dials = [m["dial"][arm] for m in measured]
        row = [("arm", arm, "")]
        for limit in LIMITS:
            row.append((f"learn at forgetting <= {limit}", mean_sd([lowest_at(d, limit) for d in dials]), ""))
            against = differs([lowest_at(d, limit) for d in dials], [lowest_at(d, limit) for d in full])
            row.append((f"- full at {limit}", against, ""))
        volumes = [1000 * hypervolume(d) for d in dials]
        row.append(("hypervolume x 1000", mean_sd(volumes, ".1f"), ""))
        rows.append(row + [("- full", differs(volumes, [1000 * hypervolume(d) for d in full]), "")])
    return markdown(rows)


def dials(measured):
    rows = []
    for arm in ("full", "LoRA", "grow 2"):
        row = [("learn / forgetting", arm, "")]
        for i, alpha in enumerate(ALPHAS):
            learn, old = zip(*(m["dial"][arm][i] for m in measured))
            row.append((f"alpha {alpha}", f"{mean_sd(learn)} / {mean_sd(old, '+.3f')}", ""))
        rows.append(row)
    return markdown(rows)


def shares(measured):
    """Mixed losses of each stream at each share, on validation windows; the best share on their mean."""
    rows, averages = [], {}
    streams = measured[0]["mixed"]["grow 2"]["val"]
    for method, share in itertools.product(("grow 2", "LoRA", "full"), map(str, SHARES)):
        losses = {name: [m["mixed"][method]["val"][name][share][-1] for m in measured] for name in streams}
        average = averages[method, share] = [statistics.mean(seed) for seed in zip(*losses.values())]
        rows.append([("method", method, ""), ("share", share, ""),
                     *((name, mean_sd(values), "") for name, values in losses.items()),
                     ("average", mean_sd(average), ""),
                     ("- share 0", differs(average, averages[method, "0"]), "")])  # fmt: skip
    best = min(map(str, SHARES), key=lambda share: statistics.mean(averages["grow 2", share]))
    return f"{markdown(rows)}\n\nThe lowest average for growth is at share {best}."


def mixtures(measured):
    rows = []
    for method, share in itertools.product(("grow 2", "LoRA", "full"), (None, "0", "0.01")):
        m = [one["mixed"][method] for one in measured]
        learn, old = ([one["test"][name][share or "0"] for one in m] for name in ("learn", "retain"))
        k = 1 if share is None else 2
        rows.append([
            ("method", method, ""),
            ("predicts", "last alone" if share is None else f"mixed, share {share}", ""),
            ("learn", mean_sd([x[k] for x in learn]), ""),
            ("forgetting", mean_sd([x[k] - x[0] for x in old], "+.3f"), ""),
            ("stored parameters", m[0]["stored"], ","),
            ("block passes a token", m[0]["passes"] if share else "", ""),
            ("heads a token", m[0]["heads"] if share else "", ""),
        ])  # fmt: skip
    return markdown(rows)


def sequences(measured):
    rows = []
    for order, method, share in itertools.product(ORDERS, ("full", "grow 2"), (None, "0", "0.01")):
        columns = [m["sequence"][f"{' '.join(order)} {method}"][share or "0"] for m in measured]
        k = -2 if share is None else -1
        average = [statistics.mean(text[k] for text in seed) for seed in columns]
        transfer = [
            statistics.mean(text[k] - text[i] for i, text in enumerate(seed[:-1])) for seed in columns
        ]
        kept = "stored copies" if method == "full" else "versions"
        rows.append([
            ("order", f"docs, {', '.join(order)}", ""), ("method", method, ""),
            ("predicts", "last alone" if share is None else f"{kept} mixed, share {share}", ""),
            ("average loss", mean_sd(average), ""), ("backward transfer", mean_sd(transfer, "+.3f"), ""),
            *((f"text {i + 1}", mean_sd([seed[i][k] for seed in columns]), "")
              for i in range(len(order) + 1)),
        ])  # fmt: skip
    return markdown(rows)


def at_124m():
    """The commands of the same arms for whoever has OpenAI's weights and a GPU."""
    lines = ["for S in 0 1 2; do"]
    for words in (ARMS | EXTRA).values():
        method, _, more = words.partition(" ")
        start = f"python train.py {words}"
        if method in controls.METHODS:
            name = words.replace(" --lr=", "-")
            start = " ".join(
                ["python tests/controls.py", method, "card", *more.split(), f"--out=out/{name}-$S"]
            )
        start = start.replace("6e-3", "1e-4").replace("1e-3", "1.7e-5")  # of the card's 5e-5
        lines.append(f"  {start} --seed=$S")
    for ewc, freeze in ((False, ""), (True, " --freeze=none")):
        cures = " ".join(f'"{words}"' for words in CURES.values() if ("ewc" in words) == ewc)
        lines += [f"  for CURE in {cures}; do", f"    python train.py {FULL} $CURE --seed=$S",
                  f"    python train.py {GROW_2}{freeze} $CURE --seed=$S", "  done"]  # fmt: skip
    return "\n".join([
        *lines, "done", "# then, for each RUN of growth on a frozen base: mixed, and the dial",
        "python eval.py RUN --dataset=wikitext2,webtext --share=0.01",
        "python eval.py RUN --dataset=wikitext2,webtext --alpha=0.5",
    ])  # fmt: skip


def picture(out, seeds, measured, path):
    """Forgetting against learning loss on the demo's trained base: means over seeds, dials as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="learning loss on code, validation", ylabel="forgetting on docs, validation")
    axes.axhline(0, color="gray", linewidth=0.5)
    markers = dict(zip([*CURES, *EXTRA, "grow 2, none frozen"], "^vDd<>sphHX*1234"))
    families = ["full", "grow 2", "LoRA", "widened MLP", "top 2 unfrozen", "grow 4"]
    for arm in ARMS | EXTRA | CURED:
        if runs := runs_of(out, WHOLE, arm, seeds):
            ends = [(r["eval"][-1]["learn"], r["eval"][-1]["retain"] - r["eval"][0]["retain"]) for r in runs]
            method, _, cure = arm.partition(" + ")
            color = f"C{families.index(method.partition(',')[0])}"
            axes.plot(*np.mean(ends, 0), markers.get(cure or arm, "o"), color=color, label=arm)
            if arm in measured[0]["dial"]:
                line = np.mean([m["dial"][arm] for m in measured], 0)
                axes.plot(*line.T, color=color, linewidth=1.5 if arm in families else 0.3)
    for method, marker in {"grow 2": "*", "LoRA": "P", "full": "X"}.items():
        losses = [m["mixed"][method]["val"] for m in measured]
        ends = [(x["learn"]["0"][-1], x["retain"]["0"][-1] - x["retain"]["0"][0]) for x in losses]
        axes.plot(*np.mean(ends, 0), marker, color="black", markersize=13, label=f"{method}, mixed (share 0)")
    axes.legend(fontsize="xx-small", ncols=2)
    figure.savefig(path, dpi=130)


def write(out, scale, seeds, command):
    """OUT/study.md and OUT/study.png, of finished jobs."""
    measured = [json.loads((out / f"measured-seed{seed}" / "measured.json").read_text()) for seed in seeds]
    by_base = "\n\n".join(when_growing_pays(out, scale, seeds, base) for base in scale.bases)
    picture(out, seeds, measured, out / "study.png")
    (out / "study.md").write_text(f"""# The study

`{command}`

Learn: test loss on `code`; forgetting: test loss on `docs` minus the base's; nats per token, mean ± standard
deviation over seeds {", ".join(map(str, seeds))}. To save time, {LARGE} has the first two seeds only, fewer
arms, and {scale.steps[LARGE]} steps instead of {scale.steps["2x64"]}. A column that begins with "-" is a
difference seed by seed; "=" is one within its own standard deviation, from which nothing follows. LoRA (on
all four matrices of every block) and the widened MLP train as many parameters, within 1%, as growth by
{controls.ADDED_BLOCKS} blocks, which come before the first two steps. All arms have one
learning rate unless they say another. Seeds differ in batches and fresh weights; each base is trained once.

## When does growing pay?

{by_base}

## What keeps the old?

{what_keeps_the_old(out, scale, seeds)}

## The dial

`python eval.py RUN --alpha=A --out=FOLDER` for growth; for the others the weights, interpolated (WiSE-FT).
Validation windows.

{dials(measured)}

Along the dial of every arm (straight between alphas). Hypervolume: gain over the base integrated over limits
of forgetting from 0 to {REFERENCE} nats: the reference point is (the base's learning loss, {REFERENCE}).

{frontier(measured)}

![Forgetting against learning](study.png)

## Predicting with the old network, too

`python eval.py RUN --dataset=code,docs --share=A`, for growth; with the stored base for the others.
Validation windows; in "code then docs" each has its first half from code, the other from docs.

{shares(measured)}

The same on the test splits, and what it costs:

{mixtures(measured)}

## Three texts in a row

`python train.py demo {GROW_2} --init=RUN/model --dataset=headers --retain=code --out=NEXT`, then \
`python eval.py NEXT --dataset=docs,code,headers --split=test`. Test splits.

{sequences(measured)}

Backward transfer: loss on all but the last text, minus that of the network that had just learned it.

## The same at 124M, for whoever has the weights and a GPU

```sh
{at_124m()}
```
""")
    print(f"written: {out}/study.md and {out}/study.png")


def main(argv):
    parser = ev.parser("tests/study.py", __doc__, "[--option=value ...]")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "study")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="print the jobs, run nothing")
    parser.add_argument("--quick", action="store_true", help="tiny networks, few steps, one seed")
    parser.add_argument("--measure", type=int, metavar="SEED", help="(a job, whose folder is --out)")
    a = parser.parse_args(argv)
    scale, seeds = (QUICK, a.seeds[:1]) if a.quick else (NORMAL, a.seeds)
    if a.measure is not None:
        found = json.dumps(measure(a.out.parent, a.measure, scale), allow_nan=False)
        (a.out / "measured.json").write_text(found)
        return
    jobs, last = jobs_of(a.out, scale, seeds), measuring_jobs(a.out, seeds, a.quick)
    if a.list:
        for job in jobs + last:
            print(f"{job.seconds:4.0f} s  {job.path.relative_to(a.out)}: {' '.join(job.words)}")
        return
    for stage in () if a.tables else (jobs, last):
        do(a.out, stage, a.workers, a.quick)
        if left := sum(not finished(job.path) for job in stage):
            raise ev.UserError(f"{left} jobs are not finished (see above): the same command goes on")
    write(a.out, scale, seeds, " ".join(["python", "tests/study.py", *argv]))


if __name__ == "__main__":
    ev.run_main(main)
