"""Texts, tokens and batches: what the data says against published numbers, and what a batch depends on."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, needs_tiktoken

import data
import train

TEST_RAW, SHAKESPEARE = SHARED / "data" / "wiki.test.raw", SHARED / "data" / "shakespeare.txt"


def sha256(ids):
    return hashlib.sha256(np.asarray(ids).astype("<u2").tobytes()).hexdigest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder per test, and no network: whoever asks for a socket fails."""
    monkeypatch.setattr(data, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(socket, "socket", None)
    (tmp_path / "cache").mkdir()


# ----- tokens -----


@needs_tiktoken
@pytest.mark.skipif(not TEST_RAW.exists(), reason="WikiText-2's test split is not beside the repository")
def test_wikitext_tokens_are_the_published_ones():
    """286,221 tokens of the whole raw file encoded at once: perplexities are comparable only on these."""
    raw = TEST_RAW.read_bytes()
    assert hashlib.sha256(raw).hexdigest() == data.WIKITEXT_FILES["test"][1]
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
    ids = data.encode("".join(data.EOT + piece + "\n\n" for piece in pieces[:50]))[:257]
    assert sha256(ids) == "f3cb1f678d40cf5a120662b12a20fdacc5bd2e08c13ebb230a93e9f6f82f1df4"


@needs_tiktoken
def test_gpt2_end_of_text_is_one_token():
    """<|endoftext|> in a text is id 50256, and comes back as it was."""
    text = f"{data.EOT}hello world{data.EOT}{data.EOT}naïve\n"
    ids = data.encode(text).tolist()
    assert ids[:3] == [50256, 31373, 995] and ids.count(50256) == 3
    assert data.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["", "a", "naïve \N{SNOWMAN} \0\r\n", f"{data.EOT}a{data.EOT}", data.EOT * 3, "<|end"]
)
def test_bytes_come_back(text):
    """Byte ids are the UTF-8 bytes with 256 for <|endoftext|>, and decode to the very text."""
    ids = data.encode(text, data.BYTES)
    assert ids.dtype == np.uint16 and (ids == 256).sum() == text.count(data.EOT)
    assert bytes(ids[ids < 256].tolist()) == text.replace(data.EOT, "").encode()
    assert data.decode(ids, data.BYTES) == text


def test_broken_bytes_decode_to_a_replacement():
    """A sample may stop inside a character: that is shown as U+FFFD and raises nothing."""
    assert data.decode("\N{SNOWMAN}".encode()[:2], data.BYTES) == "\N{REPLACEMENT CHARACTER}"


def test_unknown_vocabulary_is_refused():
    """A model with another vocabulary has a tokenizer that we do not know: say its size."""
    with pytest.raises(data.UserError, match="50,258"):
        data.encode("a", 50258)


# ----- token files -----


def ids_of(text):
    return data.tokens_of(text, data.BYTES)


def test_token_file_is_made_once_and_holds_what_it_says(tmp_path, monkeypatch):
    """A sha256 of its name and ids, then uint16, little-endian; the second time nothing is tokenised."""
    ids = ids_of("hello")
    (path,) = (tmp_path / "cache" / "tokens").glob("*.bin")
    raw = path.read_bytes()
    assert raw[32:] == b"h\0e\0l\0l\0o\0" and len(raw) == 42
    assert path.name == f"bytes-{hashlib.sha256(b'hello').hexdigest()}.bin"
    assert raw[:32] == hashlib.sha256(path.name.encode() + raw[32:]).digest()
    monkeypatch.setattr(data, "encode", None)
    assert ids_of("hello").tolist() == ids.tolist() == list(b"hello")
    assert ids_of("hello").dtype == np.uint16


def test_changed_text_gets_new_tokens():
    """A user's file that changed under the same name must not be trained on as it was."""
    assert ids_of("one").tolist() == list(b"one")
    assert ids_of("two").tolist() == list(b"two")
    assert ids_of("one").tolist() == list(b"one")


def damage_bit(raw):
    return raw[:600] + bytes([raw[600] ^ 1]) + raw[601:]


def file_named(name):
    """A whole token file with the ids of the text below, that was made under another name."""
    ids = b"x\0" * 1000
    return hashlib.sha256(name.encode() + ids).digest() + ids


SOURCE = hashlib.sha256(b"x" * 1000).hexdigest()
BAD_FILES = {
    "flipped bit": damage_bit,
    "cut": lambda raw: raw[:-2],
    "longer": lambda raw: raw + b"ab",
    "empty": lambda raw: b"",
    "no header": lambda raw: b" " * 32 + raw[32:],
    "another version": lambda raw: b'{"version": 1}'.ljust(512) + raw[32:],
    "another text": lambda raw: file_named(f"bytes-{'0' * 64}.bin"),
    "another tokenizer": lambda raw: file_named(f"gpt2-{SOURCE}.bin"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_token_file_is_refused_and_made_again(tmp_path, monkeypatch, name, capsys):
    """A stale, foreign or damaged token file is never read as tokens: it is named and rebuilt."""
    text = "x" * 1000
    ids_of(text)
    (path,) = (tmp_path / "cache" / "tokens").glob("*.bin")
    good = path.read_bytes()
    assert good == file_named(f"bytes-{SOURCE}.bin")
    path.write_bytes(BAD_FILES[name](good))
    encode, seen = data.encode, []
    monkeypatch.setattr(data, "encode", lambda *args: seen.append(args) or encode(*args))
    assert ids_of(text).tolist() == [120] * 1000
    assert len(seen) == 1 and path.name in capsys.readouterr().err
    assert path.read_bytes() == good


# ----- texts -----


def test_own_text_is_split_at_lines(tmp_path):
    """90% train, 5% val, 5% test, nothing lost or doubled, each cut at the first line end after its share."""
    text = "".join(f"line {i} {'.' * (i % 7)}\n" for i in range(2000))
    (tmp_path / "mine.txt").write_text(text)
    splits = data.own_text(tmp_path / "mine.txt")
    assert list(splits) == ["train", "val", "test"]
    assert "".join(splits.values()) == text
    assert all(part.endswith("\n") for part in splits.values())
    line = 20
    assert 0.90 * len(text) <= len(splits["train"]) <= 0.90 * len(text) + line
    assert 0.95 * len(text) <= len(splits["train"] + splits["val"]) <= 0.95 * len(text) + line


def test_own_folder_is_read_in_the_order_of_its_paths(tmp_path):
    """Every .txt, .md and .py file below the folder, sorted, with <|endoftext|> between; nothing else."""
    for name in ("b.txt", "a/z.md", "a/b/c.py", "c.bin", "a.txt.gz", "B.txt"):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    whole = "".join(data.own_text(tmp_path / "mine").values())
    assert whole == data.EOT.join(["B.txt\n", "a/b/c.py\n", "a/z.md\n", "b.txt\n"])


def test_folder_named_like_a_text_is_no_text(tmp_path):
    """A folder called notes.md, as some tools make, is searched and not read."""
    (tmp_path / "notes.md").mkdir()
    (tmp_path / "notes.md" / "a.txt").write_text("a\n")
    assert "".join(data.own_text(tmp_path).values()) == "a\n"


def test_invalid_utf8_is_refused(tmp_path):
    """Bytes that are no UTF-8 are named with file and offset."""
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9\n" * 3)
    with pytest.raises(data.UserError, match=r"latin1\.txt is not UTF-8 at byte 3"):
        data.own_text(path)


def test_carriage_returns_and_byte_order_marks_stay(tmp_path):
    """Loss is per token of the text as it is: nothing is translated on the way."""
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert "".join(data.own_text(path).values()) == "\ufeffone\r\ntwo\r\n"


@pytest.mark.parametrize("text", ["", "\n", "x" * 300 + "\ny", "a\n" * 10])
def test_too_short_text_is_refused_with_the_numbers(tmp_path, text):
    """An empty or too short text is refused before training, with its size and what is needed."""
    path = tmp_path / "short.txt"
    path.write_text(text)
    with pytest.raises(
        data.UserError, match=r"short\.txt is too short: its \w+ split has [\d,]+ tokens"
    ) as e:
        data.load(str(path), data.BYTES, 128)
    numbers = [int(word.replace(",", "")) for word in str(e.value).split() if word.replace(",", "").isdigit()]
    train_size = len(data.own_text(path)["train"])
    assert numbers == ([train_size, 257] if train_size < 257 else [0, 2])


def test_shortest_text_is_accepted(tmp_path):
    """2 T + 1 training tokens are two windows, enough for a batch at every step; one less is refused."""
    path = tmp_path / "short.txt"
    path.write_text("ab\n" * 60)  # 90% are 162 bytes, the next line ends at 165 = 2 * 82 + 1
    tokens = data.load(str(path), data.BYTES, 82)
    assert [len(tokens[split]) for split in ("train", "val", "test")] == [165, 9, 6]
    assert data.batch(tokens["train"], 82, 5, 3, 0)[0].shape == (5, 82)
    with pytest.raises(data.UserError, match="train split has 165 tokens and needs 167"):
        data.load(str(path), data.BYTES, 83)


def test_unknown_name_is_refused():
    """A data set that is neither built in nor a file is refused with the names there are."""
    with pytest.raises(data.UsageError, match="'wikitext3'.*wikitext2, webtext, docs, code") as e:
        data.load("wikitext3", data.BYTES, 8)
    assert e.value.status == 2


def test_built_in_name_that_is_here_too(tmp_path, monkeypatch, capsys):
    """A folder called docs does not change what docs means: one sentence says so; ./docs is the folder."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("mine\n" * 400)
    monkeypatch.chdir(tmp_path)
    data.check_name("docs")
    data.check_name("./docs")
    data.check_name("code")
    assert capsys.readouterr().err == "docs is the built-in text: to take what is here, write ./docs\n"
    topic = data.load("docs", data.BYTES, 8)["test"]
    assert data.decode(topic, data.BYTES) == data.docs()["test"]
    assert set(data.decode(data.load("./docs", data.BYTES, 8)["test"], data.BYTES)) == set("mine\n")


def test_text_of_one_line_is_refused_with_the_reason(tmp_path):
    """All of it would be train: say how a text is split. A short text of several lines has another fault."""
    path = tmp_path / "one.txt"
    for text in ("no end " * 999, "one end " * 999 + "\n"):
        path.write_text(text)
        with pytest.raises(data.UserError, match="split at line ends, 90/5/5, and this one has one line"):
            data.load(str(path), data.BYTES, 8)
    path.write_text("two\nlines\n")
    with pytest.raises(data.UserError, match="split at line ends, 90/5/5$"):
        data.load(str(path), data.BYTES, 8)


def test_folder_without_a_text_is_refused_before_anything(tmp_path, monkeypatch):
    """Empty, or full of another kind of file: say which kinds are read, and where we looked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manual").mkdir()
    for count in range(3):
        with pytest.raises(data.UsageError, match=rf"{tmp_path}/manual has {count} files.*\.txt, \.md, \.py"):
            data.check_name("manual")
        (tmp_path / "manual" / f"{count}.rst").write_text("text\n" * 99)
    with pytest.raises(data.UsageError, match=f"no file {tmp_path}/nowhere.txt"):
        data.check_name("nowhere.txt")


def test_docs_and_code_are_the_whole_text_of_this_python():
    """The embedded texts need no network, lose or double no line, and are split 90/5/5."""
    folder = Path(os.__file__).parent  # the standard library
    modules = [path.read_text("utf-8", "replace") for path in folder.iterdir() if path.suffix == ".py"]
    interface = Path(torch.__file__).parent / "include/torch/csrc/api/include"
    headers = [(Path(at) / name).read_text("utf-8", "replace")
               for at, _, names in os.walk(interface) for name in names if name.endswith(".h")]  # fmt: skip
    both = ((data.docs(), topics.values()), (data.code(), modules))
    for splits, texts in (*both, (data.headers(), headers)):
        pieces = "".join(splits.values()).split(data.EOT)
        lines = Counter(line for piece in pieces for line in piece.split("\n") if line)
        assert lines == Counter(line for text in texts for line in text.split("\n") if line)
        sizes = np.array([len(text) for text in splits.values()])
        assert np.abs(sizes / sizes.sum() - [0.90, 0.05, 0.05]).max() < 0.01


def test_any_part_of_docs_and_code_is_like_the_whole():
    """Pieces of 2,000 characters and the rest of a line, in an order that owes nothing to the alphabet."""
    for splits in (data.docs(), data.code(), data.headers()):
        pieces = "".join(splits.values()).split(data.EOT)
        line = max(len(line) for piece in pieces for line in piece.split("\n"))
        assert max(map(len, pieces)) <= 2000 + line + 1
        # Only the end of a file, or a short file, is a shorter piece.
        assert sum(len(piece) >= 2000 for piece in pieces) > len(pieces) / 2
        # In a random order every second piece stands before its successor in the alphabet, with an error of
        # sqrt(n / 12) in the number of those that do.
        n = len(pieces)
        ascents = sum(a < b for a, b in zip(pieces, pieces[1:]))
        assert abs(ascents - n / 2) < 5 * (n / 12) ** 0.5


def test_docs_and_code_are_the_same_in_every_process():
    """A resumed run, and every rank, must see the same text: no order of sets, hashes or folders."""
    line = "import data, hashlib; "
    line += "print(hashlib.sha256(repr((data.docs(), data.code())).encode()).hexdigest())"
    env = dict(os.environ, PYTHONHASHSEED="1")
    other = subprocess.run([sys.executable, "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)
    here = hashlib.sha256(repr((data.docs(), data.code())).encode()).hexdigest()
    assert other.stdout.strip() == here, other.stderr


def test_a_torch_without_headers_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(data.UserError, match=f"no headers in {tmp_path}.* another --dataset"):
        data.headers()


def put_wikitext(tmp_path, monkeypatch, members, right=None):
    """A small zip under WikiText's name in the cache, believed to be the right one."""
    path = tmp_path / "cache" / "wikitext-2-raw-v1.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in members.items():
            z.writestr(name, text)
    raw = path.read_bytes()
    monkeypatch.setattr(data, "WIKITEXT_ZIP", (len(raw), hashlib.sha256(raw).hexdigest()))
    hashes = {
        k: (m, hashlib.sha256(members[f"wikitext-2-raw/wiki.{m}.raw"].encode()).hexdigest())
        for k, (m, _) in data.WIKITEXT_FILES.items()
    }
    monkeypatch.setattr(data, "WIKITEXT_FILES", hashes | (right or {}))


WIKI = {f"wikitext-2-raw/wiki.{split}.raw": f" \n = {split} = \n" for split in ("train", "valid", "test")}
DECOYS = {
    "wiki.train.raw": "no",
    "../wikitext-2-raw/wiki.train.raw": "no",
    "wikitext-2/wiki.train.tokens": "no",
}


def test_wikitext_members_are_read_by_exact_name(tmp_path, monkeypatch):
    """The three raw files, unchanged, whatever else the zip holds; nothing is extracted."""
    put_wikitext(tmp_path, monkeypatch, DECOYS | WIKI)
    assert data.wikitext2() == {
        "train": " \n = train = \n",
        "val": " \n = valid = \n",
        "test": " \n = test = \n",
    }
    assert [p.name for p in (tmp_path / "cache").rglob("*")] == ["wikitext-2-raw-v1.zip"]


def test_wikitext_member_with_another_hash_is_refused(tmp_path, monkeypatch):
    """Another WikiText gives other perplexities: each member is checked on its own."""
    other = {"test": ("test", "0" * 64)}
    put_wikitext(tmp_path, monkeypatch, WIKI, other)
    with pytest.raises(data.UserError, match=r"wiki\.test\.raw in .*zip has the wrong sha256"):
        data.wikitext2()


def test_webtext_trains_on_valid_and_measures_on_test(tmp_path, monkeypatch):
    """One JSON object a line, documents joined by <|endoftext|>; line separators inside a text stay."""
    lines = {"valid": ["a\u2028b", "c"], "test": ["d", "e"]}
    for split, texts in lines.items():
        rows = "".join(json.dumps({"id": 1, "text": t}, ensure_ascii=False) + "\n" for t in texts)
        (tmp_path / "cache" / f"webtext.{split}.jsonl").write_text(rows, encoding="utf-8")
        monkeypatch.setitem(data.WEBTEXT_BYTES, split, len(rows.encode()))
    valid, test = f"a\u2028b{data.EOT}c", f"d{data.EOT}e"
    assert data.webtext() == {"train": valid, "val": test, "test": test}
    path = tmp_path / "cache" / "webtext.test.jsonl"
    path.write_bytes(path.read_bytes()[:-2] + b"?\n")
    with pytest.raises(data.UserError, match=r"webtext\.test\.jsonl, line 2: not JSON"):
        data.webtext()


def test_webtext_is_tokenised_twice_not_three_times(tmp_path, monkeypatch):
    """val and test are one text, of 3 million tokens."""
    for split in data.WEBTEXT_BYTES:
        rows = json.dumps({"text": split * 99}) + "\n"
        (tmp_path / "cache" / f"webtext.{split}.jsonl").write_text(rows)
        monkeypatch.setitem(data.WEBTEXT_BYTES, split, len(rows))
    encode, seen = data.encode, []
    monkeypatch.setattr(data, "encode", lambda text, *args: seen.append(text) or encode(text, *args))
    tokens = data.load("webtext", data.BYTES, 8)
    assert seen == ["valid" * 99, "test" * 99]
    assert tokens["val"].tolist() == tokens["test"].tolist() == list(b"test" * 99)


def test_lambada_rows(tmp_path, monkeypatch):
    """The passages as they are, each for itself."""
    raw = b'{"text": "one two"}\n{"text": "three \\u00e9"}\n'
    (tmp_path / "cache" / "lambada_test.jsonl").write_bytes(raw)
    monkeypatch.setattr(data, "LAMBADA", (len(raw), hashlib.sha256(raw).hexdigest()))
    assert data.lambada() == ["one two", "three é"]


# ----- what a run writes -----


def test_checkpoint_of_another_format_is_not_called_damaged(tmp_path):
    """An older version's ckpt.pt is whole: say which format is read and what can be done with the run."""
    for value, found in (({"version": 2}, "2"), ({"model": {}}, "None"), ([1], "None")):
        torch.save(value, tmp_path / "ckpt.pt")
        with pytest.raises(data.UserError, match=f"ckpt.pt has format {found}, and only") as e:
            data.load_checkpoint(tmp_path / "ckpt.pt")
        assert f"--init={tmp_path / 'model'}" in str(e.value) and "damaged" not in str(e.value)
    with pytest.raises(FileNotFoundError):
        data.load_checkpoint(tmp_path / "no.pt")


def test_log_is_strict_json(tmp_path):
    """JSON has no NaN and no Infinity, and many programs refuse them: they never get into a log."""
    path, rows = tmp_path / "metrics.jsonl", [{"kind": "step", "loss": 1.5, "norm": None}]
    path.write_text("what was here")
    data.write_jsonl(path, rows, "w")
    data.write_jsonl(path, [{"kind": "eval"}], "a")
    assert data.read_jsonl(path) == [*rows, {"kind": "eval"}]
    before = path.read_bytes()
    for bad in (float("nan"), float("inf"), -float("inf")):
        for mode in "aw":
            with pytest.raises(ValueError, match="JSON"):
                data.write_jsonl(path, [*rows, {"loss": {"base": bad}}], mode)
            assert path.read_bytes() == before
        (tmp_path / "bad.jsonl").write_text(json.dumps({"loss": bad}))
        with pytest.raises(data.UserError, match=r"bad.jsonl, line 1: not JSON"):
            data.read_jsonl(tmp_path / "bad.jsonl")


def test_a_file_gets_its_name_once_it_is_on_the_disk(tmp_path, monkeypatch):
    """All of it, or the file of before: whatever happens, and when the power goes."""
    path, seen = tmp_path / "file", []
    path.write_bytes(b"before")
    fsync, replace = os.fsync, os.replace

    def note_fsync(number):
        seen.append(("on the disk", os.fstat(number).st_size, path.read_bytes()))
        fsync(number)

    def note_replace(source, target):
        seen.append(("named", os.stat(source).st_size, path.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with data.replacing(path) as f:
        f.write(b"x" * 100)
    assert seen == [("on the disk", 100, b"before"), ("named", 100, b"before")]
    assert path.read_bytes() == b"x" * 100
    with pytest.raises(KeyError), data.replacing(path) as f:
        f.write(b"y")
        raise KeyError
    assert path.read_bytes() == b"x" * 100


HOLD = "import sys, time, data; lock = data.lock_run(sys.argv[1]); print('held', flush=True); time.sleep(60)"


@pytest.mark.skipif(data.fcntl is None, reason="no file locks on this system")
def test_second_process_in_a_run_is_refused_until_the_first_is_gone(tmp_path):
    """Two processes would interleave one log. A kill leaves nothing to clean up."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(data.UserError, match=f"another process is training in {tmp_path}: wait.*--out"):
            data.lock_run(tmp_path)
        first.kill()
    with data.lock_run(tmp_path):
        with pytest.raises(data.UserError):
            data.lock_run(tmp_path)
    data.lock_run(tmp_path).close()


class NoLocks:
    """fcntl on a disk that has no locks."""

    LOCK_EX, LOCK_NB = 2, 4

    @staticmethod
    def flock(*args):
        raise OSError(37, "No locks available")


@pytest.mark.parametrize("fcntl", [None, NoLocks])
def test_system_without_locks_says_so(tmp_path, monkeypatch, capsys, fcntl):
    """On Windows, and on disks that have no locks, a run goes on with one sentence, a download with none."""
    monkeypatch.setattr(data, "fcntl", fcntl)
    for _ in range(2):
        data.lock_run(tmp_path).close()
        assert f"do not start a second process in {tmp_path}\n" in capsys.readouterr().err
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


def test_batches_hold_the_largest_ids():
    """Half of GPT-2's vocabulary lies above what 16 bits with a sign can hold."""
    x, y = data.batch(np.full(20, 50256, np.uint16), T, 2, 0, 0)
    assert (x == 50256).all() and (y == 50256).all()


def test_every_window_once_an_epoch():
    """Three epochs in batches that do not divide them: each takes every window once, in its own order."""
    drawn = sum(starts(6, range(3 * WINDOWS // 6)), [])
    epochs = [drawn[i : i + WINDOWS] for i in range(0, 3 * WINDOWS, WINDOWS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(0, WINDOWS * T, T))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_are_a_function_of_seed_and_step():
    """No state: any order of asking, after any other seed, and however rows are cut, gives the same rows."""
    forward = starts(6, range(40))
    data._order.cache_clear()
    np.random.seed(1)
    starts(6, range(40), seed=1)
    assert starts(6, reversed(range(40))) == forward[::-1]
    assert sum(starts(3, range(80)), []) == sum(forward, [])  # the step only counts rows


def test_seeds_differ():
    """Each seed has its own order, in every epoch."""
    orders = {tuple(sum(starts(WINDOWS, [epoch], seed), [])) for seed in range(20) for epoch in range(3)}
    assert len(orders) == 60


def test_last_window_needs_its_last_target():
    """A window is drawn only if its last target exists: T + 1 tokens are one, T tokens are none."""
    assert data.batch(TOKENS[: T + 1], T, 3, 0, 0)[1][:, -1].tolist() == [T] * 3
    drawn = torch.cat([data.batch(TOKENS[: 2 * T], T, 3, step, 0)[0] for step in range(4)])
    assert set(drawn[:, 0].tolist()) == {0}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("extra", [{}, {"replay": 0.25}, {"kd_weight": 1.0, "kd_on": "retain", "kd_rows": 4}])
def test_ranks_together_see_the_batch_of_one(world, extra):
    """The rows of N ranks concatenated are the one-rank batch, in every micro-step, old text included."""
    o = train.Options(batch_size=8, grad_accum=2, block_size=T, seed=3, **extra)
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
            assert torch.equal(x[:8] + 1, y) and len(x) == 8 + 4 * ("kd_rows" in extra)
        learned = torch.cat([y for _, y in one])
        assert (learned > 2000).any(1).sum() == (4 if "replay" in extra else 0)  # a quarter of 16 rows
        assert all((x[8:] >= 2000).all() for x, _ in one)
