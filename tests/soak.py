"""The long form of the kill test: SIGKILL a run at random moments, resume it, compare the end bitwise.

python tests/soak.py --kills 50
"""

import dataclasses
import random
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import conftest  # noqa: F401  (puts the repository on the path)
import test_train

import eval as ev
import train


def main():
    parser = ev.Parser("tests/soak.py", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    began, folder = time.time(), Path(tempfile.mkdtemp())
    text = folder / "words.txt"
    words = ["grow", "learn", "keep"]
    lines = (random.Random(i).choices(words, k=9) for i in range(900))
    text.write_text("\n".join(" ".join(line) for line in lines))
    variants = {
        "schedule, frozen base, distillation": dict(
            grow_every=a.kills * 4, first_growth=0, kd_weight=1.0, kd_on="retain", kd_rows=2,
        ),
        "plateau, nothing frozen, EWC, replay": dict(
            trigger="plateau", patience=2, min_delta=0.5, freeze="none", ewc_lambda=10.0, ewc_batches=2,
            replay=0.5, grow_every=train.Options.grow_every,  # the default, so that it is not typed
        ),
    }  # fmt: skip
    survived = 0
    for number, (name, more) in enumerate(variants.items()):
        more |= dict(retain="docs", max_steps=a.kills * 24, save_every=1, log_every=2)
        whole = test_train.options(str(text), folder / f"whole{number}", **more)
        subprocess.run(test_train.command(whole), check=True, capture_output=True)
        o = dataclasses.replace(whole, out=str(folder / f"killed{number}"))
        kills = a.kills // 2 if number == 0 else a.kills - a.kills // 2
        reached = test_train.kill_and_resume(o, folder / f"whole{number}", kills, a.seed + number)  # asserts
        survived += len(reached)
        inside = Counter("at the end" if s == more["max_steps"] else "under way" for s in reached)
        print(
            f"{name}: killed {len(reached)} times ({dict(inside)}), last checkpoint at step {reached[-1]} of "
            f"{more['max_steps']}; the end is bitwise that of the uninterrupted run"
        )
    print(f"{survived} kills survived of {a.kills} tried, in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
