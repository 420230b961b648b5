"""GPT-2 in one file: the network, OpenAI's checkpoint in, Hugging Face's format out and in, sampling.

The network is that of "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019): pre-LN
blocks, tanh GELU, learned positions, output head tied to the token embedding. The names (wte, wpe, h,
ln_1, attn.c_attn ...) are OpenAI's, so weights map by name. It has two additions: `GPTConfig.generation`
says of each block which growth inserted it, `GPTConfig.versions` which finished networks are still inside.

    model = GPT.from_pretrained("gpt2")
    logits, loss = model(idx, targets)
"""

import hashlib
import io
import json
import math
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import UserError

# ----- The network. Shapes: B rows, T tokens a row, C = n_embd channels, V = vocab_size. -----


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # positions: the longest context, in tokens
    n_head: int = 12
    n_embd: int = 768
    generation: tuple = (0,) * 12  # per block: 0 = pretrained, k = inserted by the k-th growth of its life
    dropout: float = 0.0
    versions: tuple = None  # newest generation of each finished network inside; None: of this one alone

    @property
    def n_layer(self):
        return len(self.generation)

    def __post_init__(self):
        self.generation = tuple(self.generation)
        for name in ("vocab_size", "block_size", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**24:
                raise UserError(f"{name} must be a positive whole number, not {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if not all(type(g) is int and g >= 0 for g in self.generation):
            raise UserError("generation must hold one whole number >= 0 per block")
        newest = max(self.generation, default=0)
        self.versions = (newest,) if self.versions is None else tuple(self.versions)
        known = all(type(g) is int and g in (self.generation or (0,)) for g in self.versions)
        if not self.versions or not known or sorted(set(self.versions)) != list(self.versions):
            raise UserError(f"versions must be rising generations that its blocks have, not {self.versions}")


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        if cache is not None:  # decoding: T is the prompt at first, then 1, so a causal mask is right or moot
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = k, v
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=p)  # (B, H, T, C/H)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), p)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """x + attention + MLP. With both c_proj zero it returns x, bit for bit: that is how a network grows."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in config.generation)
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            init_parameter(name, p, config.n_layer)

    def embed(self, idx, start=0):
        """Token ids (B, T) at positions start, start + 1, ... -> (B, T, C)."""
        position = torch.arange(start, start + idx.size(1), device=idx.device)
        return F.dropout(self.wte(idx) + self.wpe(position), self.config.dropout, self.training)

    def run(self, x, start=0, stop=None):
        """Pass x (B, T, C) through blocks start, ..., stop - 1."""
        for block in list(self.h)[start:stop]:
            x = block(x)
        return x

    def head(self, x):
        """(B, T, C) -> logits (B, T, V). The output matrix is the token embedding."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, idx, targets=None):
        """idx (B, T), targets (B, T) or None -> logits (B, T, V), mean loss in nats per target or None."""
        if idx.size(1) > self.config.block_size:
            raise UserError(f"{idx.size(1)} tokens exceed the model's block_size of {self.config.block_size}")
        logits = self.head(self.run(self.embed(idx)))
        if targets is None:
            return logits, None
        return logits, cross_entropy(logits, targets).sum() / (targets >= 0).sum()

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, next_logits=None):
        """Continue each row of idx (B, T) by up to max_new_tokens sampled ids; returns (B, T + new).

        Temperature 0 takes the most likely id; top_k samples among the k most likely. A row that has ended
        (with <|endoftext|>, the last id) repeats it. Contexts are cropped on the left to block_size.
        `next_logits`, a function from ids (B, T) to logits (B, V), takes the place of the network's own."""
        if idx.size(1) == 0:
            raise UserError("the prompt is empty: give at least one token")
        if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
            raise UserError("temperature must be at least 0 and top_k at least 1")
        eot = self.config.vocab_size - 1
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        cache, was_training = None, self.training
        self.eval()
        with torch.compiler.set_stance("force_eager"):  # every length is a new shape: do not compile for each
            for _ in range(max_new_tokens):
                seen = idx.size(1)
                if cache is None or seen > self.config.block_size:  # a cropped window moves every position
                    cache = [[] for _ in self.h]
                logits = next_logits(idx) if next_logits else self.predict(idx, cache)
                chosen = sample(logits, temperature, top_k, generator).to(idx.device)  # (B, 1)
                chosen = torch.where(done, eot, chosen)
                idx = torch.cat([idx, chosen], 1)
                done |= chosen == eot
                if done.all():
                    break
        self.train(was_training)
        return idx

    def predict(self, idx, cache):
        """Logits (B, V) of what follows idx (B, T). What the cache [[keys, values] of each block] holds of
        idx is not computed again."""
        seen = idx.size(1) - 1 if any(cache) else 0
        x = self.embed(idx[:, seen:][:, -self.config.block_size :], start=seen)
        for block, kv in zip(self.h, cache):
            x = block(x, kv)
        return self.head(x[:, -1]).float()

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with OpenAI's or Hugging Face's files.

        Raises UserError (a ValueError) that names the file and its fault, OSError if one cannot be read."""
        config = replace(read_config(name_or_folder), dropout=dropout)
        folder = fetch_gpt2(name_or_folder) if name_or_folder in SIZES else Path(name_or_folder).absolute()
        with torch.device("meta"):  # shapes only: no memory and no random numbers for what is about to come
            model = cls(config)
        if (folder / "hparams.json").exists():
            assign_weights(model, read_openai_weights(folder, model), folder / INDEX)
        else:
            assign_weights(model, read_huggingface_weights(folder), folder / "model.safetensors")
        return model

    def save_pretrained(self, folder, card=None):
        """Write Hugging Face's format: GPT2LMHeadModel and AutoTokenizer load it, from_pretrained too.

        `card` is the text of its README.md. The folder is complete or not there: it is written aside, then
        renamed."""
        folder = Path(folder)
        aside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        save_huggingface(self, aside)
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)


def init_parameter(name, p, n_layer):
    """GPT-2's: N(0, 0.02), output projections scaled by 1/sqrt(2 n_layer), biases 0, gains 1."""
    if p.dim() == 2:
        nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02)
    else:
        nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)


def cross_entropy(logits, targets):
    """Nats per token in float32, shaped as targets (...), 0 where the target is -1."""
    logits = logits.float().flatten(0, -2)  # (N, V)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
    return loss.view(targets.shape)


def sample(logits, temperature, top_k, generator=None):
    """Next ids (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)


# ----- Weights from a file: both formats hold the tensors raw, one after the other -----


def map_tensors(path, tensors, start=0):
    """{name: array}, mapped from the file, unread. tensors: (begin, end, name, dtype, shape), in bytes from
    `start` on, where they must fill the file without gap or overlap: else ValueError."""
    arrays, last, size = {}, 0, path.stat().st_size - start
    for begin, end, name, dtype, shape in sorted(tensors, key=lambda tensor: tensor[0]):
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        if not whole or begin != last or end - begin != dtype.itemsize * math.prod(shape) or end > size:
            raise ValueError(f"{name} does not lie where the tensor before it ends, inside the file")
        if end > begin:
            arrays[name] = np.memmap(path, dtype, "c", start + begin, tuple(shape))
        last = end
    if last != size:
        raise ValueError(f"the tensors have {last:,} bytes, and the file has {size:,} for them")
    return arrays


def assign_weights(model, arrays, source):
    """Give a model without memory (on "meta") its weights: every tensor must be there and none left over.

    Both formats store the weight of a linear layer as (in, out); nn.Linear has it as (out, in)."""
    shapes = {n: tuple(p.shape[::-1] if is_linear(n) else p.shape) for n, p in model.named_parameters()}
    for name in sorted(shapes.keys() | arrays.keys()):
        found = tuple(arrays[name].shape) if name in arrays else "missing"
        expected = shapes.get(name, "no such tensor")
        if found != expected:
            raise UserError(f"{source}: tensor {name}: {found}, where the model has {expected}")

    def copy(name, array):  # never the mapped file itself: it may go away
        tensor = torch.from_numpy(array if array.flags.aligned else np.array(array))
        tensor = tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
        tensor = tensor.t() if is_linear(name) else tensor
        return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    # pop: what is copied is unmapped, so that memory never holds a network twice
    with ThreadPoolExecutor() as pool:
        tensors = pool.map(lambda name: copy(name, arrays.pop(name)), shapes)
        model.load_state_dict(dict(zip(shapes, tensors)), assign=True)


def is_linear(name):
    return name.endswith(".weight") and ".c_" in name


# ----- OpenAI's checkpoint -----
# A TensorFlow "tensor bundle": model.ckpt.data-00000-of-00001 holds the tensors, and
# model.ckpt.index, a LevelDB-style table of serialised BundleEntryProto messages, says where.
# (tensorflow/core/util/tensor_bundle, .../core/protobuf/tensor_bundle.proto, leveldb/doc/table_format.md)

INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"


def read_openai_weights(folder, model):
    """{our name: array}. A linear layer's weight lies in the file as (1, in, out)."""
    ours = {openai_name(name): name for name, _ in model.named_parameters()}
    arrays = {ours.get(name, name): a for name, a in read_openai_checkpoint(folder).items()}
    return {name: a[0] if is_linear(name) and a.ndim == 3 else a for name, a in arrays.items()}


def openai_name(name):
    """h.0.attn.c_attn.weight -> model/h0/attn/c_attn/w"""
    *path, last = ("model." + name).replace(".h.", ".h").split(".")
    if path[-1] in ("wte", "wpe"):
        return "/".join(path)
    return "/".join(path + ["b" if last == "bias" else "g" if path[-1].startswith("ln_") else "w"])


def read_openai_checkpoint(folder):
    """{variable name: float32 array}, mapped from the file, unread. Raises UserError on any damage."""
    index, path = Path(folder) / INDEX, Path(folder) / DATA
    try:
        table = read_table(index.read_bytes())
        header = table.pop("", {})
        if header.get(1) != 1 or 2 in header:
            raise ValueError("it does not describe one little-endian file")
        return map_tensors(path, [tensor_place(name, entry) for name, entry in table.items()])
    except (ValueError, LookupError, TypeError, OverflowError, struct.error) as e:
        raise UserError(f"{index}: damaged, or no index of float32 tensors in {path.name} ({e})") from e


def tensor_place(name, entry):
    """From a BundleEntryProto: 1 type, 2 shape, 3 file, 4 offset, 5 size, 7 slices; zeros are left out."""
    if entry.get(1) != 1 or 3 in entry or 7 in entry:
        raise ValueError(f"{name} is not a whole float32 tensor")
    dims = [dict(protobuf(dim)) for field, dim in protobuf(entry.get(2, b"")) if field == 2]
    begin, size = entry.get(4, 0), entry.get(5, 0)
    return begin, begin + size, name, np.dtype("<f4"), [dim.get(1, 0) for dim in dims]


def read_table(raw):
    """{key: {field number: value}} of a TensorFlow index file's bytes."""
    if len(raw) < 48 or raw[-8:] != bytes.fromhex("57fb808b247547db"):
        raise ValueError("no table magic at the end")
    footer = io.BytesIO(raw[-48:])
    _, _, offset, size = (varint(footer) for _ in range(4))  # of the metaindex (empty here) and the index
    table = {}
    for _, place in table_entries(raw, offset, size):
        f = io.BytesIO(place)
        for key, message in table_entries(raw, varint(f), varint(f)):
            table[key.decode()] = dict(protobuf(message))
    return table


def table_entries(raw, offset, size):
    """(key, value) pairs of a block. Behind it stand a compression type and a masked CRC-32C of both."""
    block = raw[offset : offset + size + 5]
    kind, crc = struct.unpack("<BI", block[size:])
    c = crc32c(block[:-4])
    if kind != 0 or ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF != crc:
        raise ValueError("a block is compressed, or its checksum is wrong")
    restarts = struct.unpack("<I", block[size - 4 : size])[0]  # at the end; they only help seeks
    f, key = io.BytesIO(block), b""
    while f.tell() < size - 4 * (restarts + 1):
        shared, unshared, length = varint(f), varint(f), varint(f)
        key = key[:shared] + f.read(unshared)  # a key shares a prefix with the one before
        yield key, f.read(length)


def protobuf(raw):
    """(field number, value) pairs of a serialised message: numbers (wire types 0, 5) and bytes (type 2)."""
    f = io.BytesIO(raw)
    while f.tell() < len(raw):
        tag = varint(f)
        if tag & 7 == 0:
            yield tag >> 3, varint(f)
        elif tag & 7 == 2:
            yield tag >> 3, f.read(varint(f))
        elif tag & 7 == 5:
            yield tag >> 3, struct.unpack("<I", f.read(4))[0]
        else:
            raise ValueError(f"unknown wire type {tag & 7}")


def varint(f):
    """A number from a stream of bytes: seven bits in each, the lowest first, until one is below 128."""
    value, shift, byte = 0, 0, 128
    while byte >= 128:
        byte = f.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
    return value


def crc32c(raw):
    crc = 0xFFFFFFFF
    for byte in raw:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# ----- Hugging Face's format -----
# config.json, and model.safetensors: 8 bytes that hold a length N, N bytes of JSON, the tensors.

# What config.json must say of these, if it names them: any other value is another architecture.
FIXED = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5)
FIXED |= dict(tie_word_embeddings=True, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: these are its bits
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which some files carry among the weights
MASK_DTYPES = DTYPES | {"U8": "u1", "BOOL": "?"}


def read_safetensors(path):
    """{name: array}, mapped from the file. Raises UserError on any damage that it can see: our own exports
    carry the sha256 of their tensors, other files have no checksum."""
    try:
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if start > min(path.stat().st_size, 100_000_000):
                raise ValueError("its header reaches past the end")
            header = json.loads(f.read(start - 8))
            metadata = header.pop("__metadata__", {})
            if "sha256" in metadata and metadata["sha256"] != hashlib.file_digest(f, "sha256").hexdigest():
                raise ValueError("its tensors do not have the sha256 that its header gives")
        tensors = []
        for name, t in header.items():
            dtype, known = t["dtype"], MASK_DTYPES if name.endswith(MASKS) else DTYPES
            if dtype not in known:
                raise UserError(f"{path}: {name} is stored as {dtype}: convert it to {' or '.join(DTYPES)}")
            tensors.append((*t["data_offsets"], name, np.dtype(known[dtype]), t["shape"]))
        return map_tensors(path, tensors, start)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: damaged ({e})") from e


def read_huggingface_weights(folder):
    """{our name: array}: without the prefix, the masks and the second copy of wte that some files carry."""
    arrays = read_safetensors(folder / "model.safetensors")
    arrays = {name.removeprefix("transformer."): a for name, a in arrays.items() if not name.endswith(MASKS)}
    head = arrays.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(head, arrays.get("wte.weight", head)):
        raise UserError(f"{folder}: lm_head.weight is not wte.weight, and GPT-2 has one matrix for both")
    return arrays


def save_huggingface(model, folder):
    c, end_of_text = model.config, model.config.vocab_size - 1
    folder.mkdir(parents=True, exist_ok=True)

    def tensors():
        for name, p in model.named_parameters():
            p = p.detach().float().cpu()
            yield name, (p.t() if is_linear(name) else p).contiguous().numpy().astype("<f4", copy=False)

    header, digest, end = {}, hashlib.sha256(), 0
    for name, array in tensors():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        digest.update(array)
        end += array.nbytes
    header["__metadata__"] = {"format": "pt", "sha256": digest.hexdigest()}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for _, array in tensors():
            f.write(array)

    if c.vocab_size == data.GPT2:  # Hugging Face's names for OpenAI's two tokenizer files
        files = data.tokenizer_files()
        (folder / "vocab.json").write_bytes(files["encoder.json"].read_bytes())
        (folder / "merges.txt").write_bytes(files["vocab.bpe"].read_bytes())
        special = {f"{kind}_token": data.EOT for kind in ("bos", "eos", "unk")}
        tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    config = FIXED | {
        "architectures": ["GPT2LMHeadModel"], "torch_dtype": "float32", "generation": c.generation,
        "versions": c.versions, "vocab_size": c.vocab_size, "n_positions": c.block_size,
        "n_ctx": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
        "bos_token_id": end_of_text, "eos_token_id": end_of_text,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))


# ----- Where the weights are, and a model's shape, which is known before they are read -----

OPENAI_URLS = [
    "https://openaipublic.blob.core.windows.net/gpt-2/models/{size}/{file}",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/{size}/{file}",
]
HUGGINGFACE_URL = "https://huggingface.co/openai-community/{name}/resolve/{revision}/{file}"
SHAPE_FILES = {
    "hparams.json": ("n_vocab", "n_ctx", "n_head", "n_embd", "n_layer"),
    "config.json": ("vocab_size", "n_positions", "n_head", "n_embd", "n_layer"),
}
# name: OpenAI's size, layers, width, heads, bytes of index and data; Hugging Face's revision, bytes, sha256
SIZES = {
    "gpt2": ("124M", 12, 768, 12, 5_215, 497_759_232, "607a30d783dfa663caf39e06633721c8d4cfcd7e",
             548_105_171, "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("355M", 24, 1024, 16, 10_399, 1_419_292_672, "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    1_519_984_962, "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("774M", 36, 1280, 20, 15_535, 3_096_120_320, "32b71b12589c2f8d625668d2335a01cac3249519",
                   3_247_159_078, "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": ("1558M", 48, 1600, 25, 20_724, 6_230_444_800, "15ea56dee5df4983c59b2538573817e1667135e2",
                None, "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}  # fmt: skip
SHA256_124M = {  # of the larger sizes none is published, and the exact number of bytes is checked
    INDEX: "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    DATA: "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
}


def read_config(name_or_folder):
    """GPTConfig of what from_pretrained would load. Raises UserError."""
    if name_or_folder in SIZES:
        _, n_layer, n_embd, n_head, *_ = SIZES[name_or_folder]
        return GPTConfig(n_head=n_head, n_embd=n_embd, generation=(0,) * n_layer)
    folder = Path(name_or_folder).absolute()
    path = next((folder / file for file in SHAPE_FILES if (folder / file).exists()), None)
    if path is None and (folder / "model" / "config.json").exists():
        raise UserError(f"{folder} is a run: did you mean its network, {Path(name_or_folder) / 'model'}?")
    if path is None:
        raise UserError(
            f"no model in {folder}: give one of {', '.join(SIZES)}, a folder with OpenAI's hparams.json and "
            "model.ckpt files, or one with config.json and model.safetensors"
        )
    try:
        h = dict(json.loads(path.read_bytes()))
        for key, value in FIXED.items():
            if h.get(key, value) != value:
                raise UserError(f"{key} is {h[key]!r}, another architecture: give one with {value!r}")
        vocab_size, block_size, n_head, n_embd, n_layer = (h[key] for key in SHAPE_FILES[path.name])
        if type(n_layer) is not int or not 0 < n_layer < 1000:
            raise UserError(f"n_layer must be a whole number from 1 to 999, not {n_layer!r}")
        generation = h.get("generation", [0] * n_layer)
        if type(generation) is not list or len(generation) != n_layer:
            raise UserError(f"generation must hold one number for each of {n_layer} layers")
        config = GPTConfig(vocab_size, block_size, n_head, n_embd, generation, versions=h.get("versions"))
        config.versions = tuple(sorted({*config.versions, max(generation)}))  # a file's network is finished
        return config
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except KeyError as e:
        raise UserError(f"{path} lacks {e}: add it, or give the folder of a GPT-2") from e
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: damaged ({e})") from e


def fetch_gpt2(name):
    """A folder with the pretrained weights: OpenAI's files, from it or a mirror, or Hugging Face's copy."""
    size, n_layer, n_embd, n_head, index_bytes, data_bytes, revision, hf_bytes, hf_sha256 = SIZES[name]
    openai, huggingface = data.cache_dir() / f"gpt2-{size}", data.cache_dir() / f"huggingface-{name}"
    sha256 = {"model.safetensors": hf_sha256} | (SHA256_124M if name == "gpt2" else {})
    sources = [
        (openai, OPENAI_URLS, {INDEX: index_bytes, DATA: data_bytes}, "hparams.json"),
        (huggingface, [HUGGINGFACE_URL], {"model.safetensors": hf_bytes}, "config.json"),
    ]
    if (huggingface / "model.safetensors").exists() and not (openai / DATA).exists():
        sources.reverse()
    faults = []
    for folder, urls, files, shape_file in sources:
        try:
            for file, length in files.items():
                where = [url.format(name=name, size=size, revision=revision, file=file) for url in urls]
                data.fetch(where, folder / file, length, sha256.get(file), remedy="")
            shape = dict(zip(SHAPE_FILES[shape_file], (50257, 1024, n_head, n_embd, n_layer)))
            (folder / shape_file).write_text(json.dumps(shape))
            return folder
        except UserError as e:
            faults.append(str(e))
    raise UserError(
        f"check the network, or run `python train.py demo`, which needs none, or put {INDEX}, {DATA} into "
        f"{openai} by hand, or model.safetensors into {huggingface}: {'; '.join(faults)}"
    )
