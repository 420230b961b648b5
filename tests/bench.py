"""The benchmark: this repository beside transformers, taking turns.

    python tests/bench.py                              every row that this machine can measure
    python tests/bench.py --rows=1,2 --out=out/bench   some of them; OUT keeps the rows of earlier calls
    python tests/bench.py --quick                      does it work? tiny networks, one round, few processes

Ours are train.py's own parts, called as train.py calls them; theirs is GPT2LMHeadModel grown and frozen the
same way, in its users' plain loop, with the same random weights of GPT-2 124M's shape. Each variant lives in
a process of its own, and all of a group take turns, so that whatever else the machine does meets all. Figures
are medians over rounds (fewer if a row takes ten minutes) without the first step, which compiles."""

import copy
import functools
import itertools
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from openai_format import write_openai_checkpoint  # noqa: E402

import data  # noqa: E402
import eval as ev  # noqa: E402
import grow  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig, is_linear  # noqa: E402

TITLES = {
    "1": "the card's training step: before the first growth all trains, then only grown blocks",
    "1d": "the step of 15 blocks launched kernel by kernel, and replayed as one CUDA graph",
    "2": "the first step after a growth, in usual steps",
    "3": "distillation on the training batch, 15 blocks: teacher none, sharing the lower blocks, separate",
    "4": "full training at 1,024 tokens, by rows of a batch",
    "5": "a text of 100 MB: by tiktoken alone, at the first start, at later ones; units are its MB",
    "6": "the whole card: first with cold kernels and without tokens, then with both",
    "7": "8 windows evaluated: one network, and two versions mixed, by placement",
    "8": "8 tokens sampled behind a prompt: one network, and two versions mixed, by length of the prompt",
}
FEW = ("5", "6")  # rows of two rounds
GROWTHS = 3
TOKENS = np.random.default_rng(0).integers(0, 1001, 2_000_000).astype(np.uint16)
ARGS = DEVICE = SHAPE = None  # set by `settle`
STEPS, BEFORE = {}, 0  # of the variant that lives in this process, and GB in use before it was built

# ----- Processes that take turns -----


def settle(args, device, shape):
    """What every process starts with."""
    globals().update(ARGS=args, DEVICE=device, SHAPE=shape)
    torch._dynamo.config.recompile_limit = 64  # like the next, what train.py sets
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if not args.quick:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=args.folder)


def seconds(row, group, name, repeat):
    """In a variant's process, which the first call builds: (seconds of a step, GB in use at most since then,
    over what was in use before: its weights, gradients, optimizer and activations)."""
    global BEFORE
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    try:
        if (row, name) not in STEPS:
            base()  # what all variants copy from does not count as theirs
            BEFORE = peak_memory()
            STEPS[row, name] = groups(row)[group][1][name]()
        wait()
        began = time.perf_counter()
        for _ in range(repeat):
            STEPS[row, name]()
        wait()
        return (time.perf_counter() - began) / repeat, peak_memory() - BEFORE
    except Exception as e:  # not all of torch's own survive the way back
        raise RuntimeError(f"{type(e).__name__}: {e}".splitlines()[0][:200]) from None


def peak_memory():
    """GB that this process has had in use at most. (A child of Linux counts from its birth.)"""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def take_turns(row, group, until, notes):
    """A dict of figures for each variant of the group that could run; of the others, a note."""
    units, builders = groups(row)[group]
    context = multiprocessing.get_context("forkserver")  # forked where these are imported, and nothing done
    preload = ["torch", "torch._dynamo", "transformers.models.gpt2.modeling_gpt2"]
    context.set_forkserver_preload(preload[:2] if ARGS.quick else preload)
    own = not ARGS.quick or row == "2"  # else all lives in this process
    process = lambda: ProcessPoolExecutor(1, context, settle, (ARGS, DEVICE, SHAPE))
    processes = {name: process() for name in builders} if own else {}
    found = {name: {"variant": name, "seconds": []} for name in builders}
    for turn in range(2 if row in FEW else 1 + ARGS.rounds):  # the first compiles
        repeat = 10 if turn and DEVICE.type == "cuda" and row not in FEW else 1
        for name, r in list(found.items()):
            if turn < 2 or time.perf_counter() < until:
                try:
                    what = seconds, row, group, name, repeat
                    took, r["peak_gb"] = processes[name].submit(*what).result() if own else seconds(*what[1:])
                    r["seconds"].append(took)
                except Exception as e:  # or its process died
                    notes.append(f"not measured: {name}: {e}")
                    del found[name]
    for process in processes.values():
        process.shutdown()
    results = list(found.values())
    for r in results:
        r["first_s"], *later = r.pop("seconds")
        r |= {"ms": 1000 * float(np.median(later)), "rounds": len(later)}
        r |= {"units_s": 1000 * units / r["ms"], "times": results[0]["ms"] / r["ms"]}
    return results


# ----- Ours and theirs: functions that return a step -----


def options(**more):
    """train.py's options, and what its loop makes of them: autocast, and a step's micro-batches."""
    o = train.Options(**{"device": DEVICE.type, "dtype": ARGS.dtype, "block_size": ARGS.block_size, **more})
    o.autocast = torch.autocast(DEVICE.type, getattr(torch, o.dtype), enabled=o.dtype != "float32")
    counter, texts = itertools.count(), {"learn": {"train": TOKENS}, "retain": None}
    o.batches = lambda: train.micro_batches(o, texts, None, next(counter), DEVICE)
    return o


@functools.cache
def base():
    torch.manual_seed(0)
    return GPT(SHAPE)


def grow_once(model, growth, where="upper"):
    grow.insert_block(model, grow.placement(where, model, growth, GROWTHS))
    grow.freeze(model, "base")


def grown_base(growths, where="upper"):
    model = copy.deepcopy(base())
    for growth in range(growths):
        grow_once(model, growth, where)
    return model


def ours(o, growths, compiled=False, teacher="none", steps_between=0):
    """train.py's step after so many growths."""
    ev.keep_freed_memory()
    model = copy.deepcopy(base()).to(DEVICE)
    objective = grow.Objective(model, temperature=o.kd_temperature)

    def step():
        losses = torch.zeros(2, device=DEVICE)
        for x, y in o.batches():
            with o.autocast:
                nll, kd = objective(x, y)
            loss = (nll + o.kd_weight * kd) / o.grad_accum
            losses += torch.stack([nll, kd]).detach() / o.grad_accum
            loss.backward()
        torch.nn.utils.clip_grad_norm_(grow.trainable(model), o.grad_clip)
        step.optimizer.step()
        step.optimizer.zero_grad(set_to_none=True)

    for growth in range(growths + 1):
        if growth:
            for _ in range(steps_between):
                step()
            grow_once(model, growth - 1)
        if growth == growths and teacher != "none":
            separate = copy.deepcopy(base()).to(DEVICE).requires_grad_(False)
            objective.teacher = separate if teacher == "separate" else grow.original(model)
        if compiled:
            grow.compile_objective(objective)
        carried = grow.optimizer_state(model, step.optimizer) if growth else ()
        step.optimizer = grow.make_optimizer(model, o.lr, o.weight_decay, carried)
    return step


def replayed(o, growths, compiled):
    """Our step recorded once as a CUDA graph."""
    whole_step = ours(o, growths, compiled)
    for group in whole_step.optimizer.param_groups:
        group["capturable"] = True
    batches = o.batches
    ((x, y),) = batches()  # where every replay finds its batch
    o.batches = lambda: [(x, y)]
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            whole_step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        whole_step()

    def step():
        ((new_x, new_y),) = batches()
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()

    step.keeps = whole_step  # whose tensors the graph uses
    return step


def theirs(o, growths, compiled=False):
    """The plain loop of a user of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    like = grown_base(growths)
    sizes = {key: getattr(like.config, key) for key in ("vocab_size", "n_embd", "n_layer", "n_head")}
    sizes |= dict(n_positions=SHAPE.block_size, bos_token_id=0, eos_token_id=0, use_cache=False)
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()  # no dropout
    for name, p in like.named_parameters():
        their_p = model.transformer.get_parameter(name)
        their_p.data.copy_(p.t() if is_linear(name) else p)
        their_p.requires_grad_(p.requires_grad)
    x = torch.arange(64)[None]
    torch.testing.assert_close(model(x).logits, like(x)[0], atol=1e-2, rtol=0.0)
    model.to(DEVICE)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=o.lr, weight_decay=o.weight_decay)
    forward = torch.compile(model) if compiled else model

    def step():
        for x, _ in o.batches():
            with o.autocast:
                loss = forward(input_ids=x, labels=x).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def whole_card():
    """A run of train.py on texts as large as WikiText-2 and WebText. Tokenizer: TIKTOKEN_CACHE_DIR's."""
    folder, model, command, most = ARGS.folder, base(), f"--device={DEVICE.type}", 27_000_000
    if ARGS.quick:
        model, most = GPT(GPTConfig(data.BYTES, 64, 2, 32, (0,) * 2)), 100_000
        command += " --max_steps=4 --grow_every=1 --eval_windows=4 --test_windows=4 --block_size=32"
    command += f" --init={write_openai_checkpoint(folder / 'init', model)}"
    for name, source, size in (("dataset", data.code(), 12_000_000), ("retain", data.docs(), 27_000_000)):
        text = "".join(data.pieces(source["train"]))[:most]
        (folder / name).write_text((text * 99)[: min(size, most)], "utf-8")
        command += f" --{name}={folder}/{name}"
    more = {"GROWING_GPT_CACHE": f"{folder}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/kernels"}
    runs = itertools.count()

    def step():
        words = f"{command} --out={folder}/run-{next(runs)}".split()
        if ARGS.quick:
            train.main(words)
        else:  # what it prints is its log
            subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, env=os.environ | more, check=True)

    return step


def long_text(way):
    data.cache_dir = lambda: ARGS.folder
    path, size = ARGS.folder / "long.txt", 100_000 if ARGS.quick else 100_000_000
    if not path.exists():
        text = "".join(data.pieces(data.code()["train"])).encode()
        path.write_bytes((text * (size // len(text) + 1))[:size])

    def step():
        if way == "tiktoken":
            return data._bpe().encode_to_numpy(path.read_text("utf-8"), disallowed_special=())
        if way == "first":
            shutil.rmtree(ARGS.folder / "tokens", ignore_errors=True)
        return data.load(str(path), data.BYTES if ARGS.quick else data.GPT2, 128)

    return step


def mixture(n, mixed="", prompt=0):
    """Windows evaluated, or tokens sampled behind a prompt, by a finished network, mixed with the one before
    if told where it grew."""
    ev.keep_freed_memory()
    o, model = options(), grown_base(GROWTHS, mixed or "upper").to(DEVICE).eval()
    model.config.versions = (0, GROWTHS)
    nets = [grow.version(model, g) for g in model.config.versions[0 if mixed else 1 :]]
    ids = torch.from_numpy(TOKENS[:prompt].astype(np.int64))[None].to(DEVICE)  # (1, T)
    do = lambda: ev.measure(nets, TOKENS, o.block_size, o.batch_size, n)
    if prompt:
        do = lambda: (ev.Mixture(nets) if mixed else model).generate(ids, n, 0.8, 50)
    return torch.no_grad()(o.autocast(do))


# ----- Rows -----


def groups(row):
    """[(units of a step: tokens, windows ..., {variant: its builder})]: the variants of each take turns."""
    o, P, cuda, quick = options(), functools.partial, DEVICE.type == "cuda", ARGS.quick
    growths = [2] if quick else range(GROWTHS + 1)
    tokens, both = o.batch_size * o.block_size, {"transformers": theirs, "ours": ours}
    ways = {"": False, ", compiled": True} if ARGS.compile else {"": False}

    def each_way(name, builders, *args):
        return {f"{name}{k}{w}": P(f, *args, way) for w, way in ways.items() for k, f in builders.items()}

    assert cuda or row not in ("1d", "4", "6") or (quick and row != "1d"), "it needs CUDA"
    if row == "1":
        return [(tokens, each_way(f"{SHAPE.n_layer + n} blocks, ", both, o, n)) for n in growths]
    if row == "1d":
        return [(tokens, each_way("", {"launched": ours, "replayed": replayed}, o, GROWTHS))]
    if row == "2":
        step = P(ours, o, compiled=not quick, steps_between=2)
        return [(tokens, {f"growth {n}": P(step, n) for n in growths})]
    if row == "3":
        step, teachers = P(ours, options(kd_weight=1.0), GROWTHS), ("none", "shared", "separate")
        return [(tokens, {t + w: P(step, ways[w], teacher=t) for t in teachers}) for w in ways]
    if row == "4":
        found = []
        for B in (1,) if quick else (64, 32, 16):
            o = options(dtype="bfloat16", block_size=SHAPE.block_size, batch_size=B)
            variants = each_way(f"{B} rows, ", both, o, 0)  # one after the other: two may not fit
            found += [(B * o.block_size, {name: build}) for name, build in variants.items()]
        return found
    if row == "6":
        return [(1, {"python train.py": whole_card})]
    if row == "5":
        ways = ["first", "later"] if quick else ["tiktoken", "first", "later"]
        return [(100, {way: P(long_text, way) for way in ways})]
    n = 4 if quick else 8  # windows or new tokens
    if row == "7":
        places = {f"mixed, {where}": P(mixture, n, where) for where in ("top", "upper", "spread")}
        return [(n, {"one network": P(mixture, n), **places})]
    found = []
    for T in (16, 40) if quick else (120, 504, 1016):
        ways = {f"{name}, {T}": P(mixture, n, mixed, T) for name, mixed in (("one", ""), ("mixed", "upper"))}
        found.append((n, ways))
    return found


def measure(row, out):
    """Write the row into its file, unless that has figures and now there are none; then bench.md from all."""
    began, results, notes = time.perf_counter(), [], []
    try:
        for k in range(count := len(groups(row))):
            until = began + 480 * (k + 1) / count  # then no further round begins
            results += take_turns(row, k, until, notes)
    except Exception as e:  # a row that cannot run must not cost the others their figures
        notes.append(f"not measured: {e}")
    mode = f"{machine()}; {ARGS.dtype}{', --quick' * ARGS.quick}; {time.perf_counter() - began:.0f} s in all"
    kept = {"title": f"Row {row}: {TITLES[row]}", "results": results, "notes": [*notes, mode]}
    path = out / f"row-{row}-{DEVICE.type}-{ARGS.dtype}.json"
    if results or not path.exists() or not json.loads(path.read_text())["results"]:
        path.write_text(json.dumps(kept, indent=1))
    texts = [as_text(json.loads(path.read_text())) for path in sorted(out.glob("row-*.json"))]
    (out / "bench.md").write_text("\n".join(texts))
    print(f"\n{as_text(kept)}\n{out}/bench.md has all rows of this folder", flush=True)


def as_text(row):
    heads = ["ms a step", "rounds", "times the first's speed", "units a second", "first step, s", "in steps"]
    form = "{ms:.1f} {rounds} {times:.2f} {units_s:,.1f} {first_s:.2f} {in_steps:.1f} {peak_gb:.2f}"
    table = []
    for r in row["results"]:
        cells = form.format(**r, in_steps=1000 * r["first_s"] / r["ms"]).split()
        table.append({"variant": r["variant"], **dict(zip([*heads, "peak, GB"], cells))})
    notes = "\n".join(f"- {note}" for note in row["notes"])
    return "\n\n".join([f"## {row['title']}", *([ev.table(table)] if table else []), notes]) + "\n"


def machine():
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    there = f"{time.strftime('%Y-%m-%d')}; {name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    there += f"; python {platform.python_version()}, torch {torch.__version__}"
    return f"{there}, transformers {version('transformers')}"


def main(argv):
    p = ev.parser("python tests/bench.py [--option=value ...]", __doc__)
    p.add_argument("--rows", default=",".join(TITLES), help=f"of {', '.join(TITLES)}")
    p.add_argument("--quick", action="store_true", help="tiny networks, one round")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    p.add_argument("--out", default="out/bench", help="folder for bench.md")
    args = p.parse_args(argv)
    out, rows = Path(args.out), args.rows.split(",")
    out.mkdir(parents=True, exist_ok=True)
    if not TITLES.keys() >= set(rows):
        p.error(f"--rows={args.rows}: give some of {','.join(TITLES)}")
    device, dtype = ev.choose_machine(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    args.compile = not args.quick and ev.choose_compile("1", device)
    args.rounds = 1 if args.quick else 10 if device.type == "cuda" else 5
    args.block_size, shape = (32, GPTConfig(1001, 64, 4, 64, (0,) * 4)) if args.quick else (128, GPTConfig())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        args.folder = Path(folder)
        settle(args, device, shape)
        for row in rows:
            measure(row, out)


if __name__ == "__main__":
    ev.run_main(main)
