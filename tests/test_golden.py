"""Published numbers of OpenAI's 124M, checked whenever its files are in the cache folder of the user."""

import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_cuda, needs_tiktoken

import data
import eval as e
import model as m
from model import GPT

CACHE = Path.home() / ".cache" / "growing-gpt"
FOLDER = Path(os.environ.get("GROWING_GPT_WEIGHTS", CACHE / "gpt2-124M"))
WIKITEXT = CACHE / "wikitext-2-raw-v1.zip"
SHAKESPEARE = SHARED / "data" / "shakespeare.txt"
pytestmark = [
    pytest.mark.skipif(not (FOLDER / m.DATA).exists(), reason=f"OpenAI's 124M weights are not in {FOLDER}"),
    needs_tiktoken,
]


def load():
    with torch.device("meta"):
        model = GPT(m.read_config("gpt2"))
    m.assign_weights(model, m.read_openai_weights(FOLDER, model), FOLDER / m.DATA)
    return model


@pytest.fixture(scope="module")
def gpt2():
    return load().eval()


GREEDY = {
    "Hello, I'm a language model,": "407 257 8300 3303 13 314 1101 257 3303 2746 13",
    "The capital of France is": "262 3139 286 262 4141 2066 11 290 262 3139 286 262 4141 2066 318 262 3139",
    "The dog": "373 1043 287 257 2214 1474 262 16246 286 2688 290 2688 27262 13 198 198 464 3290",
}


@pytest.mark.parametrize("prompt", GREEDY)
def test_greedy_continuations(gpt2, prompt):
    ids, expected = data.encode(prompt).astype(np.int64), [int(i) for i in GREEDY[prompt].split()]
    out = gpt2.generate(torch.from_numpy(ids)[None], len(expected), temperature=0)[0, len(ids) :]
    assert out.tolist() == expected


def test_a_logit_and_a_loss(gpt2):
    ids = torch.from_numpy(data.encode("Hello, I'm a language model,").astype(np.int64))[None]
    assert abs(gpt2(ids)[0][0, -1, 407].item() - -94.68739) < 1e-3
    ids = torch.tensor([[50256, 15496, 995, 0]])
    assert abs(gpt2(ids[:, :-1], ids[:, 1:])[1].item() - 5.331855773925781) < 1e-4


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tiny Shakespeare is not there")
def test_losses_of_llm_c():
    """The losses on llm.c's debug batch (test_data.py knows its hash), before and after AdamW steps."""
    pieces = SHAKESPEARE.read_text().split("\n\n")[:20]
    ids = data.encode("".join(f"{data.EOT}{piece}\n\n" for piece in pieces))[:257].astype(np.int64)
    x, y = torch.from_numpy(ids)[:-1].view(4, 64), torch.from_numpy(ids)[1:].view(4, 64)
    net = load()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    expected = "5.270007 4.059707 3.375123 2.800783 2.315382 1.849029 1.394656 0.999147 0.624080 0.376511"
    for value in map(float, expected.split()):
        _, loss = net(x, y)
        assert abs(loss.item() - value) < 2e-3
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@needs_cuda
@pytest.mark.skipif(not WIKITEXT.exists(), reason=f"{WIKITEXT} is not there")
def test_perplexity_of_wikitext2():
    """30.13, as published: on the validation split, from the mean of the means of windows of 1,024."""
    net = load().cuda()
    text = zipfile.ZipFile(WIKITEXT).read("wikitext-2-raw/wiki.valid.raw").decode()
    tokens = data.encode(text)
    windows = [tokens[i : i + 1024] for i in range(0, len(tokens), 1024)]
    losses = [e.evaluate(net, window) for window in windows if len(window) > 1]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(30.13, abs=0.01)
