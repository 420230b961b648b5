"""The study: what learns most and forgets least, at the demo's size. One line per arm, three seeds each.

    python tests/study.py                     run what is missing, two at a time; print and write OUT/study.md
    python tests/study.py --out=out/study --workers=2 --seeds=0,1,2
    python eval.py out/study/*-seed0 --plot=frontier.png

Every arm is `python train.py demo OPTIONS --seed=S`, and starts from the same pretrained network: the demo's
base, trained once into out/pretrained of the folder that this runs in.
"""

import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import eval as ev  # noqa: E402
import train  # noqa: E402

ZERO = "--first_growth=0 --grow_every=1"  # both blocks before the second step: the originals never train
ARMS = {
    "full fine-tuning": "--max_growths=0",
    "full + EWC": "--max_growths=0 --ewc_lambda=10",
    "full + replay": "--max_growths=0 --replay=0.1875",
    "full + KD retain": "--max_growths=0 --kd_weight=1 --kd_on=retain",
    "top 2 unfrozen": "--max_growths=0 --freeze=top2",
    "card": "",
    "card, lr 4e-3": "--lr=4e-3",
    "card + KD retain": "--kd_weight=1 --kd_on=retain",
    "nothing frozen + replay": "--freeze=none --replay=0.1875",
    "zero, top": f"{ZERO} --where=top",
    "zero, spread": f"{ZERO} --where=spread",
    "zero, upper": ZERO,
    "zero, fresh": f"{ZERO} --block_init=fresh",
    "zero + replay": f"{ZERO} --replay=0.1875",
    "zero + KD train": f"{ZERO} --kd_weight=1 --kd_on=train",
    "zero + KD retain": f"{ZERO} --kd_weight=1 --kd_on=retain",
    "zero + KD dream": f"{ZERO} --kd_weight=1 --kd_on=dream",
}


def folder(out, arm, seed):
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in arm.replace(", ", "-").replace(" + ", "+"))
    return out / f"{name.replace('--', '-')}-seed{seed}"


def launch(words, log):
    """Run train.py with these words on one thread; return the exit status."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, str(ROOT / "train.py"), *words, "--resume=auto"]
    with open(log, "a") as file:
        return subprocess.run(command, stdout=file, stderr=file, env=env).returncode


def pretrain(out):
    """The network that all arms start from, before several of them want it at once."""
    if Path(train.PRETRAINED, "model").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    if status := launch(["pretrain"], out / "pretrain.txt"):
        sys.exit(f"pretraining: exit status {status}, see {out}/pretrain.txt")


def run(out, arm, seed):
    """Run one arm with one seed, or go on with it; return the exit status."""
    path = folder(out, arm, seed)
    if (path / "model").exists():
        return 0
    path.mkdir(parents=True, exist_ok=True)
    return launch(["demo", *shlex.split(ARMS[arm]), f"--seed={seed}", f"--out={path}"], path / "stdout.txt")


def retained_at(evals, target):
    """Validation loss `retain` where `learn` first reaches `target`, interpolated; None if it never does."""
    for a, b in zip(evals, evals[1:]):
        if b["learn"] <= target < a["learn"]:
            share = (a["learn"] - target) / (a["learn"] - b["learn"])
            return a["retain"] + share * (b["retain"] - a["retain"])
    return None


def spread(values):
    if any(v is None for v in values):
        return "not reached"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def table(out, seeds, target):
    rows = []
    for arm, options in ARMS.items():
        runs = [ev.read_run(folder(out, arm, s)) for s in seeds if (folder(out, arm, s) / "model").exists()]
        if not runs:
            continue
        r = [run["result"] for run in runs]
        at = [retained_at(run["eval"], target) for run in runs]
        start = runs[0]["eval"][0]["retain"]
        rows.append([
            ("arm", arm, ""), ("options", f"`{options}`", ""), ("runs", len(runs), ""),
            ("learn, test loss", spread([x["learn"]["grown"] for x in r]), ""),
            ("forgetting", spread([ev.forgetting(x) for x in r]), ""),
            ("KL", spread([x["retain"]["kl"] for x in r]), ""),
            (f"forgetting at learn = {target}", spread([None if a is None else a - start for a in at]), ""),
            ("trainable", f"{r[0]['trainable'] / 1e6:.2f}M", ""),
        ])  # fmt: skip
    return ev.markdown(rows) if rows else "no finished run"


def main():
    parser = ev.Parser("study.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "study")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=2.0, help="learn: the validation loss to compare at")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    a = parser.parse_args()
    jobs = [] if a.table else [(arm, seed) for seed in a.seeds for arm in ARMS]
    if jobs:
        pretrain(a.out)
    with ThreadPoolExecutor(a.workers) as pool:
        for job, status in zip(jobs, pool.map(lambda job: run(a.out, *job), jobs)):
            if status:
                print(f"{job}: exit status {status}, see {folder(a.out, *job)}/stdout.txt", file=sys.stderr)
    text = table(a.out, a.seeds, a.target)
    print(text)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "study.md").write_text(f"`python tests/study.py`\n\n{text}\n")


if __name__ == "__main__":
    main()
