"""The README is true of the program: its commands run, and the files that it names are there."""

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
# The demo and what it starts from, as small as they get.
PRETRAIN = dict(n_layer=2, n_embd=16, n_head=2, block_size=16, max_steps=4, warmup_steps=0, test_windows=2)
SMALL = ["--block_size=16", "--max_steps=4", "--eval_windows=2", "--test_windows=2", "--eval_every=2"]


def of(prefix):
    return sorted({c for c in COMMANDS if c.startswith(prefix)})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished demo run in out/demo, and what it started from in out/pretrained."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(train.PRESETS, "pretrain", train.PRESETS["pretrain"] | PRETRAIN)
        train.main(["demo", *SMALL, "--grow_every=1", "--out=out/demo"])
        yield folder


def test_the_base_is_named_by_the_command_that_makes_it(home):
    """And not by that of the demo."""
    assert ev.read_run(home / "out" / "pretrained")["header"]["command"] == "python train.py pretrain"


@pytest.mark.parametrize("command", [c for c in of("python train.py") if "demo" in c])
def test_every_demo_command_runs(command, tmp_path, home):
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
    words = words[words.index("train.py") + 1 :]
    if "--help" in words:
        with pytest.raises(SystemExit):
            train.parse(words)
        return
    options = train.parse(words)
    texts = {"dataset": "code", "retain": "docs"}
    own = {f: name for f, name in texts.items() if getattr(options, f).endswith(".txt")}
    train.check(dataclasses.replace(options, **own))


@pytest.mark.parametrize("command", of("python eval.py"))
def test_every_eval_command_runs(command, home, tmp_path, capsys):
    arguments = ["out/demo" if a.startswith("out/") else a for a in shlex.split(command)[2:]]
    arguments = [f"--plot={tmp_path / 'plot.png'}" if a.startswith("--plot") else a for a in arguments]
    parsed = ev.arguments(arguments)
    if not any(name in ev.SIZES for name in parsed.names):  # those need OpenAI's weights
        ev.main(arguments)
        assert capsys.readouterr().out


def test_every_tests_program_is_there():
    for command in of("python tests/"):
        assert (ROOT / shlex.split(command)[1]).exists()


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"[`(]((?:tests/)?\w+\.(?:py|md|txt|png))[`)]", TEXT):
        if not name.startswith(("metrics", "notes", "losses", "frontier")):
            assert (ROOT / name).exists(), name


def test_the_excerpt_of_the_loop_is_the_loop():
    """In its order, with what is left out marked by dots."""
    source = iter(line.strip() for line in (ROOT / "train.py").read_text(encoding="utf-8").splitlines())
    (excerpt,) = re.findall(r"```python\n(while True.*?)```", TEXT, re.S)
    for line in map(str.strip, excerpt.splitlines()):
        assert line == "..." or line in source, line


def test_the_readme_is_short():
    assert len(TEXT.encode()) <= 12_000
