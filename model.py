"""GPT-2 in one file: the network, sampling, OpenAI's checkpoint in, Hugging Face's in and out.

The network of "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019): pre-LN
blocks, tanh GELU, learned positions, output head tied to the token embedding. Names (wte, wpe, h,
ln_1, attn.c_attn ...) are OpenAI's, so weights map by name. Two additions: `GPTConfig.generation` says
which growth inserted each block, `GPTConfig.versions` which finished networks are still inside.

    model = GPT.from_pretrained("gpt2")
    logits, loss = model(idx, targets)
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import UserError, need

# ----- The network. Shapes: B rows, T tokens a row, C = n_embd channels, V = vocab_size. -----


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # positions: the longest context, in tokens
    n_head: int = 12
    n_embd: int = 768
    generation: tuple = (0,) * 12  # per block: 0 = pretrained, k = from the network's k-th growth
    dropout: float = 0.0
    versions: tuple = None  # newest generation of each finished network inside; None: only this one

    @property
    def n_layer(self):
        return len(self.generation)

    def __post_init__(self):
        self.generation = tuple(self.generation)
        self.versions = (max(self.generation),) if self.versions is None else tuple(self.versions)
        need(self.n_embd % self.n_head == 0, f"n_head={self.n_head} must divide n_embd={self.n_embd}")
        rising = sorted({*self.versions} & {*self.generation})
        known = rising and rising == list(self.versions)
        need(known, f"versions must be rising generations of its blocks, not {self.versions}")


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
        causal = not cache  # a token after what is cached may see all of it
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = k, v
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=p)  # (B, H, T, C/H)
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

    def run(self, x, cache=None):
        """Pass x (B, T, C) through all blocks, with the cache of `predict` if given."""
        for block in self.h:
            x = block(x) if cache is None else block(x, cache.setdefault(block, []))
        return x

    def head(self, x):
        """(B, T, C) -> logits (B, T, V). The output matrix is the token embedding."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, idx, targets=None):
        """idx (B, T), targets (B, T) or None -> logits (B, T, V), mean loss in nats per target or
        None. Where a target is -1, there is none."""
        T, limit = idx.size(1), self.config.block_size
        need(T <= limit, f"{T} tokens exceed the model's block_size of {limit}")
        logits = self.head(self.run(self.embed(idx)))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, stop=True):
        """Continue each row of idx (B, T) by up to max_new_tokens sampled ids; returns (B, T + new).
        Temperature 0 takes the most likely id; top_k samples from the k most likely. After
        <|endoftext|>, the last id, a row repeats it or, without `stop`, goes on with another document.
        Contexts are cropped on the left to block_size."""
        need(idx.size(1) > 0, "the prompt is empty: give at least one token")
        eot = self.config.vocab_size - 1
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        cache, was_training = {}, self.training
        self.eval()
        with torch.compiler.set_stance("force_eager"):  # do not compile for each new length
            for _ in range(max_new_tokens):
                if idx.size(1) > self.config.block_size:  # a crop moves every position
                    cache = {}
                logits = self.predict(idx[:, -self.config.block_size :], cache)  # (B, V)
                chosen = sample(logits, temperature, top_k, generator).to(idx.device)  # (B, 1)
                chosen = torch.where(done, eot, chosen)
                idx = torch.cat([idx, chosen], 1)
                if stop:
                    done |= chosen == eot
                if done.all():
                    break
        self.train(was_training)
        return idx

    def predict(self, idx, cache):
        """Logits (B, V) of what follows idx (B, T). The cache, {block: [keys, values]}, holds what
        was computed for all of idx but the last token, or is empty."""
        seen = idx.size(1) - 1 if cache else 0
        x = self.run(self.embed(idx[:, seen:], start=seen), cache)
        return self.head(x[:, -1]).float()

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with OpenAI's or Hugging Face's files.
        Raises UserError (a ValueError) that names the file and its fault, OSError if one cannot be read."""
        config = replace(read_config(name_or_folder), dropout=dropout)
        folder = Path(name_or_folder).expanduser().absolute()
        with torch.device("meta"):  # shapes only: no memory, no random numbers
            model = cls(config)
        if name_or_folder in SIZES:
            folder = fetch_openai_weights(name_or_folder, model)
        if not (folder / "config.json").exists():
            assign_weights(model, read_openai_weights(folder, model), folder / DATA)
            return model
        arrays, written_here = read_huggingface_weights(folder)
        assign_weights(model, arrays, folder / "model.safetensors")
        if len(config.versions) > 1 and not written_here:
            data.tell(f"{folder}: another program wrote it, so its last version stands alone")
            config.versions = config.versions[-1:]
        return model

    def save_pretrained(self, folder, card=None):
        """Write Hugging Face's format: GPT2LMHeadModel, AutoTokenizer and from_pretrained load it.
        `card`: the text of README.md. Files are written aside and renamed, weights first; the rest stays."""
        folder = Path(folder).expanduser()
        texts = {"config.json": config_json(self.config), **tokenizer_files(self.config)}
        if card is not None:
            texts["README.md"] = card
        folder.mkdir(parents=True, exist_ok=True)
        with data.replacing(folder / "model.safetensors") as f:
            write_safetensors(self, f)
        for name, text in texts.items():
            with data.replacing(folder / name) as f:
                f.write(text.encode())


def init_parameter(name, p, n_layer):
    """GPT-2's: N(0, 0.02), output projections scaled by 1/sqrt(2 n_layer), biases 0, gains 1."""
    if p.dim() == 2:
        std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
        nn.init.normal_(p, std=std)
    else:
        nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)


def sample(logits, temperature, top_k, generator=None):
    """Next ids (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)


# ----- Weights from a file. Both formats hold raw tensors, one after the other. -----


def is_linear(name):
    """Both formats store a linear layer's weight as (in, out), nn.Linear as (out, in)."""
    return name.endswith(".weight") and ".c_" in name


def as_stored(name, p):
    """Our tensor as both formats store it, or a stored one as ours."""
    return p.t() if is_linear(name) else p


def assign_weights(model, arrays, source):
    """Give a model on "meta" (no memory) its weights: no tensor may be missing or left over."""
    shapes = {name: tuple(as_stored(name, p).shape) for name, p in model.named_parameters()}
    state = {}
    for name in sorted(shapes.keys() | arrays.keys()):
        found = arrays[name].shape if name in arrays else "missing"
        expected = shapes.get(name, "none (in transformers, save its GPT2LMHeadModel alone)")
        need(found == expected, f"{source}: tensor {name}: {found}, the model has {expected}")
        tensor = torch.from_numpy(np.array(arrays[name]))  # a copy: the mapped file may go away
        if tensor.dtype == torch.uint16:
            tensor = tensor.view(torch.bfloat16)
        state[name] = as_stored(name, tensor).float().contiguous()
    model.load_state_dict(state, assign=True)


# ----- OpenAI's checkpoint: hparams.json, and a data file that TensorFlow's Saver wrote -----

DATA = "model.ckpt.data-00000-of-00001"


def openai_name(name):
    """h.0.attn.c_attn.weight -> model/h0/attn/c_attn/w"""
    *path, last = ("model." + name).replace(".h.", ".h").split(".")
    if path[-1] in ("wte", "wpe"):
        return "/".join(path)
    return "/".join(path + ["b" if last == "bias" else "g" if path[-1].startswith("ln_") else "w"])


def read_openai_weights(folder, model):
    """{our name: float32 array}, mapped from the file, unread. The Saver sorts variables by name, without
    gaps: names and shapes say where each lies (as does its index file: tests/test_model.py compares)."""
    path, named = folder / DATA, dict(model.named_parameters())
    size = 4 * sum(p.numel() for p in model.parameters())
    need(data.is_right(path, size), f"{path} must be there with {size:,} bytes: fetch it again")
    floats, arrays, end = np.memmap(path, "<f4", "r"), {}, 0
    for name in sorted(named, key=openai_name):
        begin, end = end, end + named[name].numel()
        arrays[name] = floats[begin:end].reshape(as_stored(name, named[name]).shape)
    return arrays


# ----- Hugging Face's format -----
# config.json, and model.safetensors: a length N in 8 bytes, N bytes of JSON, the tensors.

# What config.json must say of these, if it names them: all else is another architecture.
FIXED = dict(
    model_type="gpt2",
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    tie_word_embeddings=True,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
)
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: these are its bits
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which some files hold


def read_safetensors(path):
    """{name: array} without masks, mapped from the file, unread, and whether this program wrote it: then
    the header has the sha256 of the tensors, which others drop. Without it, changed bytes in a tensor
    go unnoticed. Whatever a damaged header raises, the caller tells with the file's name."""
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    need(start <= len(raw), "no header (a git-lfs pointer? a web page?): download the file itself")
    header = json.loads(raw[8:start].tobytes())
    metadata = header.pop("__metadata__", {})
    right = "sha256" not in metadata or metadata["sha256"] == data.sha256([raw[start:]])
    need(right, "its tensors do not have its header's sha256")
    arrays, last = {}, start
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (start + offset for offset in t["data_offsets"])
        need(last == begin <= end <= len(raw), f"{name} does not lie where it should")
        last = end
        if name.endswith(MASKS):
            continue
        dtype = t["dtype"]
        need(dtype in DTYPES, f"{name} is stored as {dtype}: convert it to {' or '.join(DTYPES)}")
        arrays[name] = raw[begin:end].view(DTYPES[dtype]).reshape(t["shape"])
    need(last == len(raw), f"{len(raw) - last:,} bytes follow its last tensor")
    return arrays, "sha256" in metadata


def read_huggingface_weights(folder):
    """{our name: array}, without prefixes and a second wte, which some files have, and whether this
    program wrote them. Raises UserError that names the file and its fault."""
    paths, path = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    stored, written_here = {}, False
    try:
        if path.exists() and not paths[0].exists():  # transformers divides what is large
            files = json.loads(path.read_bytes())["weight_map"].values()
            paths = sorted({folder / file for file in files})
        for path in paths:
            need(path.exists(), f"there is no {path.name}: transformers' save_pretrained writes it")
            arrays, written_here = read_safetensors(path)
            stored |= arrays
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    prefixes = r"^(module\.|_orig_mod\.|transformer\.)+"  # DDP's, torch.compile's, a model class's
    arrays = {re.sub(prefixes, "", name): array for name, array in stored.items()}
    head = arrays.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(head, arrays.get("wte.weight", head)):
        raise UserError(f"{folder}: lm_head.weight is not wte.weight, but GPT-2 has one for both")
    return arrays, written_here


def write_safetensors(model, f):
    def tensors():  # one at a time, twice: all at once would double the memory
        for name, p in model.named_parameters():
            tensor = as_stored(name, p.detach().float().cpu()).contiguous()
            yield tensor.numpy().astype("<f4", copy=False)

    header, end = {}, 0
    for name, p in model.named_parameters():
        begin, end = end, end + 4 * p.numel()
        shape = as_stored(name, p).shape
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header["__metadata__"] = {"format": "pt", "sha256": data.sha256(tensors())}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    f.write(len(raw).to_bytes(8, "little") + raw)
    for array in tensors():
        f.write(array)


def config_json(config):
    sizes = {"vocab_size": config.vocab_size, "n_positions": config.block_size}
    sizes |= {"n_ctx": config.block_size, "n_embd": config.n_embd}
    sizes |= {"n_layer": config.n_layer, "n_head": config.n_head}
    growth = {"generation": config.generation, "versions": config.versions}
    special = dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    names = {"architectures": ["GPT2LMHeadModel"], "torch_dtype": "float32"}
    return json.dumps(FIXED | names | growth | sizes | special | dropout, indent=2)


def tokenizer_files(config):
    """{name: text} of the files that give AutoTokenizer the ids of data.encode."""
    values = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.block_size}
    values |= {f"{kind}_token": data.EOT for kind in ("bos", "eos", "unk")}
    values["clean_up_tokenization_spaces"] = False
    files = {"tokenizer_config.json": json.dumps(values, indent=2)}
    if config.vocab_size == data.BYTES:  # the same tokenizer, without a merge
        vocabulary = {c: byte for byte, c in enumerate(data.BYTE_CHARACTERS)}
        return files | {"vocab.json": json.dumps(vocabulary | {data.EOT: 256}), "merges.txt": ""}
    if config.vocab_size == data.GPT2:  # OpenAI's, under Hugging Face's names
        openai = {name: path.read_text("utf-8") for name, path in data.tokenizer_files().items()}
        return files | {"vocab.json": openai["encoder.json"], "merges.txt": openai["vocab.bpe"]}
    return {}


# ----- Where weights are, and a model's shape, known before they are read -----

OPENAI_URLS = [
    f"{data.OPENAI}models/{{}}/{DATA}",
    f"https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/{{}}/{DATA}",
]
SIZES = {  # name: OpenAI's name of it, layers, heads, width
    "gpt2": ("124M", 12, 12, 768),
    "gpt2-medium": ("355M", 24, 16, 1024),
    "gpt2-large": ("774M", 36, 20, 1280),
    "gpt2-xl": ("1558M", 48, 25, 1600),
}
# No hash of the larger sizes is published: their number of bytes is checked.
SHA256 = {"gpt2": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"}


def read_config(name_or_folder):
    """GPTConfig of what from_pretrained would load, with all versions it names. Raises UserError."""
    folder = Path(name_or_folder).expanduser().absolute()
    if name_or_folder in SIZES:
        if folder.exists():
            data.tell(f"{name_or_folder} is OpenAI's: for the folder here, write ./{name_or_folder}")
        _, n_layer, n_head, n_embd = SIZES[name_or_folder]
        return GPTConfig(n_head=n_head, n_embd=n_embd, generation=(0,) * n_layer)
    path = folder / "config.json"
    if not path.exists():
        path = folder / "hparams.json"
    if not path.exists():
        hint = "is a file" if folder.is_file() else "has no config.json or hparams.json"
        if (folder / "model" / "config.json").exists():
            hint = f"is a run, its network is {folder / 'model'}"
        known = f"give one of {', '.join(SIZES)}, or a folder to which transformers saved a GPT-2"
        raise UserError(f"no model: {folder} {hint} ({known})")
    try:
        h = json.loads(path.read_bytes())
        h = {"vocab_size": h.get("n_vocab"), "n_positions": h.get("n_ctx")} | h  # OpenAI's names
        if h.get("activation_function") == "gelu_pytorch_tanh":  # the same function
            h["activation_function"] = "gelu_new"
        for key, value in (FIXED | {"n_inner": 4 * h["n_embd"]}).items():
            found = h.get(key, value)
            need(found in (None, value), f"{key} is {found!r}, not {value!r}: another architecture")
        generation = h.get("generation", [0] * h["n_layer"])
        need(len(generation) == h["n_layer"], "not n_layer generations: delete generation and versions")
        versions = tuple(h.get("versions", ()))
        if max(generation) not in versions:  # a file's network is finished: a version itself
            versions = (*versions, max(generation))
        sizes = h["vocab_size"], h["n_positions"], h["n_head"], h["n_embd"]
        positive = all(type(size) is int and size > 0 for size in sizes)
        need(positive, f"vocab_size, n_positions, n_head, n_embd are not positive integers: {sizes}")
        data.check_tokenizer(folder, h["vocab_size"])
        return GPTConfig(*sizes, generation, versions=versions)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: {'it lacks ' if isinstance(e, KeyError) else ''}{e}") from e


def fetch_openai_weights(name, model):
    """A folder with OpenAI's data file of this size, from OpenAI or a mirror. Raises UserError."""
    size = SIZES[name][0]
    path, urls = data.cache_dir() / f"gpt2-{size}" / DATA, [url.format(size) for url in OPENAI_URLS]
    data.fetch(urls, path, 4 * sum(p.numel() for p in model.parameters()), SHA256.get(name))
    return path.parent
