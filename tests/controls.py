"""What growth is compared with in the study and train.py does not offer: a fork, low rank, a wider MLP.

Each changes a network in place, so that all else is frozen and `grow.trainable` finds what trains. LoRA and
the wider MLP have, within 1%, as many trainable parameters as growth by ADDED_BLOCKS blocks, unless LoRA is
given another rank or there are too few hidden units to copy."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

ADDED_BLOCKS = 2


def fork(model, blocks):
    """Only these blocks train. Stored beside the originals, they cost what as many inserted blocks cost, and
    the network is no deeper."""
    model.requires_grad_(False)
    for i in blocks:
        model.h[i].requires_grad_(True)


class LowRank(nn.Module):
    """A frozen linear layer plus B A x, where B (out, r) starts at zero (Hu et al., arXiv 2106.09685)."""

    def __init__(self, linear, rank):
        super().__init__()
        out, into = linear.weight.shape
        self.linear = linear
        self.A = nn.Parameter(torch.randn(rank, into) / math.sqrt(into))
        self.B = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x):
        return self.linear(x) + x @ self.A.T @ self.B.T


class Widened(nn.Module):
    """A frozen MLP and `units` new hidden units beside its own.

    Fresh ones have output weights of zero, which changes nothing (arXiv 2308.06103, theorem 3.1). Copied ones
    are the first of its own, with half of their output; the other half stays where it was (Net2Net; Grow,
    Don't Overwrite, arXiv 2603.08647). That adds up to the same but for rounding: it is not bitwise."""

    def __init__(self, mlp, units, copied):
        super().__init__()
        C = mlp.c_fc.in_features
        self.mlp, self.c_fc, self.c_proj = mlp, nn.Linear(C, units), nn.Linear(units, C, bias=False)
        if copied:
            with torch.no_grad():
                mlp.c_proj.weight[:, :units] /= 2
                self.c_fc.weight.copy_(mlp.c_fc.weight[:units])
                self.c_fc.bias.copy_(mlp.c_fc.bias[:units])
                self.c_proj.weight.copy_(mlp.c_proj.weight[:, :units])
        else:
            nn.init.normal_(self.c_fc.weight, std=0.02)
            nn.init.zeros_(self.c_fc.bias)
            nn.init.zeros_(self.c_proj.weight)

    def forward(self, x):
        return self.mlp(x) + self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def _budget(model):
    """Parameters for each block of the network."""
    C, L = model.config.n_embd, model.config.n_layer
    return ADDED_BLOCKS * (12 * C * C + 13 * C) / L


def lora(model, rank=None):
    """On all four matrices of every block."""
    if rank is None:
        rank = round(_budget(model) / (16 * model.config.n_embd))  # their inputs and outputs are 16 C wide
    model.requires_grad_(False)
    for layer in [m for block in model.h for m in (block.attn, block.mlp)]:
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer, name, LowRank(child, rank))


def widen(model, copied=False):
    units = round(_budget(model) / (2 * model.config.n_embd + 1))
    if copied:  # there are no more
        units = min(units, 4 * model.config.n_embd)
    model.requires_grad_(False)
    for block in model.h:
        block.mlp = Widened(block.mlp, units, copied)
