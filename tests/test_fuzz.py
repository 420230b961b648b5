"""Damaged files. Thousands of seeded mutations of a good small file per reader: each must end in a ValueError
that names the file, or in exactly what the good file holds. `pytest -s tests/test_fuzz.py` prints the counts.
"""

import contextlib
import io
import shutil
import signal
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES

import data
import model

with contextlib.suppress(ImportError):  # Windows
    import resource


def mutate(rng, good):
    """One damage of a file's bytes: what disks, transfers and editors do. Never the good bytes again."""
    kind = rng.choice(["bit", "byte", "cut", "insert", "delete", "zeros", "noise", "repeat"])
    # half of the damage is done to the first or the last 600 bytes: there the headers are
    low, high = [(0, len(good)), (0, min(600, len(good))), (max(0, len(good) - 600), len(good))][
        rng.choice(3, p=[0.5, 0.25, 0.25])
    ]
    at, size = int(rng.integers(low, high)), int(2 ** rng.uniform(0, 9))
    bad = bytearray(good)
    if kind == "bit":
        bad[at] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        bad[at] = int(rng.integers(256))
    elif kind == "cut":
        del bad[at:]
    elif kind == "insert":
        bad[at:at] = rng.bytes(size)
    elif kind == "delete":
        del bad[at : at + size]
    elif kind == "zeros":
        bad[at : at + size] = bytes(len(bad[at : at + size]))
    elif kind == "noise":
        bad[at : at + size] = rng.bytes(len(bad[at : at + size]))
    elif kind == "repeat":  # a block of the file itself, in the wrong place
        source = int(rng.integers(len(good)))
        bad[at : at + size] = good[source : source + len(bad[at : at + size])]
    return bytes(bad) if bad != good else mutate(rng, good)


@contextlib.contextmanager
def bounded(gigabytes=1):
    """Let an allocation of more than this raise MemoryError, where the system can."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        old = resource.getrlimit(resource.RLIMIT_AS)
    except (OSError, NameError):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + gigabytes * 2**30, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def attempt(path, read, also=()):
    """Read a damaged file within ten seconds: the result, or None if it is refused by name."""
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{path.name}: reading it takes for ever"))
        signal.alarm(10)
    try:
        return read()
    except ValueError as e:
        assert any(name in str(e) for name in (path.name, *also)), f"does not name {path.name}: {e}"
        return None
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)


def fuzz(path, read, mutations, seed, mutate=mutate, also=(), other=False):
    """Try `mutations` damages of the file at `path`; count what read() makes of them. `other`: a damaged
    file may also say something else that is valid."""
    good, expected, tally = path.read_bytes(), as_bytes(read()), Counter()
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy and zipfile may warn before they refuse
        for case in range(mutations):
            path.unlink()  # a new file: what was mapped from the old one stays, and it is faster
            path.write_bytes(mutate(np.random.default_rng([seed, case]), good))
            try:
                result = attempt(path, read, also)
            except Exception as e:
                raise AssertionError(f"seed {seed}, case {case}: {type(e).__name__}: {e}") from e
            same = result is not None and as_bytes(result) == expected
            tally["refused" if result is None else "unharmed" if same else "other"] += 1
            assert result is None or same or other, f"seed {seed}, case {case}: a wrong result"
    path.write_bytes(good)
    assert as_bytes(read()) == expected
    assert sum(tally.values()) == mutations and tally["refused"] > mutations // 4
    print(f"\n{path.name:32}{mutations:6,} mutations", *(f"{n:6,} {word}" for word, n in tally.items()))
    return tally


def as_bytes(value):
    """Nested dicts, lists, tuples, tensors and arrays as one comparable value: equal means bitwise equal."""
    if isinstance(value, dict):
        return [(key, as_bytes(v)) for key, v in sorted(value.items(), key=lambda item: str(item[0]))]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(as_bytes, value)]
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return repr(value)


def tiny_openai(tmp_path):
    return Path(shutil.copytree(FIXTURES / "tiny-openai", tmp_path / "openai"))


def tiny_export(tmp_path):
    torch.manual_seed(0)
    model.GPT(model.GPTConfig(257, 8, 2, 8, (0, 1))).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def weights(folder):
    return {name: p.detach() for name, p in model.GPT.from_pretrained(folder).named_parameters()}


def shape(folder):
    """What the folder's hparams.json or config.json says, and that the weights agree or are refused."""
    config = model.read_config(folder)
    assert 0 < config.n_layer < 10_000 and config.n_embd % config.n_head == 0
    if config.n_layer <= 10:  # thousands of layers, even without memory, take too long to build here
        weights(folder)
    return repr(config)


def openai_arrays(folder):
    return {name: np.array(a) for name, a in model.read_openai_checkpoint(folder).items()}


def test_openai_index(tmp_path):
    """A damaged index must never lead to a tensor from the wrong place: its blocks carry checksums."""
    folder = tiny_openai(tmp_path)
    fuzz(folder / model.INDEX, lambda: openai_arrays(folder), 3000, 1)


def sign(index):
    """Make the checksum of a small index's data block right: the metaindex block follows its trailer."""
    end = model.varint(io.BytesIO(index[-48:])) - 5
    c = model.crc32c(index[: end + 1])
    crc = ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return index[: end + 1] + crc.to_bytes(4, "little") + index[end + 5 :]


def test_openai_index_with_valid_checksums(tmp_path):
    """An index that somebody else's program wrote may hold anything: no other exception even then."""
    folder = tiny_openai(tmp_path)

    def mutate_and_sign(rng, good):
        bad = bytearray(good)
        size = int(rng.choice([1, 8]))
        at = int(rng.integers(model.varint(io.BytesIO(good[-48:])) - 5 - size))
        bad[at : at + size] = rng.bytes(size)
        return sign(bytes(bad))

    fuzz(
        folder / model.INDEX,
        lambda: openai_arrays(folder),
        2000,
        2,
        mutate_and_sign,
        (model.DATA,),
        other=True,
    )


ENTRY = "08 01 12 04 12 02 08"  # a variable's dtype and shape {dim {size ...}}, in every index
BAD_ENTRIES = {
    "a number without end": "08 01 12 04 12 02 08 ff",
    "a group": "08 01 12 04 12 02 0b",
    "four bytes of which one is there": "08 01 12 04 12 02 0d",
    "a shape that is a number": "08 01 10 04 12 02 08",
    "a dim that is a number": "08 01 12 04 10 02 08",
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_openai_index_with_bad_entry(tmp_path, name):
    """Found by the test above: IndexError, struct.error, TypeError, and no name of the file."""
    folder = tiny_openai(tmp_path)
    good, bad = (folder / model.INDEX).read_bytes(), bytes.fromhex(BAD_ENTRIES[name])
    at = good.index(bytes.fromhex(ENTRY))
    (folder / model.INDEX).write_bytes(sign(good[:at] + bad + good[at + len(bad) :]))
    with pytest.raises(data.UserError, match=model.INDEX):
        model.read_openai_checkpoint(folder)


def test_openai_data_length(tmp_path):
    """A file of weights that is too short or too long must be refused, at every length."""
    folder = tiny_openai(tmp_path)
    path, good = folder / model.DATA, (folder / model.DATA).read_bytes()

    def resize(rng, good):
        size = int(rng.integers(0, 2 * len(good)))
        return (good * 2)[: size + (size == len(good))]

    assert fuzz(path, lambda: openai_arrays(folder), 1000, 3, resize)["refused"] == 1000
    for size in (0, 1, len(good) - 1, len(good) + 1):  # the nearest misses
        path.write_bytes((good * 2)[:size])
        with pytest.raises(ValueError, match=path.name):
            model.read_openai_checkpoint(folder)


def test_safetensors(tmp_path):
    """Our exports carry the sha256 of their tensors: a damaged one is refused or gives the same weights."""
    folder = tiny_export(tmp_path)
    fuzz(folder / "model.safetensors", lambda: weights(folder), 2000, 4)


def test_safetensors_length_without_checksum(tmp_path):
    """Files of others carry no checksum, but any length other than the header's must be refused."""
    folder = tiny_export(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha999"'))
    good, header = path.read_bytes(), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for size in (header, len(good) - 1, len(good) + 1, len(good) + 999, *range(0, len(good), 50)):
        path.write_bytes((good * 2)[:size])
        with pytest.raises(ValueError, match=path.name):
            weights(folder)


def test_safetensors_header(tmp_path):
    """The header is JSON, whose damage is often still JSON: whatever it then says, no wrong tensor."""
    folder = tiny_export(tmp_path)

    def mutate_header(rng, good):
        length = int.from_bytes(good[:8], "little")
        header = mutate_json(rng, good[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + good[8 + length :]

    fuzz(folder / "model.safetensors", lambda: weights(folder), 2000, 5, mutate_header)


def mutate_json(rng, good):
    """Replace one value, key or number of a JSON text by another kind of thing: still JSON, mostly."""
    odd = [
        b"null",
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"[]",
        b"{}",
        b'"x"',
        b"true",
        b"9" * 30,
        b"1.5",
        b"9" * 5000,
    ]
    starts = [i for i in range(len(good)) if good[i] in b'"0123456789[{' and good[i - 1] in b' ":[{,']
    at = int(rng.choice(starts))
    ends = [i for i in range(at + 1, len(good)) if good[i] in b',]}":'][:3] or [len(good)]
    bad = good[:at] + odd[rng.integers(len(odd))] + good[int(rng.choice(ends)) :]
    return bad if bad != good else mutate_json(rng, good)


@pytest.mark.parametrize("mutation", [mutate, mutate_json])
def test_hparams(tmp_path, mutation):
    """OpenAI's hparams.json has no checksum: damage gives ValueError or another valid shape."""
    folder = tiny_openai(tmp_path)
    path, also = folder / "hparams.json", (model.INDEX, model.DATA)
    fuzz(path, lambda: shape(folder), 2000, 6, mutation, also, other=True)


@pytest.mark.parametrize("mutation", [mutate, mutate_json])
def test_config(tmp_path, mutation):
    """The same for Hugging Face's config.json, which adds the generation of each block."""
    folder = tiny_export(tmp_path)
    fuzz(folder / "config.json", lambda: shape(folder), 2000, 7, mutation, ("model.safetensors",), other=True)


def test_bin(tmp_path, monkeypatch):
    """A damaged token file must be refused (it is then made again), never trained on."""
    text = "".join(map(chr, np.random.default_rng(0).integers(0, 128, 3000)))
    monkeypatch.setattr(data, "cache_dir", lambda: tmp_path)
    data.tokens_of(text, data.BYTES)
    (path,) = (tmp_path / "tokens").glob("*.bin")

    def refuse(*args):
        raise ValueError(f"{path.name} is made again")

    monkeypatch.setattr(data, "encode", refuse)
    fuzz(path, lambda: data.tokens_of(text, data.BYTES), 5000, 8)


def save_checkpoint(path, moments):
    torch.manual_seed(0)
    state = {"step": 3, "best": float("inf"), "options": {"lr": 5e-5, "out": "out/x"}, "generation": (0, 1)}
    moments = [{"step": torch.tensor(3.0), "exp_avg": torch.randn(5, 4)} for _ in range(moments)]
    data.save_checkpoint(path, state | {"model": {"wte.weight": torch.randn(7, 4)}, "optimizer": moments})
    return path


def test_checkpoint(tmp_path):
    """A damaged ckpt.pt must be refused by name: a wrong moment or weight would show nowhere."""
    path = save_checkpoint(tmp_path / "ckpt.pt", 3)
    fuzz(path, lambda: data.load_checkpoint(path), 3000, 10)


def test_checkpoint_directory(tmp_path):
    """No bit of the zip's directory, which has no checksum, may lead to another tensor: all are tried."""
    path = save_checkpoint(tmp_path / "ckpt.pt", 0)
    good, bits = path.read_bytes(), iter(range(10**9))
    first = good.index(b"PK\1\2")

    def flip_next(rng, good):
        byte, bit = divmod(next(bits), 8)
        return good[: first + byte] + bytes([good[first + byte] ^ 1 << bit]) + good[first + byte + 1 :]

    fuzz(path, lambda: data.load_checkpoint(path), 8 * (len(good) - first), 11, flip_next)


def test_checkpoint_marked_as_folders(tmp_path):
    """Found by the fuzz: one bit that marks an entry as a folder made torch return uninitialised memory."""
    path = save_checkpoint(tmp_path / "ckpt.pt", 3)
    good = path.read_bytes()
    entries = [i for i in range(len(good)) if good[i : i + 4] == b"PK\1\2"]
    assert len(entries) > 7
    for entry in entries:
        path.write_bytes(good[: entry + 38] + b"\x10" + good[entry + 39 :])  # its external attributes
        with pytest.raises(data.UserError, match="ckpt.pt"):
            data.load_checkpoint(path)
