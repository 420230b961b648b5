"""What all tests share: the repository on the path, a cache folder of their own, and what lies beside it."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

# One thread for each of the processes that share the tests, and for their children. OpenMP reads these when
# torch is imported; eval.py says why threads must not spin.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch._dynamo

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("GROWING_GPT_SHARED", ROOT.parent / "shared"))  # true data, if it is there
FIXTURES = ROOT / "tests" / "fixtures"

sys.path.insert(0, str(ROOT))
os.environ["GROWING_GPT_CACHE"] = tempfile.mkdtemp(prefix="growing-gpt-test-")  # before `data` is imported
if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED / "data/tiktoken").exists():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "data/tiktoken")

import data
from model import GPT, GPTConfig

_bpe = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "/nowhere")) / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
needs_tiktoken = pytest.mark.skipif(not _bpe.exists(), reason="no tokenizer of GPT-2 in TIKTOKEN_CACHE_DIR")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def write_words(folder):
    """A text file in which there is something to learn."""
    words = random.Random(0).choices(["grow", "learn", "keep", "block", "layer", "token"], k=6000)
    path = Path(folder) / "words.txt"
    path.write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9)))
    return str(path)


def old_text(text):
    """Another text, beside `text`, for --retain: what is learned and what is kept are never the same."""
    path = Path(text).with_name("old.txt")
    if not path.exists():
        path.write_text("\n".join(f"the {i} of {i * i} was kept" for i in range(1200)))
    return str(path)


def whole(path):
    """What is read of a file or folder."""
    files = [(file, 0, data.length(file)) for file in data.find_files(path)]
    return "".join(data.pieces([part for part in files if part[2]]))


def joined(parts):
    """{split: text} of what a source returns."""
    return {name: "".join(data.pieces(part)) for name, part in parts.items()}


@pytest.fixture
def text(tmp_path):
    return write_words(tmp_path)


@pytest.fixture
def own_dynamo():
    """Each test starts without compiled graphs and leaves torch's settings as they were."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, optimize_ddp=True):
        yield
    torch._dynamo.reset()


# ----- Tiny options and networks, a run's rows, the programs in a process of their own -----

BYTES = 257  # ids of the bytes tokenizer
multiprocessing.set_forkserver_preload(["torch", "torch._dynamo"])  # see in_fork
# A run of about a second on a tiny network: two growths in seven steps.
TINY = dict(block_size=16, batch_size=4, lr=1e-2, max_steps=7, grow_every=3, max_growths=2)
TINY |= dict(eval_every=2, log_every=1, eval_windows=4, test_windows=4, device="cpu", dtype="float32")
SCRATCH = dict(init="scratch", tokenizer="bytes", n_layer=2, n_head=2, n_embd=16)
PLAIN = dict(max_growths=0, grow_every=None)  # an ordinary training run


def typed(*words, **options):
    """A command line; an option that is None is not typed."""
    return [*map(str, words), *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def arguments(text, out, *words, **changes):
    """A command line for a run of a second or less; an option that is changed to None is not typed."""
    texts = dict(dataset=text, retain=old_text(text))
    return typed(*words, **{**SCRATCH, **TINY, **texts, **changes, "out": out})


def refused(act, *says):
    """A UserError of one line has all these words."""
    with pytest.raises(data.UserError) as e:
        act()
    sentence = str(e.value)
    assert all(word in sentence for word in says) and "\n" not in sentence, sentence


def rows(out, kind=None):
    """The rows of a run's log, or those of one kind. NaN and Infinity are no JSON."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=int) for line in lines]  # int("NaN") raises ValueError
    return [row for row in parsed if kind in (None, row["kind"])]


def steps_of(out, kind):
    return [row["step"] for row in rows(out, kind)]


def tiny_gpt(generation=(0, 0), vocab_size=61, block_size=16, n_head=2, n_embd=8, seed=0, **more):
    """A random network whose biases and gains are random, too, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, block_size, n_head, n_embd, generation, **more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def program(name, *argv, cwd=None, env=None, **more):
    """Start train.py or eval.py as a user would; returns the Popen."""
    env = {**os.environ, **(env or {})}
    command = [sys.executable, str(ROOT / name), *map(str, argv)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=cwd or ROOT, env=env, **{**streams, **more})


def table(text, head):
    """The first Markdown table of a text with a column of this head: a dict {head: cell} for each row."""
    found, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            heads, _, *cells = lines
            found.append([dict(zip(heads, row, strict=True)) for row in cells])
            lines = []
    return next(rows for rows in found if rows and head in rows[0])


def on_step(monkeypatch, act):
    """Call act(step) whenever a run draws the batch of a step."""
    batch = data.batch

    def batch_and_act(tokens, block_size, rows, step, seed):
        act(step)
        return batch(tokens, block_size, rows, step, seed)

    monkeypatch.setattr(data, "batch", batch_and_act)


def in_fork(target, *args):
    """Start target(*args) in a process that has torch already, for importing it takes seconds: a fork of a
    server. (Autograd refuses to run in a fork of a process where it ran.)"""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    return process
