"""Files, tokens and batches.

Four ideas, in the order of this file. A file from the network is believed only after its size and, where one
is published, its sha256 agree with what is written here. A checkpoint is written beside the old one and then
renamed, so that one of them is always whole. A text is tokenised once, into a file named by the text's
sha256. A batch is a pure function of (seed, step): a run that resumes has no reader position to restore, and
N processes that each take their share of the rows see the batch of one."""

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


def is_out_of_memory(e):
    """torch says so in several ways, with the device and the allocator."""
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(e, MemoryError) or (
        isinstance(e, RuntimeError) and any(text in str(e) for text in said)
    )


# ----- Fetching -----


@functools.cache
def cache_dir():
    """The one folder for downloads, tokens, and ranks' kernels. Printed at first use."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.environ.get("GROWING_GPT_CACHE") or f"{caches}/growing-gpt").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # found now rather than after a download
    except OSError as e:
        raise UserError(f"cannot write to the cache {path} ({e.strerror}): give another --cache_dir") from e
    print(f"cache folder: {path}", file=sys.stderr)
    return path


def set_cache_dir(path):
    if path:
        os.environ["GROWING_GPT_CACHE"] = path
        cache_dir.cache_clear()


def lock(path, wait=True):
    """Lock a file, and make it if need be. If another process has it, wait, or else raise UserError.
    Returns the open file: to close it, or a kill, unlocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path, "w")
    try:
        fcntl.flock(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        other = f"another process is training in {path.parent}"
        raise UserError(f"{other}: wait for it, or give another --out") from e
    except (AttributeError, OSError):  # Windows has no fcntl, and some network disks have no locks
        if not wait:
            print(f"no file locks here: do not start a second process in {path.parent}", file=sys.stderr)
    return f


@contextlib.contextmanager
def replacing(path):
    """A file that gets the name `path` once it is on the disk: what was there survives any failure."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def length(path):
    return path.stat().st_size if path.exists() else 0


def fault(path, size=None, sha256=None):
    """What is wrong with a file, as a phrase, or None."""
    if not path.exists():
        return "is missing"
    if size is not None and length(path) != size:
        return f"has {length(path):,} bytes instead of {size:,}"
    if sha256 is not None:
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                return "has the wrong sha256"


def fetch(urls, path, size=None, sha256=None, remedy=None):
    """Return `path`, downloaded from the first of `urls` that delivers `size` bytes with this `sha256`.

    A right file that is there already (put by hand, say) needs no network. What has arrived is kept in
    PATH.part and continued; only a verified file gets its name. UserError begins with the remedy."""
    path, part, tried = Path(path), Path(f"{path}.part"), []
    try:
        wrong = fault(path, size, sha256)
        if wrong is None:
            return path
        tried.append(f"{path} {wrong}")
        with lock(Path(f"{path}.lock")):
            if fault(path, size, sha256) is None:  # another process fetched it while we waited
                return path
            for url in urls:
                for _ in range(4):
                    had = length(part)
                    reason = _download(url, part, size, sha256)
                    if reason is None:
                        os.replace(part, path)
                        return path
                    if length(part) == had:  # else there is more of it, or a wrong part is gone: once more
                        break
                tried.append(f"{url}: {reason}")
    except OSError as e:
        tried.append(f"{e.strerror or e}")
    if remedy is None:
        remedy = f"check the network, or put {path.name} into {path.parent} by hand: "
    raise UserError(f"{remedy}could not fetch {path.name} into {path.parent} ({'; '.join(tried)})")


def _download(url, part, size, sha256):
    """Add to `part` the bytes that it lacks; return None if it is right then, or what went wrong."""
    have = length(part)
    headers = {"User-Agent": "growing-gpt/1.0", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as r:
            whole = have and r.status_code == 416  # nothing follows what we have: is it right?
            if not (r.ok or whole):
                return f"HTTP status {r.status_code}"
            resumed = r.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            with open(part, "ab" if resumed or whole else "wb") as f:
                for chunk in [] if whole else r.iter_content(1 << 16):
                    f.write(chunk)
                    total = f" of {size / 1e6:.0f}" if size else ""
                    print(f"\r{part.stem}: {f.tell() / 1e6:.1f}{total} MB", end="", file=sys.stderr)
                    if size is not None and f.tell() > size:
                        break
    except requests.TooManyRedirects:
        return "redirects without end"
    except requests.RequestException as e:
        return f"{type(e).__name__} after {length(part):,} bytes"
    print(file=sys.stderr)
    wrong = fault(part, size, sha256)
    if wrong is not None:
        part.unlink()
    return wrong


def sha256(arrays):
    """Of the bytes of numpy arrays, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# ----- What a run writes and reads again -----

CHECKPOINT_VERSION = 4


def save_checkpoint(path, value):
    """Replace the checkpoint at `path` by a dict of tensors, numbers, strings, lists and dicts."""
    path = Path(path)
    try:
        with replacing(path) as f:
            torch.save({"version": CHECKPOINT_VERSION, **value}, f)
    except (OSError, RuntimeError) as e:  # torch reports a failed write as RuntimeError
        if is_out_of_memory(e):
            raise
        reason = e.strerror if isinstance(e, OSError) else "the disk may be full"
        then = "the one before is intact, use --resume" if path.exists() else "give another --out"
        raise UserError(f"cannot write {path} ({reason}): {then}") from e


def load_checkpoint(path):
    """What was saved, on the CPU; never code. Raises UserError that names the file and its fault."""
    try:
        with zipfile.ZipFile(path) as z:  # torch does not check the checksums that it writes, and it takes
            # an entry that a flipped bit marks as a folder for an empty tensor
            if z.testzip() or any(entry.external_attr for entry in z.infolist()):
                raise ValueError("a checksum or an attribute is wrong")
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as e:  # damaged bytes make zipfile, zlib, pickle and torch raise a dozen kinds
        raise UserError(f"{path}: damaged ({(str(e) or type(e).__name__).splitlines()[0]})") from e
    found = value.get("version") if isinstance(value, dict) else None
    if found != CHECKPOINT_VERSION:
        raise UserError(
            f"{path} has format {found}, and only {CHECKPOINT_VERSION} can be resumed: to go on from its "
            f"network, give --init={Path(path).parent / 'model'} and another --out"
        )
    return value


def write_jsonl(path, rows, mode):
    """Write ("w") or append ("a") rows, a JSON object a line. Strict JSON: a bug's NaN or Infinity raises
    ValueError, and the file stays as it is."""
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    with open(path, mode) as f:
        f.writelines(lines)


def read_jsonl(path):
    """The rows of a file with strict JSON on each line. Raises UserError that names the line."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            rows.append(json.loads(line, parse_constant=int))  # int("NaN") is a ValueError
        except ValueError as e:
            raise UserError(f"{path}, line {number}: not JSON ({e})") from e
    return rows


def lock_run(out):
    """Make a run's folder and lock RUN/lock, which is returned, open."""
    out = Path(out).absolute()
    try:
        return lock(out / "lock", wait=False)
    except OSError as e:
        raise UserError(f"cannot write to {out} ({e.strerror}): give another --out") from e


# ----- Tokenizers: the vocabulary size of a model says which; in both the last id is <|endoftext|> -----

EOT = "<|endoftext|>"
BYTES, GPT2 = 257, 50257
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/"
ENCODINGS = OPENAI + "encodings/main/"
TOKENIZER_FILES = {
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}


def tokenizer_files():
    """{'vocab.bpe': path, 'encoder.json': path}, where and under the names that tiktoken looks for them."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(folder or cache_dir() / "tiktoken")
    paths = {name: folder / hashlib.sha1((ENCODINGS + name).encode()).hexdigest() for name in TOKENIZER_FILES}
    remedy = f"check the network, or put {' and '.join(paths)} from {ENCODINGS} into a folder, named "
    remedy += f"{' and '.join(p.name for p in paths.values())} and set TIKTOKEN_CACHE_DIR to it: "
    for name, path in paths.items():
        fetch([ENCODINGS + name], path, *TOKENIZER_FILES[name], remedy)
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
    gpt2, eot = tokenizer_name(vocab_size) == "gpt2", np.array([vocab_size - 1], np.uint16)
    parts = []
    for piece in text.split(EOT):
        raw = piece.encode("utf-8", "replace")
        ids = _bpe().encode_ordinary(piece) if gpt2 else np.frombuffer(raw, np.uint8)
        parts += [np.array(ids, np.uint16), eot]
    return np.concatenate(parts[:-1])


def decode(ids, vocab_size=GPT2):
    """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
    ids = [int(i) for i in ids]
    if tokenizer_name(vocab_size) == "gpt2":
        return _bpe().decode(ids)
    return b"".join(EOT.encode() if i == 256 else bytes([i]) for i in ids).decode("utf-8", "replace")


# ----- Texts: each source is a function that returns {'train': text, 'val': text, 'test': text} -----

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
WEBTEXT_BYTES = {"valid": 13_622_302, "test": 13_478_245}  # OpenAI publishes no hash of these
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


def openai_texts(address, size, sha256=None):
    """The texts in one of OpenAI's files of JSON, one a line."""
    path = fetch([OPENAI + address], cache_dir() / Path(address).name, size, sha256)
    rows = read_jsonl(path)
    if not all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows):
        raise UserError(f"{path}: a row without a text")
    return [row["text"] for row in rows]


def webtext():
    """GPT-2's own held-out distribution: its validation set to train on, its test set to measure with."""
    names = {split: f"output-dataset/v1/webtext.{split}.jsonl" for split in WEBTEXT_BYTES}
    valid, test = (EOT.join(openai_texts(names[split], size)) for split, size in WEBTEXT_BYTES.items())
    return {"train": valid, "val": test, "test": test}


def lambada():
    """The 5,153 passages of OpenAI's LAMBADA test, each a text whose last word is to be guessed."""
    return openai_texts("data/lambada_test.jsonl", *LAMBADA)


def docs():
    """The documentation of the Python that runs this, as pydoc carries it."""
    from pydoc_data.topics import topics

    return _split(_shuffled_pieces(topics[name] for name in sorted(topics)))


def code():
    """The top-level modules of the standard library of the Python that runs this."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return _split(_shuffled_pieces(path.read_text("utf-8", "replace") for path in files))


def headers():
    """The headers of torch's C++ interface, which every install brings: about a megabyte."""
    folder = Path(torch.__file__).parent / "include/torch/csrc/api/include"
    files = sorted(folder.rglob("*.h"))
    if not files:
        raise UserError(f"this torch has no headers in {folder}: give another --dataset")
    return _split(_shuffled_pieces(path.read_text("utf-8", "replace") for path in files))


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


def own_text(name):
    """A user's file, or every .txt, .md and .py file below a folder in the order of their paths."""
    path = Path(name).absolute()
    if not path.exists():
        known = f"give one of {', '.join(BUILT_IN)}, a .txt file, or a folder"
        raise UsageError(f"no data set {name!r}, and no file {path}: {known}")
    found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in found if p == path or p.suffix in (".txt", ".md", ".py")]
    if not files:
        raise UsageError(f"{path} has {len(found)} files, but none of those that are read: .txt, .md, .py")
    texts = []
    for file in files:
        try:
            texts.append(file.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as e:
            raise UserError(f"{file} is not UTF-8 at byte {e.start}: convert it first") from e
    return _split(texts)


def _split(texts):
    """90% train, 5% val, 5% test of the joined texts, cut at line ends."""
    text = EOT.join(texts)
    a, b = (text.find("\n", int(len(text) * share)) + 1 or len(text) for share in (0.90, 0.95))
    return {"train": text[:a], "val": text[a:b], "test": text[b:]}


BUILT_IN = {"wikitext2": wikitext2, "webtext": webtext, "docs": docs, "code": code, "headers": headers}


def check_name(name):
    """Refuse a data set that is neither built in nor a text here, before anything is downloaded."""
    if not name:
        raise UsageError(f"a data set without a name: give one of {', '.join(BUILT_IN)}, a file or a folder")
    if name not in BUILT_IN:
        own_text(name)
    elif Path(name).exists():
        print(f"{name} is the built-in text: to take what is here, write ./{name}", file=sys.stderr)


def load(name, vocab_size, block_size):
    """{'train', 'val', 'test'} -> uint16 ids of the whole split, (N,). UserError if the text is too short."""
    texts = BUILT_IN[name]() if name in BUILT_IN else own_text(name)
    tokens = {split: tokens_of(text, vocab_size) for split, text in texts.items()}
    for split, need in (("train", 2 * block_size + 1), ("val", 2), ("test", 2)):
        if len(tokens[split]) < need:
            lines = "".join(texts.values()).strip("\n")
            one = "" if "\n" in lines else ", and this one has one line"
            raise UserError(
                f"{name} is too short: its {split} split has {len(tokens[split]):,} tokens and needs "
                f"{need:,} or more at --block_size={block_size}. A text is split at line ends, 90/5/5{one}"
            )
    return tokens


def tokens_of(text, vocab_size):
    """The ids of a text, (N,) uint16, from the file made of this very text earlier or made now.

    The file's name says what it was made from. It begins with the sha256, 32 bytes, of its name and its ids,
    which follow, little-endian."""
    source = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    path = cache_dir() / "tokens" / f"{tokenizer_name(vocab_size)}-{source}.bin"
    seal = lambda ids: hashlib.sha256(path.name.encode() + ids).digest()
    with lock(Path(f"{path}.lock")):
        raw = path.read_bytes() if path.exists() else b""
        if raw[:32] != seal(raw[32:]):
            if path.exists():
                print(f"{path} is damaged: tokenising again", file=sys.stderr)
            ids = encode(text, vocab_size).astype("<u2").tobytes()
            raw = seal(ids) + ids
            with replacing(path) as f:
                f.write(raw)
    return np.frombuffer(raw, "<u2", offset=32)


# ----- Batches -----


@functools.lru_cache(maxsize=8)
def _order(windows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(windows)


def batch(tokens, block_size, rows, step, seed):
    """Inputs and targets of a step: two int64 tensors of shape (rows, T), T = block_size.

    The split is cut into windows of T + 1 tokens that overlap by one; every window is drawn once an epoch."""
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
