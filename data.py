"""Files, tokens and batches.

Three ideas, in the order of this file. A file from the network is believed only after its size and sha256
agree with what is written here. A text is tokenised once, into a file that names the text it was made
from. A batch is a pure function of (seed, step), so a run that resumes has no reader position to restore,
and N processes that each take their share of the rows see the batch that one process would see."""

import contextlib
import functools
import hashlib
import json
import os
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import requests
import torch

try:
    import fcntl  # a file lock, so that two processes fetch a file once
except ImportError:  # Windows: two processes at once would fetch it twice
    fcntl = None


class UserError(ValueError):
    """Something the user can put right: programs print it as one sentence. Bugs keep their traceback."""

    status = 1  # of the exit


class UsageError(UserError):
    """A command line that makes no sense: found before anything is downloaded or computed."""

    status = 2


# ------------------------------------------------------------------------------------------------------------
# Fetching

_caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
_cache = os.environ.get("GROWING_GPT_CACHE") or f"{_caches}/growing-gpt"


@functools.cache
def cache_dir():
    """The one folder for downloads, tokens, demo models, and ranks' kernels. Printed at first use."""
    path = Path(_cache).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # found now rather than after a download
            pass
    except OSError as e:
        raise UserError(f"cannot write to the cache {path} ({e.strerror}): give another --cache_dir") from e
    print(f"cache folder: {path}", file=sys.stderr)
    return path


def set_cache_dir(path):
    global _cache
    if path:
        _cache = path
        cache_dir.cache_clear()


@contextlib.contextmanager
def lock(path):
    """Hold `path`.lock, so that one process works and the others wait and then find the work done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as f:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def fault(path, size=None, sha256=None):
    """What is wrong with a file, as a phrase, or None."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"has {found:,} bytes instead of {size:,}"
    if sha256 is not None:
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                return "has the wrong sha256"


def fetch(urls, path, size=None, sha256=None):
    """Return `path`, downloaded from the first of `urls` that delivers `size` bytes with this `sha256`.

    A file already there (put by hand, say) with the right size and hash is used without a network. What
    has arrived is kept in PATH.part and continued with a Range request, and only a verified file gets its
    name."""
    path, tried = Path(path), []
    try:
        wrong = fault(path, size, sha256) if path.exists() else "is missing"
        if wrong is None:
            return path
        tried.append(f"{path} {wrong}")
        with lock(path):
            if path.exists() and not fault(path, size, sha256):  # another process fetched it while we waited
                return path
            for url in urls:
                reason = _fetch_from(url, path, size, sha256)
                if reason is None:
                    return path
                tried.append(f"{url}: {reason}")
    except OSError as e:
        tried.append(f"{e.strerror or e}")
    raise UserError(f"could not fetch {path.name} into {path.parent} ({'; '.join(tried)})")


def _fetch_from(url, path, size, sha256, attempts=4):
    """Try one mirror; return None, or why it failed."""
    part = path.with_name(path.name + ".part")
    for _ in range(attempts):
        had = part.stat().st_size if part.exists() else 0
        try:
            _download(url, part, size)
        except requests.HTTPError as e:
            return f"HTTP status {e.response.status_code}"
        except requests.TooManyRedirects:
            return "redirects without end"
        except requests.RequestException as e:
            reason = f"{type(e).__name__} after {part.stat().st_size if part.exists() else 0:,} bytes"
            if not part.exists() or part.stat().st_size <= had:
                return reason  # no progress: the next mirror may go on from here
            continue
        reason = fault(part, size, sha256)
        if reason is None:
            os.replace(part, path)
            return None
        part.unlink()
        reason += ", deleted"
        if not had:  # a whole file, and the wrong one; had we continued an old part, we would start from zero
            return reason
    return reason


def _download(url, part, size):
    """Add to `part` the bytes that it lacks."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "growing-gpt/1.0", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as r:
        if have and r.status_code == 416:  # nothing follows what we have: the hash will say if it is right
            return
        r.raise_for_status()
        resumed = r.status_code == 206 and r.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with open(part, "ab" if resumed else "wb") as f:
            for chunk in r.iter_content(1 << 16):
                f.write(chunk)
                total = f" of {size / 1e6:.0f}" if size else ""
                print(f"\r{part.stem}: {f.tell() / 1e6:.1f}{total} MB", end="", file=sys.stderr, flush=True)
                if size is not None and f.tell() > size:
                    break
    print(file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# Tokenizers. A model's vocabulary size says which it uses; in both the last id is <|endoftext|>.

EOT = "<|endoftext|>"
BYTES, GPT2 = 257, 50257
ENCODINGS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
TOKENIZER_FILES = {
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}


def tokenizer_files():
    """{'vocab.bpe': path, 'encoder.json': path}, where and under the names that tiktoken looks for them."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = folder or cache_dir() / "tiktoken"
    paths = {}
    names = {name: hashlib.sha1((ENCODINGS + name).encode()).hexdigest() for name in TOKENIZER_FILES}
    for name, (size, sha256) in TOKENIZER_FILES.items():
        path = Path(folder) / names[name]
        try:
            paths[name] = fetch([ENCODINGS + name], path, size, sha256)
        except UserError as e:
            raise UserError(
                f"GPT-2's tokenizer needs {' and '.join(names)} from {ENCODINGS}. Without a network, put "
                f"them into a folder, named {' and '.join(names.values())} in this order, and set "
                f"TIKTOKEN_CACHE_DIR to it. Reason: {e}"
            ) from e
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return paths


@functools.cache
def _bpe():
    import tiktoken

    tokenizer_files()  # so that tiktoken finds them and never goes to the network itself
    return tiktoken.get_encoding("gpt2")


def tokenizer_name(vocab_size):
    if vocab_size not in (BYTES, GPT2):
        raise UserError(f"no tokenizer has {vocab_size:,} ids: only 50,257 (GPT-2) and 257 (bytes) are known")
    return "bytes" if vocab_size == BYTES else "gpt2"


def encode(text, vocab_size=GPT2):
    """Text -> uint16 ids, (N,). Where the text says <|endoftext|> the ids have it as one token."""
    if tokenizer_name(vocab_size) == "bytes":
        pieces = [np.frombuffer(p.encode("utf-8", "replace"), np.uint8) for p in text.split(EOT)]
    else:
        pieces = [np.array(_bpe().encode_ordinary(p), np.uint16) for p in text.split(EOT)]
    eot = np.array([vocab_size - 1], np.uint16)
    return np.concatenate([pieces[0], *(part for p in pieces[1:] for part in (eot, p))]).astype(np.uint16)


def decode(ids, vocab_size=GPT2):
    """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
    ids = [int(i) for i in ids]
    if tokenizer_name(vocab_size) == "gpt2":
        return _bpe().decode(ids)
    return b"".join(EOT.encode() if i == 256 else bytes([i]) for i in ids).decode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------------------
# Texts: each source is a function that returns {'train': text, 'val': text, 'test': text}.

WIKITEXT_URLS = [
    "https://huggingface.co/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/"
    "wikitext-2-raw-v1.zip",
    "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
]
WIKITEXT_ZIP = (4_721_645, "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11")
WIKITEXT_FILES = {  # split: the archive's name of it, sha256
    "train": ("train", "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57"),
    "val": ("valid", "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7"),
    "test": ("test", "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"),
}
WEBTEXT_URL = "https://openaipublic.blob.core.windows.net/gpt-2/output-dataset/v1/"
WEBTEXT_BYTES = {"valid": 13_622_302, "test": 13_478_245}  # OpenAI publishes no hash of these
LAMBADA_URL = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
LAMBADA = (1_819_752, "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226")


def wikitext2():
    path = fetch(WIKITEXT_URLS, cache_dir() / "wikitext-2-raw-v1.zip", *WIKITEXT_ZIP)
    texts = {}
    with zipfile.ZipFile(path) as z:  # members are read by exact name; nothing is extracted
        for split, (name, sha256) in WIKITEXT_FILES.items():
            raw = z.read(f"wikitext-2-raw/wiki.{name}.raw")
            if hashlib.sha256(raw).hexdigest() != sha256:
                raise UserError(f"wiki.{name}.raw in {path} has the wrong sha256")
            texts[split] = raw.decode("utf-8")
    return texts


def webtext():
    """GPT-2's own held-out distribution: its validation set to train on, its test set to measure with."""
    texts = {}
    for split, size in WEBTEXT_BYTES.items():
        path = fetch([f"{WEBTEXT_URL}webtext.{split}.jsonl"], cache_dir() / f"webtext.{split}.jsonl", size)
        texts[split] = EOT.join(read_texts(path))
    return {"train": texts["valid"], "val": texts["test"], "test": texts["test"]}


def lambada():
    """The 5,153 passages of OpenAI's LAMBADA test, each a text whose last word is to be guessed."""
    return read_texts(fetch([LAMBADA_URL], cache_dir() / "lambada_test.jsonl", *LAMBADA))


def read_texts(path):
    try:
        return [row["text"] for row in read_jsonl(path)]
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}: a row without a text") from e


def read_jsonl(path):
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise UserError(f"{path}, line {number}: not JSON") from e
    return rows


def docs():
    """The documentation of the Python that runs this, as pydoc carries it."""
    from pydoc_data.topics import topics

    return _split(_shuffled_pieces(topics[name] for name in sorted(topics)))


def code():
    """The top-level modules of the standard library of the Python that runs this."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    return _split(_shuffled_pieces(path.read_text(encoding="utf-8", errors="replace") for path in files))


def _shuffled_pieces(texts, size=2000):
    """Pieces of at least `size` characters, cut at line ends, in a fixed order that owes nothing to the
    alphabet: so train, val and test, and any prefix of them, are alike."""
    pieces = []
    for text in texts:
        while text:
            end = text.find("\n", size) + 1 or len(text)
            pieces.append(text[:end])
            text = text[end:]
    return sorted(pieces, key=lambda piece: hashlib.sha256(piece.encode("utf-8", "replace")).digest())


def own_text(name, bad_utf8="refuse"):
    """A user's .txt file, or every .txt, .md and .py file below a folder in the order of their paths."""
    path = Path(name)
    found = path.rglob("*") if path.is_dir() else [path]
    files = sorted(p for p in found if p.is_file() and (p == path or p.suffix in (".txt", ".md", ".py")))
    texts = []
    for file in files:
        raw = file.read_bytes()
        try:
            texts.append(raw.decode("utf-8", "strict" if bad_utf8 == "refuse" else "replace"))
        except UnicodeDecodeError as e:
            raise UserError(
                f"{file} is not UTF-8 at byte {e.start}: convert it, or pass --bad_utf8=replace to read the "
                "offending bytes as U+FFFD"
            ) from e
    return _split(texts)


def _split(texts):
    """90% train, 5% val, 5% test of the joined texts, cut at line ends."""
    text = EOT.join(texts)
    a, b = (text.find("\n", int(len(text) * share)) + 1 or len(text) for share in (0.90, 0.95))
    return {"train": text[:a], "val": text[a:b], "test": text[b:]}


BUILT_IN = {"wikitext2": wikitext2, "webtext": webtext, "docs": docs, "code": code}


def check_name(name):
    """Refuse a data set that is neither built in nor there, before anything is downloaded."""
    if name not in BUILT_IN and not Path(name).exists():
        known = ", ".join(BUILT_IN)
        raise UsageError(f"no data set or file {name!r}: give one of {known}, a .txt file, or a folder")


# ------------------------------------------------------------------------------------------------------------
# Tokens: one file a split, a header of 512 bytes (JSON, padded with spaces) and then the ids as uint16,
# little-endian

BIN_VERSION, HEADER = 1, 512


def load(name, vocab_size, block_size, bad_utf8="refuse"):
    """{'train', 'val', 'test'} -> uint16 ids of the whole split, (N,). UserError if the text is too short."""
    check_name(name)
    texts = BUILT_IN[name]() if name in BUILT_IN else own_text(name, bad_utf8)
    tokens = {split: _tokens(Path(name).stem, split, text, vocab_size) for split, text in texts.items()}
    for split, need in (("train", 2 * block_size + 1), ("val", 2), ("test", 2)):
        if len(tokens[split]) < need:
            raise UserError(
                f"{name} is too short: its {split} split has {len(tokens[split]):,} tokens and needs "
                f"{need:,} or more at --block_size={block_size}"
            )
    return tokens


def _tokens(name, split, text, vocab_size):
    """The ids of a text, from the file made of this very text earlier or made now."""
    source = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    tokenizer = tokenizer_name(vocab_size)
    path = cache_dir() / "tokens" / f"{name}-{split}-{tokenizer}-{source[:16]}.bin"
    with lock(path):
        try:
            return read_bin(path, source, tokenizer)
        except FileNotFoundError:
            pass
        except ValueError as e:
            print(f"{e}: tokenising again", file=sys.stderr)
        write_bin(path, encode(text, vocab_size), source, tokenizer)
    return read_bin(path, source, tokenizer)


def write_bin(path, ids, source, tokenizer):
    header = {"version": BIN_VERSION, "source": source, "tokenizer": tokenizer, "count": len(ids)}
    header["sha256"] = hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest()
    with open(f"{path}.tmp", "wb") as f:
        f.write(json.dumps(header).encode().ljust(HEADER) + ids.astype("<u2").tobytes())
    os.replace(f"{path}.tmp", path)


def read_bin(path, source, tokenizer):
    """The ids in a token file, (N,) uint16. ValueError if it is damaged or made from something else."""
    raw = Path(path).read_bytes()
    try:
        header = json.loads(raw[:HEADER])
        expected = {"version": BIN_VERSION, "source": source, "tokenizer": tokenizer}
        intact = hashlib.sha256(raw[HEADER:]).hexdigest() == header["sha256"]
        same = {k: header[k] for k in expected} == expected and header["count"] * 2 == len(raw) - HEADER
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: its header is damaged") from e
    if not (intact and same):
        reason = "made from another text, tokenizer or version" if intact else "is damaged"
        raise ValueError(f"{path}: {reason}")
    return np.frombuffer(raw, "<u2", offset=HEADER)


# ------------------------------------------------------------------------------------------------------------
# Batches


@functools.lru_cache(maxsize=8)
def _order(windows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(windows)


def batch(tokens, block_size, rows, step, seed):
    """Inputs and targets of a step: two int64 tensors of shape (rows, T), T = block_size.

    The split is cut into windows of T + 1 tokens that overlap by one; every window is drawn once an epoch.
    """
    windows = (len(tokens) - 1) // block_size
    drawn = range(step * rows, (step + 1) * rows)
    starts = [int(_order(windows, seed, i // windows)[i % windows]) * block_size for i in drawn]
    ids = torch.from_numpy(np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def to_device(tensor, device):
    """Copy a batch; to a GPU from pinned memory, in the background, so that it need not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
