"""Write a GPT in OpenAI's format, so that tests and the benchmark need none of OpenAI's files.

The three files hold what TensorFlow's tf.train.Saver would write, but for the checksums of the tensors, which
are left out (498 MB would take minutes in Python); those of the blocks of the index are there. model.py says
what the format is.
"""

import json
import os
import struct
from pathlib import Path

import numpy as np

from model import DATA, INDEX, crc32c, is_linear, openai_name


def write_openai_checkpoint(folder, model):
    """hparams.json, model.ckpt.index and model.ckpt.data-00000-of-00001 from any GPT; returns the folder."""
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"n_vocab": c.vocab_size, "n_ctx": c.block_size, "n_embd": c.n_embd, "n_head": c.n_head}
    (folder / "hparams.json").write_text(json.dumps({**sizes, "n_layer": c.n_layer}))
    named = {openai_name(name): (name, p) for name, p in model.named_parameters()}
    header = field(1, 1) + field(3, field(1, 1))  # one shard, little-endian, version 1
    entries, offset = [(b"", header)], 0
    with open(folder / DATA, "wb") as f:
        for key in sorted(named):  # all ASCII: sorted as bytes are
            name, p = named[key]
            array = p.detach().float().cpu().numpy().astype("<f4", copy=False)
            array = np.ascontiguousarray(array.T[None] if is_linear(name) else array)  # (1, in, out)
            f.write(array)
            shape = b"".join(field(2, field(1, n)) for n in array.shape)
            entry = field(1, 1) + field(2, shape) + field(4, offset) + field(5, array.nbytes)
            entries.append((key.encode(), entry))
            offset += array.nbytes
    table = bytearray()
    entries = [(entries[-1][0], append_block(table, entries))]  # the index block: last key -> where
    footer = append_block(table, []) + append_block(table, entries)
    (folder / INDEX).write_bytes(table + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db"))
    return folder


def append_block(table, entries):
    """Append a block of (key, value) entries to the bytes `table`; return its handle, offset and size."""
    block, previous = bytearray(), b""
    for key, value in entries:
        shared = len(os.path.commonprefix([previous, key]))
        block += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    block += struct.pack("<II", 0, 1)  # one restart point, at byte 0
    handle = varint(len(table)) + varint(len(block))
    c = crc32c(block + b"\0")  # 0: not compressed
    table += block + struct.pack("<BI", 0, ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF)
    return handle


def field(number, value):
    """A field of a serialised protocol buffer; proto3 leaves zeros out."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
