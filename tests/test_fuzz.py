"""Damaged files. Seeded mutations of a good small file per reader: each must end in a ValueError that names
the file, or in exactly what the good file holds. `pytest -s tests/test_fuzz.py` prints the counts."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BYTES, FIXTURES, tiny_gpt

import data
import model

pytestmark = pytest.mark.filterwarnings("ignore")  # numpy and zipfile may warn before they refuse


def mutate(rng, good):
    """One damage of a file's bytes: what disks, transfers and editors do. Never the good bytes again."""
    # half of the damage is done to the first or the last 600 bytes: there the headers are
    size, ends = len(good), min(600, len(good))
    low, high = [(0, size), (0, ends), (size - ends, size)][rng.choice(3, p=[0.5, 0.25, 0.25])]
    at, length = int(rng.integers(low, high)), int(2 ** rng.uniform(0, 9))
    source = int(rng.integers(size))
    there = good[at : at + length]
    new = {
        "bit": bytes([good[at] ^ 1 << int(rng.integers(8))]) + there[1:],
        "byte": rng.bytes(1) + there[1:],
        "cut": None,
        "insert": rng.bytes(length) + there,
        "delete": b"",
        "zeros": bytes(len(there)),
        "noise": rng.bytes(len(there)),
        "repeat": good[source : source + len(there)],  # a part of the file itself, in the wrong place
    }[rng.choice(["bit", "byte", "cut", "insert", "delete", "zeros", "noise", "repeat"])]
    bad = good[:at] if new is None else good[:at] + new + good[at + length :]
    return bad if bad != good else mutate(rng, good)


def mutate_json(rng, good):
    """Replace one value, key or number of a JSON text by another kind of thing: still JSON, mostly."""
    odd = 'null -1 0 1e999 NaN [] {} "x" true 1.5'.split() + ["9" * 30, "9" * 5000]
    starts = [i for i in range(len(good)) if good[i] in b'"0123456789[{' and good[i - 1] in b' ":[{,']
    at = int(rng.choice(starts))
    ends = [i for i in range(at + 1, len(good)) if good[i] in b',]}":'][:3] or [len(good)]
    bad = good[:at] + odd[rng.integers(len(odd))].encode() + good[int(rng.choice(ends)) :]
    return bad if bad != good else mutate_json(rng, good)


def mutate_header(rng, good):
    """The same in the header of a safetensors file."""
    end = 8 + int.from_bytes(good[:8], "little")
    header = mutate_json(rng, good[8:end])
    return len(header).to_bytes(8, "little") + header + good[end:]


def fuzz(path, read, mutations, seed, mutate=mutate, errors=ValueError):
    """Try `mutations` damages of the file at `path`, and count what read() makes of them. A ValueError must
    name the file; where `errors` are wider, any of them refuses, but never for want of memory."""
    good, expected, tally = path.read_bytes(), as_bytes(read()), Counter()
    for case in range(mutations):
        path.unlink()  # a new file: what was mapped from the old one stays
        path.write_bytes(mutate(np.random.default_rng([seed, case]), good))
        try:
            result = read()
        except errors as e:
            named = errors is not ValueError or path.name in str(e)
            assert named and not isinstance(e, MemoryError), f"seed {seed}, case {case}: {e!r}"
            tally["refused"] += 1
        else:
            assert as_bytes(result) == expected, f"seed {seed}, case {case}: a wrong result"
            tally["unharmed"] += 1
    path.write_bytes(good)
    assert as_bytes(read()) == expected
    assert tally["refused"] > mutations // 4
    print(f"\n{path.name:32}{mutations:6,} mutations", *(f"{n:6,} {word}" for word, n in tally.items()))


def as_bytes(value):
    """Nested dicts, lists, tuples and tensors as one comparable value: equal means bitwise equal."""
    if isinstance(value, dict):
        return [(key, as_bytes(v)) for key, v in sorted(value.items(), key=lambda item: str(item[0]))]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(as_bytes, value)]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
    return repr(value)


def openai(tmp_path):
    return Path(shutil.copytree(FIXTURES / "tiny-openai", tmp_path / "openai"))


def export(tmp_path):
    tiny_gpt((1,), BYTES).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def weights(folder):
    return dict(model.GPT.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize("mutation", [mutate, mutate_header])
def test_safetensors(tmp_path, mutation):
    """Our exports carry the sha256 of their tensors: whatever header or tensors then say, no wrong tensor."""
    folder = export(tmp_path)
    fuzz(folder / "model.safetensors", lambda: weights(folder), 300, 1, mutation)


@pytest.mark.parametrize("kind", [openai, export])
def test_length_without_a_checksum(tmp_path, kind):
    """OpenAI's files, and exports of others, carry no checksum: any other length must be refused."""
    folder = kind(tmp_path)
    path = folder / (model.DATA if kind is openai else "model.safetensors")
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha999"'))
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little") if kind is export else 4
    near = (0, 1, header, len(good) - 4, len(good) - 1, len(good) + 1, len(good) + 4, 2 * len(good))
    for size in (*near, *range(0, len(good), 1000)):
        path.write_bytes((good * 2)[:size])
        with pytest.raises(ValueError, match=path.name):
            weights(folder)
    path.write_bytes(good)
    weights(folder)


@pytest.mark.parametrize("mutation", [mutate, mutate_json])
@pytest.mark.parametrize("kind, name", [(openai, "hparams.json"), (export, "config.json")])
def test_shape_files(tmp_path, kind, name, mutation):
    """They have no checksum: a shape that is not that of the weights ends in an error, not in others."""
    folder = kind(tmp_path)
    fuzz(folder / name, lambda: weights(folder), 200, 2, mutation, errors=Exception)


def save_checkpoint(path, moments):
    torch.manual_seed(0)
    state = {"step": 3, "best": float("inf"), "log": [{"kind": "header", "lr": 5e-5}], "generation": (0, 1)}
    moments = [{"step": torch.tensor(3.0), "exp_avg": torch.randn(5, 4)} for _ in range(moments)]
    data.save_checkpoint(path, state | {"model": {"wte.weight": torch.randn(7, 4)}, "optimizer": moments})
    return path


def test_checkpoint(tmp_path):
    """A damaged ckpt.pt must be refused by name: a wrong moment or weight would show nowhere."""
    path = save_checkpoint(tmp_path / "ckpt.pt", 3)
    fuzz(path, lambda: data.load_checkpoint(path), 1000, 3)


def test_checkpoint_directory(tmp_path):
    """No bit of the zip's directory, which has no checksum, may lead to another tensor: all are tried. (One
    that marks an entry as a folder made torch return uninitialised memory.)"""
    path = save_checkpoint(tmp_path / "ckpt.pt", 0)
    good, bits = path.read_bytes(), iter(range(10**9))
    first = good.index(b"PK\1\2")

    def flip_next(rng, good):
        byte, bit = divmod(next(bits), 8)
        return good[: first + byte] + bytes([good[first + byte] ^ 1 << bit]) + good[first + byte + 1 :]

    fuzz(path, lambda: data.load_checkpoint(path), 8 * (len(good) - first), 4, flip_next)
