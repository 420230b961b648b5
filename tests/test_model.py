"""GPT-2 is GPT-2: the same numbers as transformers, the same files, and a sampler that does what it says."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BYTES, FIXTURES, ROOT, SHARED, refused, tiny_gpt
from openai_format import read_index, write_openai_checkpoint
from safetensors.torch import save_file as save_tensors
from transformers import GPT2Config, GPT2LMHeadModel

import grow
import model as m
from model import GPT, GPTConfig

INDEX = "model.ckpt.index"
INDEX_124M = SHARED / f"fixtures/gpt2-124M.{INDEX}"
TINY = (61, 16, 2, 8, 3)  # vocabulary, positions, heads, width, depth


def pair(vocab, positions, heads, width, depth, seed=0, scale=0.2):
    """Our network and transformers', with the same random weights (biases and gains random, too)."""
    torch.manual_seed(seed)
    ours = GPT(GPTConfig(vocab, positions, heads, width, (0,) * depth)).eval()
    for p in ours.parameters():
        p.data = torch.randn_like(p) * scale
    config = GPT2Config(vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=depth, n_head=heads)
    theirs = GPT2LMHeadModel(config).eval()
    state = {f"transformer.{n}": p.t() if m.is_linear(n) else p for n, p in ours.named_parameters()}
    theirs.load_state_dict({**state, "lm_head.weight": ours.wte.weight})
    return ours, theirs


# ----- the network -----


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [TINY, (257, 32, 1, 16, 1), (300, 24, 4, 32, 2)])
def test_logits_loss_and_gradients_are_those_of_transformers(shape, frozen):
    """At one token, at a few and at the full context, and with all but the last block frozen."""
    ours, theirs = pair(*shape)
    if frozen:
        for network in (ours, theirs.transformer):
            network.requires_grad_(False)
            network.h[-1].requires_grad_(True)
    for T in (1, 5, shape[1]):
        idx = torch.randint(shape[0], (2, T))
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    loss, reference = grow.Objective(ours)(x, y)[0], theirs(idx, labels=idx).loss
    assert abs(loss - reference) < 1e-5 and abs(ours(x, y)[1] - reference) < 1e-5
    loss.backward(), reference.backward()
    named = dict(theirs.transformer.named_parameters())
    for name, p in ours.named_parameters():
        grad = named[name].grad
        if p.requires_grad:
            assert torch.allclose(p.grad, grad.t() if m.is_linear(name) else grad, atol=1e-5), name
        else:
            assert p.grad is None


def test_targets_of_minus_one_do_not_count():
    """The loss is the mean over the others, as transformers has it with its -100."""
    ours, theirs = pair(*TINY)
    idx = torch.randint(61, (3, 16))
    targets, labels = idx[:, 1:].clone(), idx.clone()
    hidden = torch.rand(3, 15) < 0.6
    targets[hidden], labels[:, 1:][hidden] = -1, -100
    with torch.no_grad():
        assert abs(ours(idx[:, :-1], targets)[1] - theirs(idx, labels=labels).loss) < 1e-5


def test_the_loss_is_computed_in_float32_whatever_the_logits_are():
    """bfloat16 has three decimal digits: logits may have been rounded to it, their logarithm may not."""
    ours = tiny_gpt().bfloat16()
    idx = torch.randint(61, (8, 17))
    with torch.no_grad():
        logits, loss = ours(idx[:, :-1], idx[:, 1:])
    assert loss.dtype == torch.float32
    expected = -logits.double().log_softmax(-1).gather(-1, idx[:, 1:, None]).mean()
    assert abs(loss - expected) < 1e-6


PUBLISHED = {  # parameters, as the sizes of OpenAI's data files have them
    "gpt2": 497_759_232 // 4,
    "gpt2-medium": 1_419_292_672 // 4,
    "gpt2-large": 3_096_120_320 // 4,
    "gpt2-xl": 6_230_444_800 // 4,
}


def test_sizes_are_the_published_ones():
    """By default that of the 124M, which is 145.7M after the card's three growths."""
    ours, theirs = GPTConfig(), GPT2Config()
    assert (ours.vocab_size, ours.block_size) == (theirs.vocab_size, theirs.n_positions)
    assert (ours.n_layer, ours.n_head, ours.n_embd) == (theirs.n_layer, theirs.n_head, theirs.n_embd)
    assert ours.dropout == 0 and set(ours.generation) == {0}
    configs = {name: m.read_config(name) for name in PUBLISHED}
    assert configs["gpt2"] == ours and set(m.SIZES) == set(PUBLISHED)
    with torch.device("meta"):
        for name, count in PUBLISHED.items():
            assert sum(p.numel() for p in GPT(configs[name]).parameters()) == count
            assert configs[name].n_embd // configs[name].n_head == 64
        grown = GPT(GPTConfig(generation=(0,) * 12 + (1, 2, 3)))
    assert sum(p.numel() for p in grown.parameters()) == 145_703_424
    refused(lambda: GPTConfig(n_head=11), "n_head")


def test_a_new_network_has_the_random_weights_of_gpt2():
    """Spread and mean of every matrix are those of a new network of transformers; the rest is equal to it."""
    torch.manual_seed(0)
    ours = GPT(GPTConfig(300, 64, 4, 64, (0,) * 6))
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=6, n_head=4))
    named = dict(theirs.transformer.named_parameters())
    for name, p in ours.named_parameters():
        p, q = p.detach(), named[name].detach()
        if p.dim() == 1:
            assert torch.equal(p, q), name  # gains are one, biases zero
            continue
        # Over n draws the mean has an error of std / sqrt(n), and std one of std / sqrt(2 n). The ratio of
        # two such standard deviations is known to one part in sqrt(n): allow five times that.
        n = p.numel()
        assert abs(p.std() / q.std() - 1) < 5 / math.sqrt(n), name
        assert abs(p.mean()) < 5 * q.std() / math.sqrt(n), name
    # Two branches a block, six blocks: twelve additions to the residual stream, whose spread stays the same.
    assert ours.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(12), rel=0.05)


def test_dropout_only_while_training():
    """Evaluation and sampling are exact, and sampling leaves the mode as it was."""
    ours = tiny_gpt((0,), dropout=0.5)
    idx = torch.randint(61, (1, 16))
    assert not torch.equal(ours(idx)[0], ours(idx)[0])
    assert torch.equal(ours.generate(idx[:, :4], 5, 0), ours.generate(idx[:, :4], 5, 0)) and ours.training
    ours.eval()
    assert torch.equal(ours(idx)[0], ours(idx)[0])
    ours.generate(idx[:, :4], 5)
    assert not any(part.training for part in ours.modules())


@pytest.mark.parametrize("place", ["embedding", "attention weights", "attention output", "MLP output"])
def test_dropout_is_in_the_four_places_where_gpt2_has_it(place):
    """In training each zeroes a share p of what passes there, at random, and divides the rest by 1 - p."""
    B, T, H, C, p = 500, 4, 2, 8, 0.25
    ours, seen = tiny_gpt((0,), block_size=T, dropout=p), {}
    for parameter in ours.parameters():
        parameter.data += torch.randn_like(parameter) * 0.5
    for name, part in ours.named_modules():
        # name=name: a plain `name` would be looked up when the hook runs, after the loop
        part.register_forward_hook(lambda part, x, out, name=name: seen.update({name: (x[0], out)}))
    with torch.no_grad():
        ours(torch.randint(61, (B, T)))
    # The residual stream: what the three norms read.
    entering, between, leaving = (seen[name][0] for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"))  # (B, T, C)
    if place == "embedding":
        before, after = seen["wte"][1] + seen["wpe"][1], entering
    elif place == "attention weights":
        # The first token sees only itself, with weight 1: what its head reads is its own value or nothing.
        before = seen["h.0.attn.c_attn"][1][:, 0, 2 * C :].view(B, H, C // H)
        after = seen["h.0.attn.c_proj"][0][:, 0].view(B, H, C // H)
        assert torch.equal((after == 0).all(-1), (after == 0).any(-1))  # a weight is dropped for all channels
    elif place == "attention output":
        before, after = seen["h.0.attn.c_proj"][1], between - entering
    else:
        before, after = seen["h.0.mlp.c_proj"][1], leaving - between
    dropped = after == 0
    assert torch.allclose(after[~dropped], before[~dropped] / (1 - p), atol=1e-4)
    draws = B * H if place == "attention weights" else after.numel()
    assert abs(dropped.float().mean() - p) < 5 * math.sqrt(p * (1 - p) / draws)


# ----- OpenAI's files -----

NO_INDEX = pytest.mark.skipif(not INDEX_124M.exists(), reason="the 124M's index is not beside the repository")


@pytest.mark.parametrize(
    "index, config",
    [
        pytest.param(INDEX_124M, GPTConfig(), marks=NO_INDEX),
        (FIXTURES / "tiny-openai" / INDEX, GPTConfig(*TINY[:4], (0,) * 3)),
    ],
)
def test_tensorflows_index_says_what_the_sorted_names_say(index, config):
    """4 bytes a parameter, sorted by name as bytes, without gaps: names and shapes are all that is needed."""
    with torch.device("meta"):
        named = {m.openai_name(name): (name, p) for name, p in GPT(config).named_parameters()}
    expected, begin = {}, 0
    for key in sorted(named, key=str.encode):
        name, p = named[key]
        shape = (1, *p.shape[::-1]) if m.is_linear(name) else tuple(p.shape)
        expected[key] = begin, 4 * p.numel(), shape
        begin += 4 * p.numel()
    assert read_index(index) == expected


def test_fixture_written_by_tensorflow():
    """Its tensors are read exactly, and the network is transformers' network of them."""
    ours = GPT.from_pretrained(FIXTURES / "tiny-openai").eval()
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=3, n_head=2)).eval()
    true, state = np.load(FIXTURES / "tiny-openai.npz"), {}
    for name in true.files:
        array, name = torch.from_numpy(true[name]), name.removeprefix("model/").replace("/", ".")
        name = re.sub(r"^h(\d+)", r"h.\1", name)  # h0.attn.c_attn.w -> h.0.attn.c_attn.weight
        name = name + ".weight" if name in ("wte", "wpe") else name
        name = re.sub(r"\.[wg]$", ".weight", re.sub(r"\.b$", ".bias", name))
        state[name] = array[0] if array.ndim == 3 else array
    for name, p in ours.named_parameters():
        assert torch.equal(p.t() if m.is_linear(name) else p, state[name]), name
    state = {f"transformer.{name}": array for name, array in state.items()}
    theirs.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    idx = torch.randint(61, (2, 16))
    assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-5


def test_openai_format_round_trip(tmp_path):
    """As in the index, h10 lies before h2: their shapes are the same, and nobody would notice an exchange."""
    ours = tiny_gpt((0,) * 12)
    again = GPT.from_pretrained(write_openai_checkpoint(tmp_path, ours))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))


# ----- Hugging Face's files -----


def export(folder, **more):
    """Two original and two grown blocks, none of which is the identity, written to `folder`."""
    ours = tiny_gpt((0, 1, 0, 2), BYTES, **more).eval()
    ours.save_pretrained(folder)
    return ours


def test_export_loads_in_transformers_and_comes_back(tmp_path):
    """With its history, dropout and <|endoftext|>; what transformers saves is read, too. Who loads a network
    asks for dropout anew, and by default has none."""
    ours = export(tmp_path / "ours", dropout=0.25)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    again = GPT.from_pretrained(tmp_path / "ours")
    idx = torch.randint(BYTES, (2, 16))
    assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-5
    assert torch.equal(ours(idx)[0], again(idx)[0]) and again.training
    assert again.config.generation == (0, 1, 0, 2)
    config = theirs.config
    assert config.bos_token_id == config.eos_token_id == 256  # the last id
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.25, 0.25, 0.25)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(GPT.from_pretrained(tmp_path / "theirs")(idx)[0], again(idx)[0])
    dropping = GPT.from_pretrained(tmp_path / "ours", dropout=0.1)
    assert dropping.config.dropout == 0.1 and not torch.equal(dropping(idx)[0], dropping(idx)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_with_a_second_copy_of_wte(tmp_path, dtype):
    """As transformers reads them. (test_strangers.py has prefixes and masks.)"""
    ours = export(tmp_path)
    named = {n: p.detach().t() if m.is_linear(n) else p.detach() for n, p in ours.named_parameters()}
    state = {f"transformer.{n}": p.to(dtype).contiguous() for n, p in named.items()}
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    save_tensors(state, tmp_path / "model.safetensors", {"format": "pt"})
    again = GPT.from_pretrained(tmp_path).eval()
    for (name, p), q in zip(ours.named_parameters(), again.parameters()):
        assert q.dtype == torch.float32 and torch.equal(p.to(dtype).float(), q), name
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    idx = torch.randint(BYTES, (2, 16))
    assert (again(idx)[0] - theirs(idx).logits).abs().max() < 1e-5


MEASURE = """
import sys
from model import GPT

def kilobytes(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0])

GPT.from_pretrained(sys.argv[1])  # a tiny one first: torch imports some 75 MB of itself at first use
for folder in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is there
    before = kilobytes("VmRSS")
    model = GPT.from_pretrained(folder)
    print(1024 * (kilobytes("VmHWM") - before) / sum(4 * p.numel() for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory peak from Linux's /proc")
def test_loading_takes_little_more_than_the_weights_and_their_file(tmp_path):
    """In both formats the peak of resident memory, mapped pages included, is below 2.2 times the weights."""
    large = GPT(GPTConfig(257, 64, 8, 512, (0,) * 8))  # 101 MB
    tiny_gpt().save_pretrained(tmp_path / "tiny")
    large.save_pretrained(tmp_path / "export")
    write_openai_checkpoint(tmp_path / "openai", large)
    command = [sys.executable, "-c", MEASURE, *(tmp_path / name for name in ("tiny", "openai", "export"))]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}  # what is freed is given back
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for ratio in map(float, done.stdout.split()):
        assert 1 < ratio < 2.2  # below 1 it would not have measured the weights at all


# ----- sampling -----


def test_generate_is_greedy_within_and_past_the_context():
    """Against transformers on the last 16 ids; a crop to 15, or a position off by one, says other ids."""
    # Weights so large that the greedy text goes on changing: with pair's own it soon repeats one id for ever,
    # and then whatever has been read, the next id is the same.
    ours, theirs = pair(*TINY, seed=4, scale=0.4)
    prompt = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        expected, told_apart = prompt, 0
        for _ in range(60):
            best = theirs(expected[:, -16:]).logits[:, -1].argmax(-1, keepdim=True)
            if expected.size(1) > 16:
                told_apart += (theirs(expected[:, -15:]).logits[:, -1].argmax(-1) != best).sum().item()
            expected = torch.cat([expected, best], 1)
    assert 60 not in expected and told_apart > 10  # no <|endoftext|>, and the crop matters at most steps
    assert torch.equal(ours.generate(prompt, 60, temperature=0), expected)
    assert torch.equal(ours.generate(prompt, 60, top_k=1), expected)
    assert torch.equal(ours.generate(expected[:, :40], 23, temperature=0), expected)  # a long prompt


def test_generate_in_a_batch_is_generate_row_by_row():
    """Rows do not see each other, in the cache or past the context; one that is done is filled up."""
    ours, _ = pair(*TINY, seed=3)
    idx = torch.randint(60, (3, 4))
    together = ours.generate(idx, 25, temperature=0)
    for row, out in zip(idx, together):
        alone = ours.generate(row[None], 25, temperature=0)[0]
        assert torch.equal(out[: len(alone)], alone) and (out[len(alone) :] == 60).all()
    real = ours.head
    at_once = torch.tensor([[1e4], [0.0]])  # row 0 ends with its first id
    ours.head = lambda x: real(x) + at_once[: len(x)] * (torch.arange(61) == 60)
    out = ours.generate(idx[:2], 6, temperature=0)
    assert (out[0, 4:] == 60).all() and (out[1, 4:] != 60).any()
    assert ours.generate(idx[:1], 6, temperature=0).size(1) == 5  # all are done: nothing more is computed


def test_more_likeliest_ids_than_there_are_is_all_and_nonsense_is_refused():
    """(test_tables.py throws dice for temperature, top_k and seed.)"""
    ours, idx = tiny_gpt(), torch.zeros(1, 1, dtype=torch.long)
    one, other = (ours.generate(idx, 9, 1.0, k, torch.Generator().manual_seed(1)) for k in (None, 1000))
    assert torch.equal(one, other)
    refused(lambda: ours.generate(idx[:, :0], 1), "empty")
    refused(lambda: ours(torch.zeros(1, 17, dtype=torch.long)), "block_size")
