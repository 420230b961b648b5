"""The README is true of the program: its commands run, its options are the options."""

import dataclasses
import re
import shlex

import pytest
from conftest import ROOT

import eval as ev
import train

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.S))
COMMANDS = [line.split("#")[0].strip() for line in FENCES.splitlines() if line.split("#")[0].strip()]
SMALL = ["--n_layer=2", "--n_embd=16", "--n_head=2", "--block_size=16", "--pretrain_steps=4", "--max_steps=4",
         "--eval_windows=2", "--test_windows=2", "--eval_every=2"]  # fmt: skip


def of(prefix):
    return sorted({c for c in COMMANDS if c.startswith(prefix)})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished demo run, as small as it gets."""
    out = str(tmp_path_factory.mktemp("run") / "demo")
    train.main(["demo", *SMALL, "--grow_every=1", f"--out={out}"])
    return out


@pytest.mark.parametrize("command", [c for c in of("python train.py") if "demo" in c])
def test_every_demo_command_runs(command, tmp_path):
    arguments = [a for a in shlex.split(command)[2:] if not a.startswith(("--resume", "--out"))]
    small = [a for a in SMALL if not any(given.startswith(a.split("=")[0] + "=") for given in arguments)]
    # of these, only what has an effect in this run
    small += ["--patience=2"] if "--trigger=plateau" in arguments else ["--grow_every=1"]
    small += ["--dreams=4"] if "--kd_on=dream" in arguments else []
    train.main([*arguments, *small, f"--out={tmp_path / 'run'}"])
    assert ev.read_run(tmp_path / "run")["result"]


@pytest.mark.parametrize("command", [c for c in of("python train.py") + of("torchrun") if "demo" not in c])
def test_every_other_train_command_is_valid(command):
    """These need OpenAI's weights, or files of the reader's: their options are parsed and checked."""
    words = shlex.split(command)
    options = train.parse(words[words.index("train.py") + 1 :])
    texts = {"dataset": "code", "retain": "docs"}
    own = {f: name for f, name in texts.items() if getattr(options, f).endswith(".txt")}
    own |= {"init": "gpt2"} if options.init == "FOLDER" else {}
    train.check(dataclasses.replace(options, **own))


@pytest.mark.parametrize("command", of("python eval.py"))
def test_every_eval_command_runs(command, run, tmp_path, capsys):
    arguments = [run if a.startswith("out/") else a for a in shlex.split(command)[2:]]
    arguments = [f"--plot={tmp_path / 'plot.png'}" if a.startswith("--plot") else a for a in arguments]
    parsed = ev.arguments(arguments)
    if not any(name in ev.SIZES for name in parsed.names):  # those need OpenAI's weights
        ev.main(arguments)
        assert capsys.readouterr().out


def test_every_tests_program_is_there():
    for command in of("python tests/"):
        assert (ROOT / shlex.split(command)[1]).exists()


def test_options_in_the_readme_are_those_of_the_program():
    listed = dict(re.findall(r"^\| `--(\w+)` \| `?(.*?)`? \|", TEXT, re.M))
    actual = {f.name: str(f.default) for f in dataclasses.fields(train.Options)}
    assert listed == actual


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`((?:tests/)?\w+\.(?:py|md|txt|png))`", TEXT):
        if not name.startswith(("trace", "metrics", "notes", "frontier")):
            assert (ROOT / name).exists(), name
