"""The README is true of the program: its commands run, and the files that it names are there."""

import os
import re
import shlex
import signal

import pytest
from conftest import ROOT, on_step, typed

import data
import eval as ev
import train
from model import GPT, SIZES

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.S))
COMMANDS = sorted({line.split("#")[0].strip() for line in FENCES.splitlines()} - {""})
PROGRAMS = {"train.py": train.main, "eval.py": ev.main}
PRETRAIN = dict(n_layer=2, n_embd=16, n_head=2, block_size=16, max_steps=4, warmup_steps=0, test_windows=2)
SMALL = dict(block_size=16, max_steps=4, eval_windows=2, test_windows=2, eval_every=2)


class Begun(Exception):
    """Raised in place of what would need OpenAI's weights, once the options have been read."""


def begin(*_, **__):
    raise Begun


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished demo run in out/demo, what it started from in out/pretrain, and a text."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "notes.txt").write_text("one line of notes\n" * 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(train.PRESETS, "pretrain", train.PRESETS["pretrain"] | PRETRAIN)
        train.main(typed("demo", **SMALL, grow_every=1, out="out/demo"))
        yield folder


def test_the_base_is_named_by_the_command_that_makes_it(home):
    """And not by that of the demo."""
    assert ev.read_run(home / "out" / "pretrain")["header"]["command"] == "python train.py pretrain"


def test_the_demo_goes_on_after_a_stop_in_the_training_of_its_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.PRESETS, "pretrain", train.PRESETS["pretrain"] | PRETRAIN)
    demo = typed("demo", **SMALL)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        on_step(patch, lambda step: step == 2 and os.kill(os.getpid(), signal.SIGTERM))
        train.main(demo)
    (tmp_path / "out/pretrain/model").mkdir()  # as a stop in its export leaves it
    train.main([*demo, "--resume"])
    base, grown = capsys.readouterr().out.split("The base is ready")
    assert "resumed at step 3" in base and "| before" not in base  # its end is one line
    assert "| before" in grown and "mixed" in grown and "training draws 16 from them" in grown
    (words,) = re.findall(r"Ordinary fine-tuning: python train.py (.*)", grown)
    train.main(shlex.split(words))
    full = ev.read_run(shlex.split(words)[-1].removeprefix("--out="), finished=True)
    assert full["event"] == [] and all(row["kd"] == 0 for row in full["step"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c or "eval.py" in c])
def test_every_command_runs(command, home, tmp_path, monkeypatch, capsys):
    """A demo tiny, another run and a model of OpenAI's to where the first weights or tokens are loaded."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word in PROGRAMS)
    main, words = PROGRAMS[words[at]], words[at + 1 :]
    if "--help" in words:
        with pytest.raises(SystemExit) as e:
            main(words)
        assert e.value.code == 0
    elif main is train.main and "demo" in words:
        small = SMALL | ({"patience": 2} if "--trigger=plateau" in words else {"grow_every": 1})
        words = [word for word in words if not word.startswith(("--resume", "--out", "--patience"))]
        main(typed(*words, **small, out=tmp_path / "run"))
        assert ev.read_run(tmp_path / "run")["result"]
    elif main is train.main or SIZES.keys() & set(words):
        monkeypatch.setattr(GPT, "from_pretrained", begin)
        monkeypatch.setattr(data, "load", begin)
        with pytest.raises(Begun):
            main(words)
    else:
        main(["out/demo" if word.startswith("out/") else word for word in words])
        assert capsys.readouterr().out


def test_files_named_in_the_readme_exist():
    names = re.findall(r"[`(]((?:tests/)?\w+\.(?:py|md|txt|png))[`)]", TEXT)
    names += [shlex.split(command)[1] for command in COMMANDS if command.startswith("python tests/")]
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_excerpt_of_the_loop_is_the_loop():
    """In its order, with what is left out marked by dots."""
    source = iter(line.strip() for line in (ROOT / "train.py").read_text(encoding="utf-8").splitlines())
    (excerpt,) = re.findall(r"```python\n(for step.*?)```", TEXT, re.S)
    for line in map(str.strip, excerpt.splitlines()):
        assert line == "..." or line in source, line


def test_the_readme_is_short():
    assert len(TEXT.encode()) <= 12_000
