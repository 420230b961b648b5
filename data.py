"""Files, tokens and batches.

A file from the network is believed only after its size and, where one is published, its sha256 agree. A
checkpoint is written aside and renamed, so that one is always whole. A text is tokenised once, a megabyte
at a time, into mapped files: it may be larger than memory. A batch depends on (seed, step) alone: a resumed
run has no reader position to restore, and N processes that share its rows see the batch of one."""

import codecs
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import requests
import tiktoken
import torch


class UserError(ValueError):
    """Something the user can put right: programs print one sentence. Bugs keep their traceback."""


def is_out_of_memory(e):
    """torch says so in several ways, with the device and the allocator."""
    phrases = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(e, MemoryError) or any(phrase in str(e) for phrase in phrases)


def need(condition, sentence):
    if not condition:
        raise UserError(sentence)


@functools.cache
def tell(sentence):
    """To stderr, once: a text is looked at when options are checked and when it is read."""
    print(sentence, file=sys.stderr)


# ----- Fetching -----


@functools.cache
def cache_dir():
    """The one folder for downloads and tokens. Printed at first use."""
    path = Path(os.environ.get("GROWING_GPT_CACHE") or "~/.cache/growing-gpt").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): set GROWING_GPT_CACHE to a folder") from e
    print(f"cache folder: {path}", file=sys.stderr)
    return path


def lock(path, wait=True):
    """Lock a file, made if need be. If another process has it, wait, or else raise UserError.
    Returns the open file: closing it, or a kill, unlocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path, "w")
    try:
        import fcntl

        fcntl.flock(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"another process trains in {path.parent}: wait, or give another --out") from e
    except (ImportError, OSError):  # Windows has no fcntl, some network disks no locks
        if not wait:
            print(f"no file locks here: start no second process in {path.parent}", file=sys.stderr)
    return f


@contextlib.contextmanager
def replacing(path):
    """A file named `path` once it is on the disk: what was there survives any failure."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    finally:  # after a failure it is still there
        aside.unlink(missing_ok=True)


def length(path):
    return path.stat().st_size if path.exists() else 0


def is_right(path, size, digest=None):
    return length(path) == size and (digest is None or sha256([np.memmap(path, mode="r")]) == digest)


def fetch(urls, path, size, sha256=None):
    """Return `path`, fetched from the first of `urls` that delivers it right.

    A right file already there (put by hand, say) needs no network. What arrives is kept in PATH.part and
    continued; only a verified file gets its name."""
    path, part, tried = Path(path), Path(f"{path}.part"), []
    if is_right(path, size, sha256):
        return path
    with lock(Path(f"{path}.lock")):
        if is_right(path, size, sha256):  # another fetched it while we waited
            return path
        for url in [url for url in urls for _ in range(2)]:  # twice: what broke off is continued
            try:
                if length(part) < size:
                    download(url, part, size)
                if is_right(part, size, sha256):
                    os.replace(part, path)
                    return path
                tried.append(f"{url}: {length(part):,} bytes, not the file's")
                part.unlink()
            except requests.RequestException as e:
                status = f", HTTP {e.response.status_code}" if e.response is not None else ""
                tried.append(f"{url}: {type(e).__name__}{status}, after {length(part):,} bytes")
    raise UserError(f"cannot fetch {path}: put its {size:,} bytes there by hand ({'; '.join(tried)})")


def download(url, part, size):
    """Add the bytes that the file `part` lacks."""
    have = length(part)
    headers = {"User-Agent": "growing-gpt/1.0", "Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as r:
        r.raise_for_status()
        resumed = r.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with open(part, "ab" if resumed else "wb") as f:
            for chunk in r.iter_content(1 << 16):
                f.write(chunk)
                print(f"\r{part.stem}: {f.tell():,} of {size:,} bytes", end="", file=sys.stderr)
                if f.tell() > size:
                    break
    print(file=sys.stderr)


def sha256(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# ----- What a run writes and reads again -----

CHECKPOINT_VERSION = 6


def save_checkpoint(path, value):
    """Replace the checkpoint at `path` by a dict of tensors, numbers, strings, lists, dicts."""
    try:
        with replacing(path) as f:
            torch.save({"version": CHECKPOINT_VERSION, **value}, f)
    except (OSError, RuntimeError) as e:  # torch reports a failed write as RuntimeError
        if is_out_of_memory(e):
            raise
        raise UserError(f"cannot write {path} ({e}): what was there is whole, make room and --resume") from e


def load_checkpoint(path):
    """What was saved, on the CPU; never code. A UserError names the file and its fault."""
    try:
        with zipfile.ZipFile(path) as z:  # torch checks no checksums, nor a bit that makes it a folder
            damaged = z.testzip() or any(entry.external_attr for entry in z.infolist())
        need(not damaged, "damaged: a checksum or an attribute is wrong")
        value = torch.load(path, map_location="cpu", weights_only=True)
        known = isinstance(value, dict) and value.get("version") == CHECKPOINT_VERSION
        need(known, "not of this program or version")
        return value
    except MemoryError:
        raise
    except Exception as e:  # for damaged bytes zipfile, zlib, pickle and torch raise a dozen kinds
        fault = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"cannot resume from {path}: {fault}") from e


def write_jsonl(path, rows, mode):
    """Write ("w") or append ("a") rows, a strict JSON object a line: NaN raises ValueError, unwritten."""
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    with open(path, mode) as f:
        f.writelines(lines)


def read_jsonl(path):
    """The rows of a file with strict JSON on each line. A UserError names the line."""
    rows, decoder = [], json.JSONDecoder(parse_constant=int)  # int("NaN") is a ValueError
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            rows.append(decoder.decode(line.decode()))
        except ValueError as e:
            raise UserError(f"{path}, line {number}: not JSON ({e}); --resume mends a torn row") from e
    return rows


# ----- Tokenizers: a model's vocabulary size says which; the last id is <|endoftext|> -----

EOT = "<|endoftext|>"
BYTES, GPT2 = 257, 50257
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/"
ENCODINGS = OPENAI + "encodings/main/"
# How GPT-2's vocab.json writes each byte: as itself if it can be seen, else as the next from 256 on.
_others = map(chr, range(256, 512))
BYTE_CHARACTERS = "".join(c if c.isprintable() and c != " " else next(_others) for c in map(chr, range(256)))
VOCABULARY_SHA256 = {
    "gpt2": "4c9d30e24aa2b6a802cbe721e72c4ea9f4ac076781eafb0686f6ae4019f7f130",
    "bytes": "77b78c7bf116dcf9c41a3d2eb609e77ee8e184c95225a3de0232c0c545fcc526",
}
TOKENIZER_FILES = {
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}


def tokenizer_files():
    """{'vocab.bpe': path, 'encoder.json': path}, where tiktoken looks for them."""
    folder, paths = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or cache_dir() / "tiktoken"), {}
    for name, (size, sha256) in TOKENIZER_FILES.items():
        url = ENCODINGS + name
        paths[name] = fetch([url], folder / hashlib.sha1(url.encode()).hexdigest(), size, sha256)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return paths


@functools.cache
def _bpe():
    tokenizer_files()  # so that tiktoken itself needs no network
    return tiktoken.get_encoding("gpt2")


def tokenizer_name(vocab_size):
    cut = "transformers' resize_token_embeddings(50257) cuts off more than that"
    need(vocab_size in (BYTES, GPT2), f"{vocab_size:,} ids, not GPT-2's 50,257 or bytes' 257: {cut}")
    return "bytes" if vocab_size == BYTES else "gpt2"


def check_tokenizer(folder, vocab_size):
    """Refuse a network whose tokenizer, {token: id}, is not that of `encode`. End of text may be missing;
    the JSON of the other [id, token], in order, has a known sha256."""
    for file in ("vocab.json", "tokenizer.json"):
        if (folder / file).exists():
            name, ids = tokenizer_name(vocab_size), json.loads((folder / file).read_bytes())
            ids = ids["model"]["vocab"] if file == "tokenizer.json" else ids
            known = json.dumps(sorted((i, token) for token, i in ids.items() if token != EOT))
            right = hashlib.sha256(known.encode()).hexdigest() == VOCABULARY_SHA256[name]
            need(right, f"{file} beside it is not the {name} tokenizer: ids mean other text here")


def encode(text, vocab_size=GPT2):
    """Text -> uint16 ids, (N,). <|endoftext|> in the text is one token."""
    if tokenizer_name(vocab_size) == "gpt2":
        return np.array(_bpe().encode(text, allowed_special="all"), np.uint16)
    raw = text.encode("utf-8", "replace").replace(EOT.encode(), b"\xff")  # which no UTF-8 has
    ids = np.frombuffer(raw, np.uint8)
    return np.where(ids == 0xFF, np.uint16(256), ids)


def decode(ids, vocab_size=GPT2):
    """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
    if tokenizer_name(vocab_size) == "gpt2":
        return _bpe().decode([int(i) for i in ids])
    return b"".join(EOT.encode() if i == 256 else bytes([i]) for i in ids).decode("utf-8", "replace")


# ----- Texts: {split: [(file, begin, end), ...]}, in bytes. A row of .jsonl is a document -----

WIKITEXT_URLS = [
    "https://huggingface.co/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/"
    "wikitext-2-raw-v1.zip",
    "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
]
WIKITEXT_ZIP = (4_721_645, "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11")
WEBTEXT_BYTES = {"valid": 13_622_302, "test": 13_478_245}  # OpenAI publishes no hash of them


def wikitext2():
    z = zipfile.ZipFile(fetch(WIKITEXT_URLS, cache_dir() / "wikitext-2-raw-v1.zip", *WIKITEXT_ZIP))
    names = {"train": "wiki.train.raw", "val": "wiki.valid.raw", "test": "wiki.test.raw"}
    files = {split: zipfile.Path(z, f"wikitext-2-raw/{name}") for split, name in names.items()}
    return {split: [(file, 0, z.getinfo(file.at).file_size)] for split, file in files.items()}


def webtext():
    """GPT-2's own held-out distribution: validation set to train on, test set to measure with."""
    parts = []
    for name, size in WEBTEXT_BYTES.items():
        file = f"webtext.{name}.jsonl"
        path = fetch([f"{OPENAI}output-dataset/v1/{file}"], cache_dir() / file, size)
        parts.append([(path, 0, size)])
    return {"train": parts[0], "val": parts[1], "test": parts[1]}


def docs():
    """This Python's documentation, as pydoc carries it."""
    from pydoc_data.topics import topics

    return _shuffled(topics.values())


def code():
    """The top-level modules of this Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return _shuffled(path.read_text("utf-8", "replace") for path in folder.glob("*.py"))


def headers():
    """The headers of torch's C++ interface, in every install: about a megabyte."""
    folder = Path(torch.__file__).parent / "include/torch/csrc/api/include"
    return _shuffled(path.read_text("utf-8", "replace") for path in folder.rglob("*.h"))


def _shuffled(texts):
    """Pieces of 2,000 characters and a line's rest, in the order of their sha256, as good as random: so
    train, val and test, and any prefix of them, are alike."""
    cut = re.compile(r"(?s:.{1,2000})[^\n]*\n?")
    pieces = [piece.encode("utf-8", "replace") for text in texts for piece in cut.findall(text)]
    raw = EOT.encode().join(sorted(pieces, key=lambda piece: hashlib.sha256(piece).digest()))
    file = SimpleNamespace(open=lambda mode: io.BytesIO(raw), suffix=".txt")  # in memory
    return split([(file, len(raw))])


READ = (".txt", ".md", ".py", ".jsonl")  # of a folder; a file is read whatever its name


def find_files(name):
    """A user's file, or all that can be read below a folder, in the order of their paths. What begins with a
    dot, a system's or an editor's, is left out."""
    path = Path(name).expanduser().absolute()
    need(name and path.exists(), f"no text {path}: give {', '.join(BUILT_IN)}, a file or a folder")
    if path.is_file():
        if path.suffix.lower() not in READ:
            tell(f"{path} is read as plain text")
        return [path]
    found = [p for p in sorted(path.rglob("*")) if p.is_file()]
    shown = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    files = [p for p in shown if p.suffix.lower() in READ]
    tell(f"{path}: {len(files)} files are read, {len(found) - len(files)} left out")
    need(files, f"{path} has no files ending in {', '.join(READ)}")
    return files


def split(files):
    """90% train, 5% val, 5% test of the bytes of files [(file, size), ...], each cut behind a line."""
    total, before = sum(size for _, size in files), 0
    parts = {"train": [], "val": [], "test": []}
    for file, size in files:
        a, b = (line_end(file, size, total * share // 100 - before, total // 40) for share in (90, 95))
        for part, begin, end in (("train", 0, a), ("val", a, b), ("test", b, size)):
            if begin < end:
                parts[part].append((file, begin, end))
        before += size
    return parts


def line_end(file, size, at, most):
    """The first line end behind byte `at`; if there is none within `most`, the next character. (A .jsonl
    file is cut behind a row, however long.)"""
    if not 0 <= at < size:
        return min(max(at, 0), size)
    is_jsonl = file.suffix.lower() == ".jsonl"
    with file.open("rb") as f:
        f.seek(at)
        rest = f.readline(-1 if is_jsonl else min(most, 1 << 20))
    if is_jsonl or rest.endswith(b"\n"):
        return at + len(rest)
    return at + len(rest) - len(rest.lstrip(bytes(range(0x80, 0xC0))))  # a character's rest


def documents(parts, size):
    """The text of parts, `size` bytes or a row at a time, with <|endoftext|> before each document."""
    for file, begin, end in parts:
        read = json_texts if file.suffix.lower() == ".jsonl" else plain_text
        with file.open("rb") as f:
            f.seek(begin)
            yield from read(f, file, end, size)


def json_texts(f, file, end, size):
    """The "text" of each row of an open file up to byte `end`, of whatever size."""
    while line := f.readline(end - f.tell()):
        if not line.strip():
            continue
        try:
            yield EOT + json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as e:
            number = file.read_bytes()[: f.tell() - len(line)].count(b"\n") + 1
            raise UserError(f'{file}, line {number}: each row must be JSON with a string "text"') from e


def plain_text(f, file, end, size):
    """The text of an open file up to byte `end`, `size` bytes at a time, without a byte order mark; line
    ends become those of Unix, but stay in a .raw file."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=file.suffix.lower() != ".raw")
    yield EOT
    while raw := f.read(min(size, end - f.tell())):
        need(b"\0" not in raw, f"{file} holds NUL bytes, as UTF-16 does: convert it to UTF-8 first")
        try:
            yield decoder.decode(raw, f.tell() == end)
        except UnicodeDecodeError as e:
            at = f.tell() - len(e.object) + e.start
            raise UserError(f"{file} is not UTF-8 at byte {at}: convert it first") from e


def pieces(parts, size=1 << 20):
    """The documents joined by <|endoftext|>, in strings of about `size` characters whose ids, joined, are
    those of the whole: each is cut before a space or line end after something else, where GPT-2's pattern
    ends a token whatever comes."""
    rest = ""
    for i, text in enumerate(documents(parts, size)):
        rest += text if i else text.removeprefix(EOT)
        piece = rest[: max(rest.rfind(" "), rest.rfind("\n")) + 1].rstrip(" \n")
        if len(rest) >= size and piece and not piece[-1].isspace():
            yield piece
            rest = rest[len(piece) :]
    yield rest


BUILT_IN = {"wikitext2": wikitext2, "webtext": webtext, "docs": docs, "code": code, "headers": headers}


def check_name(name):
    """Before any download, refuse a text that is neither built in nor here."""
    if name not in BUILT_IN:
        find_files(name)
    elif Path(name).exists():
        tell(f"{name} is the built-in text: for what is here, write ./{name}")


def load(name, vocab_size, block_size):
    """{'train', 'val', 'test'} -> uint16 ids of the split, (N,), mapped from a file; None for "none".
    Raises UserError if the text is too short."""
    if name == "none":
        return None
    parts = BUILT_IN[name]() if name in BUILT_IN else split([(f, length(f)) for f in find_files(name)])
    paths = token_files(name, parts, vocab_size)
    for part, least in (("train", 2 * block_size + 1), ("val", 2), ("test", 2)):
        count = length(paths[part]) // 2
        lacks = f"its {part} split has {count:,} tokens, --block_size={block_size} needs {least:,}"
        need(count >= least, f"{name} is too short: {lacks} (split at line ends, 90/5/5)")
    return {part: np.memmap(path, "<u2", "r") for part, path in paths.items()}


def token_files(name, parts, vocab_size):
    """{split: path} of files with the ids of a text's parts, made before or now, named by the tokenizer and
    the source's sha256. They are whole: each gets its name last."""
    source = text_sha256(parts)
    folder = cache_dir() / "tokens" / f"{tokenizer_name(vocab_size)}-{source}"
    paths = {part: folder / f"{part}.uint16" for part in parts}
    with lock(folder / "lock"):
        for part in [part for part in parts if not paths[part].exists()]:
            began, size = time.perf_counter(), sum(end - begin for _, begin, end in parts[part])
            with replacing(paths[part]) as f:
                for piece in pieces(parts[part]):
                    f.write(encode(piece, vocab_size).astype("<u2"))
                    if time.perf_counter() - began > 2:
                        done = f"{f.tell() / 2e6:.1f} million tokens of {size / 1e6:.0f} MB"
                        print(f"{name}, {part}: {done}", end="\r", file=sys.stderr)
                need(text_sha256(parts) == source, f"{name} changed while it was read: start again")
    return paths


def text_sha256(parts):
    """Of a text's bytes and how they are split."""
    digest = hashlib.sha256()
    for part, ranges in parts.items():
        for file, begin, end in ranges:
            digest.update(f"{part} {file.suffix.lower()} {end - begin}\n".encode())
            with file.open("rb") as f:
                f.seek(begin)
                while raw := f.read(min(1 << 20, end - f.tell())):
                    digest.update(raw)
    return digest.hexdigest()


# ----- Batches -----


@functools.lru_cache(maxsize=8)
def _order(windows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(windows)


def batch(tokens, block_size, rows, step, seed):
    """Inputs and targets of a step: two int64 tensors (rows, T), T = block_size.

    The split is cut into windows of T + 1 tokens that overlap by one; each is drawn once an epoch."""
    windows = (len(tokens) - 1) // block_size
    drawn = range(step * rows, (step + 1) * rows)
    starts = [int(_order(windows, seed, i // windows)[i % windows]) * block_size for i in drawn]
    ids = torch.from_numpy(np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def to_device(tensor, device):
    """Copy a batch; to a GPU from pinned memory, in the background: it need not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
