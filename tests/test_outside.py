"""What a stopped run must take along that the second trainer (test_reference.py) has not: the loss scaler.

python -m pytest tests/test_outside.py
"""

import json
import math
import os
import signal

import pytest

import data
import train
from model import GPT, GPTConfig


def skipped_steps(out):
    """Steps whose gradients overflowed: their norm is not a number that could be used."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    norms = {row["step"]: row["norm"] for row in rows if row["kind"] == "step"}
    assert list(norms) == list(range(8))
    return [step for step, norm in norms.items() if norm is None or not math.isfinite(norm)]


def test_a_resumed_run_keeps_the_scale_of_its_loss(text, tmp_path, monkeypatch):
    """float16 gradients overflow until the scale, which starts at 65,536, has been halved often enough. A
    resumed run knows the scale that it had come to: it skips no step again, and ends where it would have."""
    net = GPT(GPTConfig(257, 16, 2, 8, (0, 0)))
    net.ln_f.weight.data *= 64  # large activations, and so large gradients, in front of the head
    net.wte.weight.data /= 64
    net.save_pretrained(tmp_path / "net")
    options = dict(
        init=tmp_path / "net", dataset=text, retain="none", block_size=16, batch_size=4, max_steps=8, lr=1e-6,
        max_growths=0, eval_every=8, eval_windows=2, test_windows=2, log_every=1, device="cpu",
        dtype="float16",
    )  # fmt: skip

    def start(out, *more):
        train.main([*(f"--{k}={v}" for k, v in options.items()), f"--out={out}", *more])

    batch = data.batch

    def batch_and_stop(tokens, block_size, rows, step, seed):
        if step == 5:
            monkeypatch.setattr(data, "batch", batch)
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(tokens, block_size, rows, step, seed)

    start(tmp_path / "whole")
    skipped = skipped_steps(tmp_path / "whole")
    assert 0 in skipped and len(skipped) < 8

    monkeypatch.setattr(data, "batch", batch_and_stop)
    with pytest.raises(SystemExit):
        start(tmp_path / "parts")
    start(tmp_path / "parts", "--resume")
    assert skipped_steps(tmp_path / "parts") == skipped
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]
