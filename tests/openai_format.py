"""OpenAI's format for tests: write a GPT in it, so that none of OpenAI's files is needed, and read the index
in which TensorFlow says where each tensor lies. (The program reads no index: names and shapes tell it.)"""

import io
import json
import struct
from pathlib import Path

import numpy as np

from model import DATA, is_linear, openai_name


def write_openai_checkpoint(folder, model):
    """hparams.json and model.ckpt.data-00000-of-00001 from any GPT; returns the folder."""
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"n_vocab": c.vocab_size, "n_ctx": c.block_size, "n_embd": c.n_embd, "n_head": c.n_head}
    (folder / "hparams.json").write_text(json.dumps({**sizes, "n_layer": c.n_layer}))
    parameters = dict(model.named_parameters())
    with open(folder / DATA, "wb") as f:
        for name in sorted(parameters, key=lambda name: openai_name(name).encode()):
            array = parameters[name].detach().float().cpu().numpy().astype("<f4", copy=False)
            f.write(np.ascontiguousarray(array.T if is_linear(name) else array))
    return folder


def read_index(path):
    """{variable: (first byte, bytes, shape)} of a model.ckpt.index, whose checksums are not looked at.

    It is a table of BundleEntryProto messages (leveldb/doc/table_format.md, tensor_bundle.proto)."""
    raw = Path(path).read_bytes()
    footer = io.BytesIO(raw[-48:])
    _, _, start, size = (varint(footer) for _ in range(4))  # of the metaindex, which is empty, and the index
    places = {}
    for _, block in entries(raw, start, size):
        f = io.BytesIO(block)
        for key, message in entries(raw, varint(f), varint(f)):
            entry = dict(fields(message))  # 1 type, 2 shape, 4 offset, 5 size; zeros are left out
            dims = [dict(fields(dim)) for number, dim in fields(entry.get(2, b"")) if number == 2]
            if key:  # the entry without a name describes the file
                assert entry[1] == 1, f"{key} is not float32"
                places[key.decode()] = entry.get(4, 0), entry[5], tuple(dim[1] for dim in dims)
    return places


def entries(raw, start, size):
    """(key, value) pairs of a block. A key shares its beginning with the one before."""
    block, key = raw[start : start + size], b""
    restarts = struct.unpack("<I", block[-4:])[0]  # their places stand at the end; they only help seeks
    f = io.BytesIO(block)
    while f.tell() < size - 4 * (restarts + 1):
        shared, unshared, length = varint(f), varint(f), varint(f)
        key = key[:shared] + f.read(unshared)
        yield key, f.read(length)


def fields(message):
    """(field number, value) pairs of a protocol buffer: numbers, bytes, and four bytes for a checksum."""
    f = io.BytesIO(message)
    while f.tell() < len(message):
        number, wire = divmod(varint(f), 8)
        yield number, varint(f) if wire == 0 else f.read(varint(f) if wire == 2 else 4)


def varint(f):
    """A number from a stream of bytes: seven bits in each, the lowest first, until one is below 128."""
    byte = f.read(1)[0]
    return byte if byte < 128 else byte - 128 + 128 * varint(f)
