"""Texts, tokens and batches: what the data says against published numbers, and what a batch depends on."""

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BYTES, ROOT, SHARED, joined, needs_tiktoken, refused

import data
import train

TEST_RAW, SHAKESPEARE = SHARED / "data" / "wiki.test.raw", SHARED / "data" / "shakespeare.txt"


def sha256(ids):
    return hashlib.sha256(np.asarray(ids).astype("<u2").tobytes()).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder per test, and no network: whoever asks for a socket fails."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(data, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(socket, "socket", None)
    return tmp_path / "cache"


# ----- tokens -----


@needs_tiktoken
@pytest.mark.skipif(not TEST_RAW.exists(), reason="WikiText-2's test split is not beside the repository")
def test_wikitext_tokens_are_the_published_ones():
    """286,221 tokens of the whole raw file encoded at once: perplexities are comparable only on these."""
    raw = TEST_RAW.read_bytes()
    true = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    assert hashlib.sha256(raw).hexdigest() == true
    ids = data.encode(raw.decode())
    assert ids.dtype == np.uint16 and len(ids) == 286_221
    assert ids[:8].tolist() == [220, 198, 796, 5199, 347, 2852, 353, 796]
    assert sha256(ids) == "7fead09117d65b366de16befafc09887aadaf1bb457f5292ce3bb89f83e929d6"
    assert data.decode(ids) == raw.decode()


@needs_tiktoken
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tiny Shakespeare is not beside the repository")
def test_debug_batch_of_llm_c():
    """The 257 ids on which llm.c checks GPT-2's loss, <|endoftext|> before each piece among them."""
    pieces = SHAKESPEARE.read_text().split("\n\n")
    ids = data.encode("".join(data.EOT + piece + "\n\n" for piece in pieces[:20]))[:257]
    assert sha256(ids) == "f3cb1f678d40cf5a120662b12a20fdacc5bd2e08c13ebb230a93e9f6f82f1df4"


def test_what_no_tokenizer_knows():
    """A sample may stop inside a character: that raises nothing. A vocabulary of another size is refused."""
    assert data.decode("\N{SNOWMAN}".encode()[:2], BYTES) == "\N{REPLACEMENT CHARACTER}"
    refused(lambda: data.encode("a", 50258), "50,258")


# ----- token files -----


def file_of(text, folder):
    path = folder / "file.txt"
    path.write_text(text, "utf-8", newline="")
    return {"train": [(path, 0, data.length(path))]}


def ids_of(text, folder, vocab_size=BYTES):
    path = data.token_files("a text", file_of(text, folder), vocab_size)["train"]
    return np.fromfile(path, "<u2")


def test_a_text_is_tokenised_once(tmp_path, monkeypatch):
    """Into a file named by the tokenizer and by the text itself, so that a changed text gets new tokens."""
    encode, seen = data.encode, []
    monkeypatch.setattr(data, "encode", lambda *args: seen.append(args) or encode(*args))
    for text in ("one", "two", "one", "two"):
        assert ids_of(text, tmp_path).tolist() == list(text.encode())
    assert seen == [("one", BYTES), ("two", BYTES)]


@needs_tiktoken
def test_each_tokenizer_has_its_own_tokens(tmp_path):
    assert ids_of("hello world", tmp_path).tolist() == list(b"hello world")
    assert ids_of("hello world", tmp_path, data.GPT2).tolist() == [31373, 995]


@pytest.mark.parametrize("fails", ["killed", "changed"])
def test_unfinished_tokens_are_not_read(tmp_path, monkeypatch, fails):
    """A process that is killed while it writes leaves half a file; a text that changes, another text's."""

    def act(*args):
        if fails == "killed":
            raise KeyboardInterrupt
        (tmp_path / "file.txt").write_text("changed")
        return np.zeros(4, np.uint16)

    with monkeypatch.context() as m, pytest.raises((KeyboardInterrupt, data.UserError)):
        m.setattr(data, "encode", act)
        ids_of("a text", tmp_path)
    assert ids_of("a text", tmp_path).tolist() == list(b"a text")


ALPHABET = [*"ab \n\t\r.'1é\N{SNOWMAN}\x1c\x85\u2028\u3000\u4e00", "  ", "\n\n", "n't", "'ll", data.EOT]


@needs_tiktoken
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 20])
def test_ids_of_pieces_are_those_of_the_whole(tmp_path, size):
    """Whatever the text and wherever it is cut: white space of every kind, contractions, end of text."""
    rng = random.Random(size)
    for _ in range(40):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(200)))
        text = text.replace("\r", "\n")  # these become line ends
        cut = list(data.pieces(file_of(text, tmp_path)["train"], size))
        assert "".join(cut) == text and (size > 9 or len(cut) > len(text) / 99)
        for vocab_size in (BYTES, data.GPT2):
            ids = np.concatenate([data.encode(piece, vocab_size) for piece in cut])
            assert np.array_equal(ids, data.encode(text, vocab_size))


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """The first start takes a few megabytes at a time, the second next to nothing: it decodes no byte."""
    (tmp_path / "long.txt").write_text("a line of forty characters, more or less\n" * 500_000)  # 20 MB
    for most in (12e6, 3e6):
        tracemalloc.start()
        tokens = data.load(str(tmp_path / "long.txt"), BYTES, 8)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most and sum(map(len, tokens.values())) == 20_500_000
        monkeypatch.setattr(data, "plain_text", None)


# ----- texts -----


def test_own_text_is_split_at_lines(tmp_path):
    """90% train, 5% val, 5% test, each cut at the first line end after its share."""
    text = "".join(f"line {i} {'.' * (i % 7)}\n" for i in range(2000))
    (tmp_path / "mine.txt").write_bytes(text.encode())
    splits = joined(data.split([(tmp_path / "mine.txt", len(text))]))
    assert list(splits) == ["train", "val", "test"]
    assert "".join(splits.values()) == text
    assert all(part.endswith("\n") for part in splits.values())
    line = 20
    assert 0.90 * len(text) <= len(splits["train"]) <= 0.90 * len(text) + line
    assert 0.95 * len(text) <= len(splits["train"] + splits["val"]) <= 0.95 * len(text) + line


def test_shortest_text_is_accepted(tmp_path):
    """2 T + 1 training tokens are two windows, enough for a batch at every step; one less is refused."""
    path = tmp_path / "short.txt"
    path.write_text("ab\n" * 60)  # 90% are 162 bytes, the next line ends at 165 = 2 * 82 + 1
    tokens = data.load(str(path), BYTES, 82)
    assert [len(tokens[split]) for split in ("train", "val", "test")] == [165, 9, 6]
    assert data.batch(tokens["train"], 82, 5, 3, 0)[0].shape == (5, 82)
    refused(lambda: data.load(str(path), BYTES, 83), "short.txt", " train ", "165 ", " 167 ")


def test_name_of_no_text(tmp_path, monkeypatch):
    """Neither built in nor here, or a folder of other files: refused before anything is downloaded."""
    monkeypatch.chdir(tmp_path)
    for read in (data.check_name, lambda name: data.load(name, BYTES, 8)):
        with pytest.raises(data.UserError, match="wikitext3.*wikitext2, webtext, docs, code"):
            read("wikitext3")
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "a.rst").write_text("text\n" * 99)
    refused(lambda: data.check_name("manual"), f"{tmp_path}/manual ", ".txt, .md, .py")


def test_built_in_name_that_is_here_too(tmp_path, monkeypatch, capsys):
    """A folder called docs does not change what docs means: one sentence says so; ./docs is the folder."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("mine\n" * 400)
    monkeypatch.chdir(tmp_path)
    data.check_name("./docs")
    assert "./docs" not in capsys.readouterr().err
    data.check_name("docs")
    assert "./docs" in capsys.readouterr().err
    assert data.decode(data.load("docs", BYTES, 8)["test"], BYTES) == joined(data.docs())["test"]
    assert set(data.decode(data.load("./docs", BYTES, 8)["test"], BYTES)) == set("mine\n")


def test_embedded_texts_are_the_whole_text_in_any_order():
    """They need no network, lose or double no line, and are split 90/5/5. Pieces of 2,000 characters and the
    rest of a line lie in an order that owes nothing to the alphabet: any part is like the whole."""
    folder = Path(os.__file__).parent  # the standard library
    modules = [path.read_text("utf-8", "replace") for path in folder.iterdir() if path.suffix == ".py"]
    interface = Path(torch.__file__).parent / "include/torch/csrc/api/include"
    headers = [path.read_text("utf-8", "replace") for path in interface.rglob("*.h")]
    read = {data.docs: topics.values(), data.code: modules, data.headers: headers}
    for source, texts in read.items():
        splits = joined(source())
        sizes = np.array([len(text) for text in splits.values()])
        assert np.abs(sizes / sizes.sum() - [0.90, 0.05, 0.05]).max() < 0.01
        pieces = "".join(splits.values()).split(data.EOT)
        lines = Counter(line for piece in pieces for line in piece.split("\n") if line)
        assert lines == Counter(line for text in texts for line in text.split("\n") if line)
        assert max(map(len, pieces)) <= 2000 + max(map(len, lines)) + 1
        # Only the end of a file, or a short file, is a shorter piece.
        assert sum(len(piece) >= 2000 for piece in pieces) > len(pieces) / 2
        # In a random order every second piece stands before its successor in the alphabet, with an error of
        # sqrt(n / 12) in the number of those that do.
        n = len(pieces)
        ascents = sum(a < b for a, b in zip(pieces, pieces[1:]))
        assert abs(ascents - n / 2) < 5 * (n / 12) ** 0.5


def test_embedded_texts_are_the_same_in_every_process():
    """A resumed run, and every rank, must see the same text: no order of sets, hashes or folders."""
    digest = "[data.text_sha256(source()) for source in (data.docs, data.code, data.headers)]"
    command = [sys.executable, "-c", f"import data; print({digest})"]
    env = os.environ | {"PYTHONHASHSEED": "1"}
    other = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert other.stdout.strip() == str(eval(digest)), other.stderr


def test_wikitext_is_read_unchanged(cache, monkeypatch):
    """Three members of the zip, with their line ends; nothing is extracted."""
    path = cache / "wikitext-2-raw-v1.zip"
    with zipfile.ZipFile(path, "w") as z:
        for split in ("train", "valid", "test"):
            z.writestr(f"wikitext-2-raw/wiki.{split}.raw", f" \r\n = {split} = \n")
    raw = path.read_bytes()
    monkeypatch.setattr(data, "WIKITEXT_ZIP", (len(raw), hashlib.sha256(raw).hexdigest()))
    splits = {"train": "train", "val": "valid", "test": "test"}
    assert joined(data.wikitext2()) == {split: f" \r\n = {name} = \n" for split, name in splits.items()}
    assert list(cache.iterdir()) == [path]


def test_webtext_trains_on_valid_and_measures_on_test(cache, monkeypatch):
    """One JSON object a line, documents joined by <|endoftext|>; line separators inside a text stay."""
    for split, texts in {"valid": ["a\u2028b", "c"], "test": ["d", "e"]}.items():
        lines = "".join(json.dumps({"id": 1, "text": t}, ensure_ascii=False) + "\n" for t in texts)
        (cache / f"webtext.{split}.jsonl").write_text(lines, encoding="utf-8")
        monkeypatch.setitem(data.WEBTEXT_BYTES, split, len(lines.encode()))
    valid, test = f"a\u2028b{data.EOT}c", f"d{data.EOT}e"
    assert joined(data.webtext()) == {"train": valid, "val": test, "test": test}


# ----- what a run writes -----


def test_log_is_strict_json(tmp_path):
    """JSON has no NaN and no Infinity, and many programs refuse them: they never get into a log."""
    path, rows = tmp_path / "metrics.jsonl", [{"kind": "step", "loss": 1.5, "norm": None}]
    path.write_text("what was here")
    data.write_jsonl(path, rows, "w")
    data.write_jsonl(path, [{"kind": "eval"}], "a")
    for bad in (float("nan"), float("inf"), -float("inf")):
        for mode in "aw":
            with pytest.raises(ValueError, match="JSON"):
                data.write_jsonl(path, [*rows, {"loss": {"base": bad}}], mode)
        (tmp_path / "bad.jsonl").write_text(json.dumps({"loss": bad}))
        refused(lambda: data.read_jsonl(tmp_path / "bad.jsonl"), "bad.jsonl, line 1")
    assert data.read_jsonl(path) == [*rows, {"kind": "eval"}]


def test_a_file_gets_its_name_once_it_is_on_the_disk(tmp_path, monkeypatch):
    """All of it, or the file of before, when the power goes."""
    path, fsync, seen = tmp_path / "file", os.fsync, []
    path.write_bytes(b"before")

    def note(number):
        seen.append((os.fstat(number).st_size, path.read_bytes()))
        fsync(number)

    monkeypatch.setattr(os, "fsync", note)
    with data.replacing(path) as f:
        f.write(b"x" * 100)
    assert seen == [(100, b"before")] and path.read_bytes() == b"x" * 100


def no_locks(*args):
    raise OSError(37, "No locks available")


@pytest.mark.parametrize("fcntl", [None, SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=no_locks)])
def test_system_without_locks_says_so(tmp_path, monkeypatch, capsys, fcntl):
    """On Windows, and on disks that have no locks, a run goes on with one sentence, a download with none."""
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)  # None: there is no such module
    data.lock(tmp_path / "lock", wait=False).close()
    assert str(tmp_path) in capsys.readouterr().err
    data.lock(tmp_path / "file.lock").close()
    assert capsys.readouterr().err == ""


# ----- batches -----

TOKENS = np.arange(1000, dtype=np.uint16)  # so that an id says where it stood
T = 8
WINDOWS = 124  # (1000 - 1) // 8


def starts(rows, steps, seed=0):
    return [data.batch(TOKENS, T, rows, step, seed)[0][:, 0].tolist() for step in steps]


def test_batch_shapes_and_targets():
    """Inputs are consecutive tokens from a multiple of T, and targets are the next ones."""
    x, y = data.batch(TOKENS, T, 6, 3, 0)
    assert x.shape == y.shape == (6, T) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1) and (x[:, 0] % T == 0).all()
    assert torch.equal(x, x[:, :1] + torch.arange(T))
    # Half of GPT-2's vocabulary lies above what 16 bits with a sign can hold.
    x, y = data.batch(np.full(20, 50256, np.uint16), T, 2, 0, 0)
    assert (x == 50256).all() and (y == 50256).all()


def test_every_window_once_an_epoch():
    """Three epochs in batches that do not divide them: each takes every window once, in its own order, and
    each seed has its own orders."""
    drawn = sum(starts(6, range(3 * WINDOWS // 6)), [])
    epochs = [drawn[i : i + WINDOWS] for i in range(0, 3 * WINDOWS, WINDOWS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(0, WINDOWS * T, T))] * 3
    orders = {tuple(sum(starts(WINDOWS, [epoch], seed), [])) for seed in range(20) for epoch in range(3)}
    assert len(orders) == 60 and orders >= set(map(tuple, epochs))


def test_batches_are_a_function_of_seed_and_step():
    """No state: any order of asking, after any other seed, and however rows are cut, gives the same rows."""
    forward = starts(6, range(40))
    data._order.cache_clear()
    np.random.seed(1)
    starts(6, range(40), seed=1)
    assert starts(6, reversed(range(40))) == forward[::-1]
    assert sum(starts(3, range(80)), []) == sum(forward, [])  # the step only counts rows


def test_last_window_needs_its_last_target():
    """A window is drawn only if its last target exists: T + 1 tokens are one, T tokens are none."""
    assert data.batch(TOKENS[: T + 1], T, 3, 0, 0)[1][:, -1].tolist() == [T] * 3
    drawn = torch.cat([data.batch(TOKENS[: 2 * T], T, 3, step, 0)[0] for step in range(4)])
    assert set(drawn[:, 0].tolist()) == {0}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_the_batch_of_one(world):
    """The rows of N ranks concatenated are the one-rank batch, in every micro-step, old text included."""
    old = dict(replay=0.25, kd_weight=1.0, kd_on="retain", kd_rows=4)
    o = train.Options(batch_size=8, grad_accum=2, block_size=T, seed=3, **old)
    texts = {"learn": {"train": TOKENS}, "retain": {"train": TOKENS + 2000}}

    def batches(step, rank, world):
        return train.micro_batches(o, texts, None, step, torch.device("cpu"), rank, world)

    for step in (0, 7):
        one = batches(step, 0, 1)
        ranks = [batches(step, rank, world) for rank in range(world)]
        assert len(one) == 2 and all(len(rank) == 2 for rank in ranks)
        for i, (x, y) in enumerate(one):
            B = 8 // world
            assert torch.equal(torch.cat([rank[i][1] for rank in ranks]), y)
            assert torch.equal(torch.cat([rank[i][0][:B] for rank in ranks]), x[:8])
            assert torch.equal(torch.cat([rank[i][0][B:] for rank in ranks]), x[8:])  # rows to distil on
            assert torch.equal(x[:8] + 1, y) and len(x) == 8 + 4
        learned = torch.cat([y for _, y in one])
        assert (learned > 2000).any(1).sum() == 4  # a quarter of 16 rows
        assert all((x[8:] >= 2000).all() for x, _ in one)
