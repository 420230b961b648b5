"""Published numbers of OpenAI's 124M, checked whenever its files are in the cache folder of the user."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_tiktoken

import data
import model as m
from model import GPT

FOLDER = Path(os.environ.get("GROWING_GPT_WEIGHTS", Path.home() / ".cache" / "growing-gpt" / "gpt2-124M"))
SHAKESPEARE = Path(os.environ.get("GROWING_GPT_SHAKESPEARE", SHARED / "data" / "shakespeare.txt"))
pytestmark = [
    pytest.mark.skipif(not (FOLDER / m.DATA).exists(), reason=f"OpenAI's 124M weights are not in {FOLDER}"),
    needs_tiktoken,
]


@pytest.fixture(scope="module")
def gpt2():
    return GPT.from_pretrained(FOLDER).eval()


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
def test_losses_of_llm_c(gpt2):
    """The losses on llm.c's debug batch, before and after AdamW steps."""
    ids = []
    pieces = SHAKESPEARE.read_text().split("\n\n")
    for i, piece in enumerate(pieces[:20]):
        ids += [50256, *data.encode(piece + ("\n\n" if i + 1 < len(pieces) else "")).tolist()]
    ids = np.array(ids[:257], np.uint16)
    digest = "f3cb1f678d40cf5a120662b12a20fdacc5bd2e08c13ebb230a93e9f6f82f1df4"
    assert hashlib.sha256(ids.tobytes()).hexdigest() == digest
    ids = torch.from_numpy(ids.astype(np.int64))
    x, y = ids[:-1].view(4, 64), ids[1:].view(4, 64)
    net = GPT.from_pretrained(FOLDER)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    expected = "5.270007 4.059707 3.375123 2.800783 2.315382 1.849029 1.394656 0.999147 0.624080 0.376511"
    for value in map(float, expected.split()):
        _, loss = net(x, y)
        assert abs(loss.item() - value) < 2e-3
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
