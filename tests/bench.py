"""The benchmark: this repository beside transformers, taking turns.

    python tests/bench.py                              every row that this machine can measure
    python tests/bench.py --rows=1,2 --out=out/bench   some of them
    python tests/bench.py --quick                      does the program work? small networks, few rounds
    python tests/bench.py --profile="demo --seed=1"    where the time of a run of train.py goes

Ours are train.py's own parts, called as train.py calls them; theirs is GPT2LMHeadModel grown and frozen the
same way, in the plain loop its users write. Weights are random, of GPT-2 124M's shape; where both are timed
they hold the same numbers, and their logits are compared first. Each variant lives in a process of its own,
so that neither its allocator nor its compiler knows of the others, and all take turns, so that whatever else
the machine does meets all of them; a figure is the median over rounds. The first step, which compiles, is
told apart and starts with an empty compiler cache. OUT gets bench.md and bench.json.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import multiprocessing
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from openai_format import write_openai_checkpoint  # noqa: E402
from torch._inductor.utils import fresh_cache  # noqa: E402

import data  # noqa: E402
import eval as ev  # noqa: E402
import grow  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig, cross_entropy, is_linear  # noqa: E402

GROWTHS = 3
ARGS = DEVICE = None  # set by main
SHAPE = GPTConfig()  # GPT-2 124M
NOTES = []  # what could not be measured, and why

# ------------------------------------------------------------------------------------------------------------
# Taking turns


def sync():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(step, repeat=1):
    sync()
    began = time.perf_counter()
    for _ in range(repeat):
        step()
    sync()
    return (time.perf_counter() - began) / repeat


def memory(key):
    """Bytes in use now ("VmRSS") or at most since forget_peak ("VmHWM"), or None where nobody counts them."""
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def forget_peak():
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def release():
    """Give back what Python and the allocator hold for later, so that it is not counted as in use."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    if DEVICE.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def work(pipe, settings, build):
    """The process of one variant: build its step when asked, then take as many steps as asked each time."""
    globals().update(settings)
    torch._dynamo.config.recompile_limit = 64  # like the next, what train.py sets
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")
    base()  # what all variants copy from does not count as theirs
    pipe.recv()
    try:
        with fresh_cache():
            release()
            before = memory("VmRSS")
            step = build()
            first = seconds(step)
            release(), forget_peak()
            seconds(step)
            peak = None if before is None else (memory("VmHWM") - before) / 2**30
            pipe.send({"first_s": first, "peak_gb": peak, "all_ms": []})
            while repeat := pipe.recv():
                pipe.send(1000 * seconds(step, repeat))
    except Exception as e:  # one variant that cannot run must not cost the others their figures
        pipe.send(f"{type(e).__name__}: {str(e)[:150].splitlines()[:1]}")


def take_turns(builders, rounds=None):
    """{name: function that returns a step} -> {name: {"ms", "fastest_ms", "first_s", "peak_gb", "all_ms"}}.

    The peak is that of the second step over what was in use before the variant was built: its weights,
    gradients, optimizer and activations.
    """
    spawn, pipes, children, results = multiprocessing.get_context("spawn"), {}, [], {}
    settings = {"ARGS": ARGS, "DEVICE": DEVICE, "SHAPE": SHAPE}
    for name, build in builders.items():
        pipes[name], end = spawn.Pipe()
        children.append(spawn.Process(target=work, args=(end, settings, build), daemon=True))
        children[-1].start()
        end.close()
    for name, pipe in list(pipes.items()):
        try:
            pipe.send("build")
            answer = pipe.recv()
        except (EOFError, OSError):
            answer = "its process died, for want of memory perhaps"
        if isinstance(answer, str):
            NOTES.append(f"{name}: {answer}")
            print(f"  {NOTES[-1]}", file=sys.stderr)
            del pipes[name]
            continue
        results[name] = answer
        print(f"  {name}: first step {answer['first_s']:.1f} s", file=sys.stderr, flush=True)
    for _ in range(rounds or ARGS.rounds):
        for name, pipe in pipes.items():
            pipe.send(10 if DEVICE.type == "cuda" else 1)
            results[name]["all_ms"].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(0)
        pipe.close()
    for child in children:
        child.join()  # before the next variants: its memory is theirs
    for r in results.values():
        r |= {"ms": statistics.median(r["all_ms"]), "fastest_ms": min(r["all_ms"])}
    return results


def variants(kinds):
    """Each kind eagerly and, where that is possible, compiled: {name: function that returns a step}."""
    return {
        kind + ", compiled" * compiled: functools.partial(build, compiled=compiled)
        for compiled in ((False, True) if ARGS.can_compile else (False,))
        for kind, build in kinds.items()
    }


def number(value, form=".1f"):
    return "-" if value is None else format(value, form)


def markdown(head, rows):
    cells = [[(name, cell, "") for name, cell in zip(head, row)] for row in rows]
    return ev.markdown(cells) if rows else "nothing was measured"


def table(results, baseline, *columns):
    """Markdown of take_turns' results: `columns` are more (head, {name: text}); times is ms over baseline."""
    base = results.get(baseline, {}).get("ms")
    rows = []
    for name, r in results.items():
        times = number(base and base / r["ms"], ".2f")
        rows.append([name, number(r["ms"]), number(r["fastest_ms"]), times, number(r["first_s"])])
        rows[-1] += [number(r["peak_gb"], ".2f"), *(texts.get(name, "-") for _, texts in columns)]
    head = ["variant", "ms a step", "fastest", f"times {baseline}", "first step, s", "peak, GB"]
    return markdown([*head, *(head for head, _ in columns)], rows)


# ------------------------------------------------------------------------------------------------------------
# Ours and theirs


def options(dtype, **more):
    return train.Options(**{**dict(device=DEVICE.type, dtype=dtype, block_size=ARGS.block_size), **more})


def autocast(o):
    dtype = getattr(torch, o.dtype)
    return torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)


@functools.cache
def random_tokens():
    return np.random.default_rng(0).integers(0, SHAPE.vocab_size, 2_000_000).astype(np.uint16)


def random_batches(o):
    """A function that returns the next step's micro-batches, made as train.py makes them."""
    counter = itertools.count()
    texts = {"learn": {"train": random_tokens()}, "retain": None}
    return lambda: train.micro_batches(o, texts, None, next(counter), DEVICE)


@functools.cache
def base():
    torch.manual_seed(0)
    return GPT(SHAPE)


@functools.cache
def placements(layers):
    """Where train.py's default puts the blocks that make the base `layers` deep."""
    with torch.device("meta"):
        model, places = GPT(dataclasses.replace(SHAPE)), []
    for growth in range(layers - SHAPE.n_layer):
        places.append(grow.placement("upper", model, growth, GROWTHS))
        grow.insert_block(model, places[-1])
    return places


def grown(layers):
    model = copy.deepcopy(base()).to(DEVICE)
    for at in placements(layers):
        grow.insert_block(model, at)
    if layers > SHAPE.n_layer:
        grow.freeze(model, "base")
    return model


def our_loop(o, model, objective, previous=None):
    """One step of train.py's loop. `previous`: the optimizer before a growth."""
    ev.keep_freed_memory()
    optimizer, batches = grow.make_optimizer(model, o.lr, o.weight_decay, previous), random_batches(o)

    def step():
        losses = torch.zeros(2, device=DEVICE)
        for x, y in batches():
            with autocast(o):
                nll, kd = objective(x, y)
            loss = (nll + o.kd_weight * kd) / o.grad_accum
            losses += torch.stack([nll, kd]).detach() / o.grad_accum
            loss.backward()
        torch.nn.utils.clip_grad_norm_(grow.trainable(model), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step.optimizer = optimizer
    return step


def ours(o, layers, compiled=False, distil=None, cast=False):
    model, teacher = grown(layers), None
    if distil == "shared":
        teacher = grow.original(model)
    if distil == "separate":
        teacher = copy.deepcopy(base()).to(DEVICE).requires_grad_(False)
    for p in model.parameters():
        if cast and p.dim() == 2 and not p.requires_grad:
            p.data = p.data.to(getattr(torch, o.dtype))  # for the timing only: embeddings too
    objective = grow.Objective(model, teacher, o.kd_temperature)
    if compiled:
        grow.compile_objective(objective)
    return our_loop(o, model, objective)


def their_model(layers):
    """GPT2LMHeadModel with our base's weights, grown by copies of blocks with zeroed output projections."""
    config = transformers.GPT2Config(
        vocab_size=SHAPE.vocab_size, n_positions=SHAPE.block_size, n_embd=SHAPE.n_embd, n_head=SHAPE.n_head,
        n_layer=SHAPE.n_layer, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=SHAPE.vocab_size - 1, eos_token_id=SHAPE.vocab_size - 1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    weights = {f"transformer.{k}": p.t() if is_linear(k) else p for k, p in base().named_parameters()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)  # tied to wte
    blocks, inserted = model.transformer.h, []
    for at in placements(layers):
        block = copy.deepcopy(blocks[at - 1])
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            torch.nn.init.zeros_(projection.weight)
            torch.nn.init.zeros_(projection.bias)
        blocks.insert(at, block)
        inserted.append(block)
    for i, block in enumerate(blocks):
        block.attn.layer_idx = i
    model.config.n_layer = len(blocks)
    if inserted:
        model.requires_grad_(False)
        for block in inserted:
            block.requires_grad_(True)
    return model.to(DEVICE).train()


def theirs(o, layers, compiled=False):
    """The plain loop of a user of transformers."""
    model = their_model(layers)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, batches = torch.optim.AdamW(params, lr=o.lr, weight_decay=o.weight_decay), random_batches(o)
    forward = torch.compile(model) if compiled else model

    def step():
        for x, _ in batches():
            with autocast(o):
                loss = forward(input_ids=x, labels=x).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs_keeping(*args, **more):
    """With the memory setting that ours runs under: what of the difference is that?"""
    ev.keep_freed_memory()
    return theirs(*args, **more)


# ------------------------------------------------------------------------------------------------------------
# Rows


def row_1(dtypes):
    """The card's training step, 8 x 128 tokens: milliseconds (median), times faster, peak memory in GB"""
    model, other = grown(SHAPE.n_layer + 1), their_model(SHAPE.n_layer + 1)
    x = torch.arange(64, device=DEVICE)[None]
    with torch.no_grad():
        difference = (model(x)[0] - other(x).logits).abs().max().item()
    assert difference < 1e-2, f"ours and theirs do not compute the same: {difference}"
    del model, other
    results = {}
    for dtype, layers in itertools.product(dtypes, range(SHAPE.n_layer, SHAPE.n_layer + GROWTHS + 1)):
        o, trains = options(dtype), "all train" if layers == SHAPE.n_layer else "base frozen"
        kinds = {"transformers": theirs, "ours": ours}
        builders = variants({kind: functools.partial(build, o, layers) for kind, build in kinds.items()})
        if DEVICE.type == "cpu":
            builders["transformers, memory kept"] = functools.partial(theirs_keeping, o, layers)
        name = f"{dtype}, {layers} blocks, {trains}"
        results[name] = take_turns(builders)
        print(f"\n{name}\n{table(results[name], 'transformers')}", flush=True)
    return f"largest difference of their logits: {difference:.1e}\n\n{side_by_side(results)}", results


def side_by_side(results):
    """One table of row 1's results."""
    kinds = ["transformers", "ours", "transformers, memory kept", "transformers, compiled", "ours, compiled"]
    rows = []
    for name, r in results.items():
        found = [r.get(kind, {}) for kind in kinds]
        both = [found[0] and x for x in (found[1], found[4])]  # {} where one of the two could not run
        times = [number(found[0]["ms"] / x["ms"] if x else None, ".2f") for x in both]
        memory = " / ".join(number(x.get("peak_gb"), ".1f") for x in (found[0], found[1], found[4]))
        rows.append([name, *(number(x.get("ms"), ".0f") for x in found), *times, memory])
    head = ["step", *kinds, "times: ours", "ours, compiled", "GB: transformers / ours / ours, compiled"]
    return markdown(head, rows)


def head_step(o, rows, trains, T, compiled):
    """Final norm, head and loss, forward and backward; of the head's `rows` only the vocabulary counts."""
    ev.keep_freed_memory()
    norm, tokens, V = torch.nn.LayerNorm(SHAPE.n_embd).to(DEVICE), ARGS.batch_size * T, SHAPE.vocab_size
    weight = torch.nn.Parameter(torch.randn(rows, SHAPE.n_embd, device=DEVICE) * 0.02, trains)
    norm.requires_grad_(trains)
    x = torch.randn(1, tokens, SHAPE.n_embd, device=DEVICE, requires_grad=True)
    y = torch.randint(V, (1, tokens), device=DEVICE)

    def loss(x):  # the padded ids are cut off: none can be predicted or sampled
        return cross_entropy(F.linear(norm(x), weight)[..., :V], y).mean()

    loss = torch.compile(loss, dynamic=False) if compiled else loss

    def step():
        with autocast(o):
            value = loss(x)
        value.backward()
        x.grad = weight.grad = norm.weight.grad = norm.bias.grad = None

    return step


def row_1b(dtypes):
    """Final norm, head and loss: 50,257 rows of the matrix against 50,304, forward and backward"""
    V, padded = SHAPE.vocab_size, -(-SHAPE.vocab_size // 64) * 64
    text, results = "", {}
    lengths = [ARGS.block_size] + ([1024] if DEVICE.type == "cuda" else [])
    for dtype, T, trains in itertools.product(dtypes, lengths, (False, True)):
        name = f"{dtype}, {ARGS.batch_size} x {T} tokens, matrix {'trained' if trains else 'frozen'}"
        kinds = {str(n): functools.partial(head_step, options(dtype), n, trains, T) for n in (V, padded)}
        results[name] = take_turns(variants(kinds), 3 * ARGS.rounds)
        text += f"\n\n{name}\n\n" + table(results[name], str(V))
    return text.strip(), results


def row_1c(dtypes):
    """Frozen matrices kept in bfloat16 against float32 that autocast casts in every step, 15 blocks"""
    if "bfloat16" not in dtypes:
        return "no native bfloat16 here", {}
    step = functools.partial(ours, options("bfloat16"), SHAPE.n_layer + GROWTHS)
    results = take_turns(variants({"float32": step, "bfloat16": functools.partial(step, cast=True)}))
    return table(results, "float32"), results


def replayed(o, compiled):
    """The whole step of 15 blocks, recorded once as a CUDA graph."""
    model = grown(SHAPE.n_layer + GROWTHS)
    objective = grow.Objective(model)
    if compiled:
        grow.compile_objective(objective)
    optimizer, batches = grow.make_optimizer(model, o.lr, o.weight_decay), random_batches(o)
    for group in optimizer.param_groups:
        group["capturable"] = True
    ((x, y),) = batches()  # where every replay finds its batch

    def whole_step():
        with autocast(o):
            loss, _ = objective(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(grow.trainable(model), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    graph = None

    def step():
        nonlocal graph
        if graph is None:  # the first step records; the graph uses the tensors that whole_step keeps alive
            graph = recorded(whole_step)
        ((new_x, new_y),) = batches()
        x.copy_(new_x), y.copy_(new_y)
        graph.replay()

    return step


def recorded(whole_step):
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            whole_step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        whole_step()
    return graph


def row_1d(dtypes):
    """The step of 15 blocks launched kernel by kernel, and replayed as one CUDA graph"""
    if DEVICE.type != "cuda":
        return "CUDA only", {}
    o = options(dtypes[-1])
    launched = functools.partial(ours, o, SHAPE.n_layer + GROWTHS)
    results = take_turns(variants({"launched": launched, "replayed": functools.partial(replayed, o)}))
    for name in [name for name in results if name.startswith("replayed")]:
        results[name]["peak_gb"] = None  # a replay allocates nothing: its peak would be the weights alone
    return f"{dtypes[-1]}\n\n{table(results, 'launched')}", results


def products(o, layers):
    """The matrix products of a step's linear layers and head, one after the other, and nothing else."""
    ev.keep_freed_memory()
    C, tokens, dtype = SHAPE.n_embd, o.batch_size * o.block_size, getattr(torch, o.dtype)
    block, pairs, inserted = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)], [], [*placements(layers)]
    for i, at in enumerate(inserted):  # where the blocks are in the end
        inserted[:i] = [j + (j >= at) for j in inserted[:i]]
    everything, lowest = not inserted, min(inserted, default=0)

    def linear(n_in, n_out, passes_on, trains):
        def random(*shape):
            return torch.randn(shape, dtype=dtype, device=DEVICE)

        x, w, gradient = random(tokens, n_in), random(n_out, n_in), random(tokens, n_out)
        pairs.append((x, w.t()))
        if passes_on:
            pairs.append((gradient, w))
        if trains:
            pairs.append((gradient.t(), x))

    for i, (n_in, n_out) in itertools.product(range(layers), block):
        linear(n_in, n_out, i >= lowest, everything or i in inserted)
    linear(C, SHAPE.vocab_size, True, everything)

    def step():
        for a, b in pairs:
            torch.mm(a, b)

    return step


def row_1e(dtypes):
    """The matrix products of row 1's steps alone: what computes the same can hardly take less"""
    results, rows = {}, []
    for dtype in dtypes:
        depths = range(SHAPE.n_layer, SHAPE.n_layer + GROWTHS + 1)
        names = {f"{dtype}, {layers} blocks": layers for layers in depths}
        results |= take_turns({k: functools.partial(products, options(dtype), n) for k, n in names.items()})
    for name, r in results.items():
        rows.append([name, number(r["ms"], ".0f"), number(r["fastest_ms"], ".0f")])
    return markdown(["products of", "ms (median)", "fastest"], rows), results


def growth_pauses(o, how):
    """Seconds at the start and at each growth: of growing, of the first step after it, of the median step."""
    torch._dynamo.reset()
    model, results = copy.deepcopy(base()).to(DEVICE), []
    objective = grow.Objective(model)
    if how == "per block":
        grow.compile_objective(objective)
    else:
        objective.compile(dynamic=False)
    step = our_loop(o, model, objective)
    for event in range(GROWTHS + 1):
        began = time.perf_counter()
        if event:  # what train.py does in between, but for evaluations, the identity check and the FLOP count
            block = grow.insert_block(model, grow.placement("upper", model, event - 1, GROWTHS))
            if how == "per block":
                block.compile(dynamic=False)
            grow.freeze(model, "base")
            step = our_loop(o, model, objective, step.optimizer)
        sync()
        between, first = time.perf_counter() - began, seconds(step)
        seconds(step)  # the second
        median = statistics.median(seconds(step) for _ in range(ARGS.rounds))
        results.append({"between_s": between, "first_s": first, "median_s": median})
        print(f"  {how}, event {event}: first step {first:.2f} s", file=sys.stderr, flush=True)
    return results


def row_2(dtypes):
    """The pause of a growth: what comes between two steps, and the first step after it, in median steps"""
    if not ARGS.can_compile:
        return "compiling is impossible here", {}
    rows, results = [], {}
    for how in ("per block", "whole model"):
        with fresh_cache():
            results[how] = growth_pauses(options(dtypes[-1]), how)
        for event, r in enumerate(results[how]):
            times = [f"{1000 * r['between_s']:.0f}", f"{r['first_s']:.2f}", f"{1000 * r['median_s']:.1f}"]
            what = f"{how}, {f'growth {event}' if event else 'start'}"
            rows.append([what, SHAPE.n_layer + event, *times, f"{r['first_s'] / r['median_s']:.1f}"])
    head = ["event", "layers", "growing, ms", "first step, s", "median step, ms", "first / median"]
    return f"{dtypes[-1]}\n\n" + markdown(head, rows), results


def row_3(dtypes):
    """Distillation on the training batch, 15 layers: no teacher, one sharing lower blocks, a second one"""
    o, text = options(dtypes[-1], kd_weight=1.0), dtypes[-1]
    kinds = {"none": None, "shared": "shared", "separate": "separate"}
    kinds = {
        kind: functools.partial(ours, o, SHAPE.n_layer + GROWTHS, distil=distil)
        for kind, distil in kinds.items()
    }
    results = take_turns(variants(kinds))
    for name, r in results.items():
        none = results.get("none, compiled" if "compiled" in name else "none")
        r["over_none"] = none and r["ms"] / none["ms"]
    cost = {name: number(r["over_none"], ".2f") for name, r in results.items()}
    return f"{text}\n\n{table(results, 'separate', ('of a step without', cost))}", results


def row_4(dtypes):
    """Full training at T = 1024, the largest batch that fits: tokens/s and share of the GPU's peak (MFU)"""
    if DEVICE.type != "cuda":
        return "CUDA only", {}
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    multiply = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    seconds(multiply, 10)
    peak = 2 * 8192**3 / statistics.median(seconds(multiply, 20) for _ in range(10))
    del a, b, multiply
    N, L, C, T = sum(p.numel() for p in base().parameters()), SHAPE.n_layer, SHAPE.n_embd, SHAPE.block_size
    flops = 6 * (N - T * C) + 12 * L * C * T  # of a token (PaLM, appendix B); positions multiply nothing
    text = f"bfloat16; peak {peak / 1e12:.0f} TFLOP/s, measured with a product of 8192 x 8192 matrices"
    rows, results = [], {}
    for name, build in variants({"transformers": theirs, "ours": ours}).items():
        for batch in (128, 64, 32, 16, 8, 4):  # alone on the GPU, so that each gets its own largest
            o, tried = options("bfloat16", block_size=T, batch_size=batch), f"{name}, batch {batch}"
            r = take_turns({tried: functools.partial(build, o, L)}).get(tried)
            if r:
                speed = batch * T / r["ms"] * 1000
                results[name] = {**r, "batch": batch, "tokens_per_s": speed, "mfu": speed * flops / peak}
                rows.append([name, batch, f"{r['ms']:.1f}", f"{speed:,.0f}", f"{speed * flops / peak:.1%}"])
                rows[-1] += [f"{r['peak_gb']:.1f}", f"{r['first_s']:.1f}"]
                break
    head = ["variant", "batch", "ms a step", "tokens/s", "MFU", "peak, GB", "first step, s"]
    text += (
        f"\n\n{markdown(head, rows)}\n\nPublished, tokens/s a GPU: nanoGPT A100 107k (29%), build-nanogpt "
    )
    text += "A100 182k (50%), llm.c A100 231k (63%) and H100 468k (40%)."
    return text, {"peak": peak, **results}


LOAD = """
import json, sys, time
def memory(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 2**20
import torch, torch._dynamo  # which our loader imports on its way, as every run does
who, folder, device = sys.argv[1:]
if who == "ours":
    from model import GPT
    load = GPT.from_pretrained
else:
    from transformers import GPT2LMHeadModel
    load = lambda folder: GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
torch.zeros(1, device=device)
linux = sys.platform == "linux"
before, began = memory("VmRSS") if linux else None, time.perf_counter()
model = load(folder).to(device)
if device == "cuda":
    torch.cuda.synchronize()
took, size = time.perf_counter() - began, sum(p.numel() for p in model.parameters())
total = sum(p.sum() for p in model.parameters()).item()  # a loader may leave the reading to the first use
read = time.perf_counter() - began
print(json.dumps([took, read, memory("VmHWM") - before if linux else None, size]))
"""


def row_5(dtypes):
    """From a folder to a model on the device, a new process each time, files in the page cache"""
    rows, results = [], {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        write_openai_checkpoint(f"{folder}/openai", base())
        their_model(SHAPE.n_layer).cpu().save_pretrained(f"{folder}/huggingface")
        cases = [("ours", "openai"), ("ours", "huggingface"), ("transformers", "huggingface")]
        runs = {case: [] for case in cases}
        for _, (who, what) in itertools.product(range(ARGS.rounds), cases):
            command = [sys.executable, "-c", LOAD, who, f"{folder}/{what}", DEVICE.type]
            run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
            runs[who, what].append(json.loads(run.stdout.splitlines()[-1]))
    assert len({n for measured in runs.values() for *_, n in measured}) == 1, "not the same model"
    for (who, what), measured in runs.items():
        took, read, peaks, _ = zip(*measured)
        r = {"seconds": statistics.median(took), "read_s": statistics.median(read)}
        r |= {"spread_s": max(read) - min(read), "peak_gb": statistics.median(peaks) if peaks[0] else None}
        results[f"{who}, {what} folder"] = r
        times = [f"{r[key]:.3f}" for key in ("seconds", "read_s", "spread_s")]
        rows.append([f"{who}, {what} folder", *times, number(r["peak_gb"], ".2f")])
    head = ["loader and format", "loaded, s", "and read, s", "max - min", "peak memory added, GB"]
    return markdown(head, rows), results


def row_6(dtypes):
    """The whole card run, with stand-ins for GPT-2's weights, WikiText-2 and WebText of their sizes"""
    if DEVICE.type != "cuda" and not ARGS.quick:
        return "CUDA only; on a CPU it takes hours: python tests/bench.py --rows=6 --device=cuda", {}
    rng, words = random.Random(0), data.docs()["train"].split()  # real words: as many tokens as real text

    def text(size, line):
        made, length = [], 0
        while length < size - 9000:  # a line is shorter
            made.append(line(" ".join(rng.choices(words, k=300))))
            length += len(made[-1]) + 1
        return "\n".join(made).ljust(size)

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        small = ["--max_steps=12", "--grow_every=3", "--eval_every=6", "--test_windows=8", "--block_size=32"]
        network = GPT(GPTConfig(data.BYTES, 64, 2, 32, (0,) * 2)) if ARGS.quick else base()
        write_openai_checkpoint(f"{folder}/openai", network)
        data.set_cache_dir(f"{folder}/cache")
        Path(f"{folder}/text.txt").write_text(text(12_000_000, str), "utf-8")  # 90% to train on
        for split, size in data.WEBTEXT_BYTES.items():
            rows = text(size, lambda line: json.dumps({"text": line}))
            (data.cache_dir() / f"webtext.{split}.jsonl").write_text(rows)
        began = time.perf_counter()
        for name in (f"{folder}/text.txt", "webtext"):
            data.load(name, network.config.vocab_size, 32)
        tokenising = time.perf_counter() - began
        command = [sys.executable, "train.py", f"--init={folder}/openai", f"--dataset={folder}/text.txt"]
        command += [f"--out={folder}/run", f"--device={DEVICE.type}", f"--cache_dir={folder}/cache"]
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        command, began = command + (small if ARGS.quick else []), time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        wall = time.perf_counter() - began
        if run.returncode:
            return f"failed: {run.stderr.strip().splitlines()[-1]}", {}
        log = ev.read_run(f"{folder}/run")
    r, before, grew = log["result"], log["header"]["layers"], [e["step"] for e in log["event"]]
    parts = {"tokenising, once and for all runs": tokenising, "python train.py": wall}
    parts |= {"until its tables": r["seconds"], "training steps": r["train_seconds"]}
    tests = {name: splits["test"] for name, splits in log["header"]["tokens"].items()}
    said = f"{before} -> {r['layers']} layers at steps {grew}, {r['tokens']:,} tokens, tests of {tests}; "
    said += "; ".join(log["header"]["machine"]) + "\n\n"
    return said + markdown(["part", "seconds"], [[k, f"{v:.1f}"] for k, v in parts.items()]), parts


# ------------------------------------------------------------------------------------------------------------
# Where the time of a run goes


def profile(words, out):
    """`python train.py WORDS`, with a trace of its steps 5 to 14 and a table of the five largest kernels.

    (Where the demo's base is not there yet, these are steps of its training.)"""
    if train.parse(words).max_steps < 16:
        sys.exit("--profile traces steps 5 to 14: give the run 16 --max_steps or more")
    micro_batches = train.micro_batches

    def write(profiler):
        out.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(f"{out}/trace.json")
        cuda = torch.cuda.is_available()  # kernels are events of the device, and what launched them is not
        events = [e for e in profiler.key_averages() if (e.device_type.name == "CUDA") == cuda]
        events = [e for e in events if not e.is_user_annotation and not e.key.startswith("ProfilerStep")]
        ms = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1000 for e in events}
        largest = sorted(ms, key=ms.get, reverse=True)[:5]
        rows = [[key, f"{ms[key]:.1f}", f"{ms[key] / sum(ms.values()):.1%}"] for key in largest]
        print(markdown(["kernel", "ms in ten steps", "share"], rows))
        print(f"ten steps traced: open {out}/trace.json in chrome://tracing or ui.perfetto.dev", flush=True)

    # Five: the set-up and steps 0 to 3. A step begins where its batches are made.
    ten = torch.profiler.schedule(wait=5, warmup=1, active=10, repeat=1)
    with torch.profiler.profile(schedule=ten, on_trace_ready=write) as profiler:

        def next_step(*args):
            profiler.step()
            return micro_batches(*args)

        train.micro_batches = next_step
        train.main(words)


ROWS = {"1": row_1, "1b": row_1b, "1c": row_1c, "1d": row_1d, "1e": row_1e}
ROWS |= {"2": row_2, "3": row_3, "4": row_4, "5": row_5, "6": row_6}


# ------------------------------------------------------------------------------------------------------------
# Command line


def machine():
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    cpu = f"{name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}; {cpu}" if DEVICE.type == "cuda" else cpu


def main():
    global ARGS, DEVICE, SHAPE
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    p.add_argument("--quick", action="store_true", help="small networks, two rounds")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--dtypes", default="", help="empty: float32 and what is native on a CPU, else bfloat16")
    p.add_argument("--rounds", type=int, default=0, help="0: 5 on a CPU, 10 on CUDA")
    p.add_argument("--out", default="out/bench", help="folder for bench.md and bench.json")
    p.add_argument("--profile", metavar="WORDS", help="trace ten steps of `python train.py WORDS` instead")
    ARGS = p.parse_args()
    if ARGS.profile is not None:
        return profile(shlex.split(ARGS.profile), Path(ARGS.out))
    unknown = set(ARGS.rows.split(",")) - set(ROWS)
    if unknown:
        p.error(f"no row {', '.join(sorted(unknown))}: give some of {', '.join(ROWS)}")
    DEVICE, dtype, reasons = ev.choose_machine(ARGS.device)
    ARGS.can_compile, why = ev.choose_compile("1", DEVICE)
    reasons.append(f"compile {int(ARGS.can_compile)}: {why}")
    ARGS.rounds = ARGS.rounds or (2 if ARGS.quick else 10 if DEVICE.type == "cuda" else 5)
    ARGS.batch_size, ARGS.block_size = 8, 128
    if ARGS.quick:
        SHAPE, ARGS.block_size = GPTConfig(1001, 64, 4, 64, (0,) * 4), 32
    both = ["float32", "bfloat16"] if dtype == torch.bfloat16 else ["float32"]
    dtypes = ARGS.dtypes.split(",") if ARGS.dtypes else both[-1:] if DEVICE.type == "cuda" else both
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__}
    report = {
        "date": f"{datetime.date.today()}", "machine": machine(), "versions": versions, "quick": ARGS.quick,
        "choices": reasons, "rounds": ARGS.rounds, "notes": NOTES, "rows": {},
    }  # fmt: skip
    said = ", ".join(f"{k} {v}" for k, v in versions.items())
    parts = [f"{report['date']}; {report['machine']}; {said}; medians of {ARGS.rounds} rounds"]
    parts += ["--quick: these figures say only that the program works"] if ARGS.quick else []
    print(parts[0], flush=True)
    out = Path(ARGS.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ARGS.rows.split(","):
        print(f"row {name}", file=sys.stderr, flush=True)
        release()
        began = time.perf_counter()
        text, results = ROWS[name](dtypes)
        parts.append(f"### Row {name}: {ROWS[name].__doc__}\n\n{text}")
        print(f"\n{parts[-1]}\n({time.perf_counter() - began:.0f} s for this row)", flush=True)
        report["rows"][name] = {"seconds": time.perf_counter() - began, "results": results}
        notes = [f"Not measured: {note}" for note in NOTES]
        (out / "bench.md").write_text("\n\n".join([*parts, *notes]) + "\n")  # after each row: none is lost
        (out / "bench.json").write_text(json.dumps(report, indent=1))
    print(f"\n{out}/bench.md, {out}/bench.json")


if __name__ == "__main__":
    main()
