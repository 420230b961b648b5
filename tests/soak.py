"""The long form of the kill test: SIGKILL a run at random moments, resume it, compare the end bitwise.

python tests/soak.py --kills 50"""

import argparse
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401  (puts the repository on the path)
import test_train

import train

VARIANTS = {
    "schedule, frozen base, distillation": test_train.VARIANTS["distilled from step 0"],
    "plateau, nothing frozen, EWC, replay": test_train.VARIANTS["plateau"] | test_train.KEEPING,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each variant")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    began, folder, kills, said = time.time(), Path(tempfile.mkdtemp()), a.kills, []
    text = conftest.write_words(folder)
    steps = dict(max_steps=6 * kills, grow_every=kills, max_growths=3, save_every=1, log_every=2)
    for number, (name, more) in enumerate(VARIANTS.items()):
        whole, killed = folder / f"whole{number}", folder / f"killed{number}"
        process = test_train.in_fork(train.main, test_train.arguments(text, whole, **steps | more))
        process.join()
        argv = test_train.arguments(text, killed, **steps | more)
        reached = test_train.kill_and_resume(argv, killed, kills, a.seed + number)
        test_train.assert_same_run(whole, killed)
        said.append(f"{name}: killed {kills} times, the last at step {reached[-1]} of {6 * kills}")
    print(*said, "both ends are bitwise those of the uninterrupted runs", sep="\n")
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
