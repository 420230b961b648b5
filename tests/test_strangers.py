"""What people bring who have never seen this program: their networks, texts, terminals and habits.

Each test is one thing that went wrong for somebody, held against programs from elsewhere: transformers,
safetensors, huggingface_hub, torch.export, nohup, a pipe that closes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    BYTES,
    PLAIN,
    ROOT,
    SCRATCH,
    TINY,
    finished,
    needs_tiktoken,
    old_text,
    on_step,
    program,
    rows,
    tiny_gpt,
    typed,
    write_words,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, pipeline

import data
import eval as ev
import grow
import model as m
import train
from data import UserError
from model import GPT


def refused(act, *says):
    """The sentence of a UserError, which has all these words."""
    with pytest.raises(UserError) as e:
        act()
    sentence = str(e.value)
    assert all(word in sentence for word in says) and "\n" not in sentence, sentence
    return sentence


def config(**changes):
    """Who calls it with a network's folder changes its config.json; None takes a key away."""

    def act(net):
        values = json.loads((net / "config.json").read_text()) | changes
        values = {key: value for key, value in values.items() if value is not None}
        (net / "config.json").write_text(json.dumps(values))

    return act


@pytest.fixture
def net(tmp_path):
    """The folder of a small network of bytes that was grown twice; three versions are in it."""
    tiny_gpt((0, 0, 1, 2), BYTES, n_embd=16, versions=(0, 1, 2)).save_pretrained(tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture(autouse=True)
def anew():
    data.tell.cache_clear()  # what is said once, is said once a test


# ----- 1. Numbers that are wrong without a word -----


def swap(vocabulary):
    """The same tokens, two of them with each other's ids."""
    (a, i), (b, j) = list(vocabulary.items())[60:62]
    return vocabulary | {a: j, b: i}


VOCABULARIES = {  # what somebody made of it: whether the network can be used
    "re-serialised": (lambda v: dict(sorted(v.items(), reverse=True)), True),
    "without end of text": (lambda v: {token: i for token, i in v.items() if token != data.EOT}, True),
    "two ids swapped": (swap, False),
    "ids from 1 on": (lambda v: {token: i + 1 for token, i in v.items()}, False),
    "a token less": (lambda v: dict(list(v.items())[:-2]), False),
}


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("size", [BYTES, pytest.param(data.GPT2, marks=needs_tiktoken)])
@pytest.mark.parametrize("what", VOCABULARIES)
def test_a_network_is_read_with_its_own_tokenizer_or_not_at_all(tmp_path, what, size, file):
    tiny_gpt(vocab_size=size).save_pretrained(tmp_path)
    change, usable = VOCABULARIES[what]
    vocabulary = change(json.loads((tmp_path / "vocab.json").read_text()))
    (tmp_path / "vocab.json").unlink()
    content = vocabulary if file == "vocab.json" else {"model": {"type": "BPE", "vocab": vocabulary}}
    (tmp_path / file).write_text(json.dumps(content, indent=1, ensure_ascii=False))
    if usable:
        GPT.from_pretrained(tmp_path)
    else:
        run = typed(init=tmp_path, dataset="docs", retain="none", out=tmp_path / "run")
        refused(lambda: train.main(run), file, "tokenizer")
        assert not (tmp_path / "run").exists()


def test_versions_are_believed_only_as_this_program_wrote_them(net, tmp_path, capsys):
    """After 30 steps in transformers the last version stands alone; one line says so; no way back."""
    assert GPT.from_pretrained(net).config.versions == (0, 1, 2)
    theirs = GPT2LMHeadModel.from_pretrained(net)
    optimizer, ids = torch.optim.AdamW(theirs.parameters(), 1e-2), torch.randint(BYTES, (4, 16))
    for _ in range(30):
        theirs(ids, labels=ids).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "trained")
    assert json.loads((tmp_path / "trained/config.json").read_text())["versions"] == [0, 1, 2]
    capsys.readouterr()
    for _ in range(2):
        again = GPT.from_pretrained(tmp_path / "trained").eval()
    assert again.config.versions == (2,) and again.config.generation == (0, 0, 1, 2)
    assert capsys.readouterr().err.count("last version stands alone") == 1
    assert torch.allclose(again(ids)[0], theirs.eval()(ids).logits, atol=1e-4)
    back = [str(tmp_path / "trained"), "--version=0", f"--out={tmp_path / 'never'}"]
    refused(lambda: ev.main(back), "no version 0")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("size", [BYTES, pytest.param(data.GPT2, marks=needs_tiktoken)])
@pytest.mark.parametrize("fast", [True, False])
def test_transformers_has_the_ids_of_data_encode(tmp_path, size, fast):
    tiny_gpt(vocab_size=size).save_pretrained(tmp_path)
    tokenizer, draw = AutoTokenizer.from_pretrained(tmp_path, use_fast=fast), random.Random(0)
    alphabet = [*map(chr, range(0, 0x250)), "\u4e2d", "\U0001f600", " ", "\n", " a", "'s", ".", data.EOT] * 2
    for _ in range(500):
        text = "".join(draw.choices(alphabet, k=draw.randrange(40)))
        ids = tokenizer(text)["input_ids"]
        assert ids == data.encode(text, size).tolist()
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == size - 1 and len(tokenizer) == size
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False
    )


def test_the_pipeline_of_transformers_continues_a_prompt_of_bytes(net):
    generate = pipeline("text-generation", str(net))
    told = generate("ab", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    ours = ev.sample([GPT.from_pretrained(net).eval()], "ab", 8, temperature=0)
    assert told.replace(data.EOT, "") == ours and len(ours) > 2


def test_a_plateau_is_due_one_evaluation_before_reduce_lr_on_plateau():
    assert "waits for one more" in grow.plateau.__doc__
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD([torch.zeros(1)], lr=1.0), patience=3, threshold=0.01, threshold_mode="abs"
    )
    evals, due, lowered = [], [], []
    for step in range(8):
        evals.append((step, 1.0))
        due.append(grow.plateau(evals, 3, 0.01))
        scheduler.step(1.0)
        lowered.append(scheduler.get_last_lr() != [1.0])
    assert due.index(True) + 1 == lowered.index(True)


# ----- 2. Lost files, lost work -----


def test_saving_replaces_only_what_it_writes(net, tmp_path):
    others = {
        "thesis.tex": b"all of it",
        "model.gguf": b"quantised",
        "deep/notes.md": b"mine",
        "README.md": b"card",
    }
    for name, raw in others.items():
        (net / name).parent.mkdir(exist_ok=True)
        (net / name).write_bytes(raw)
    other = tiny_gpt((0,), BYTES, seed=1)
    other.save_pretrained(net)
    other.save_pretrained(net / "deep" / "..")
    assert all((net / name).read_bytes() == raw for name, raw in others.items())
    assert torch.equal(GPT.from_pretrained(net).wte.weight, other.wte.weight)
    assert not list(net.rglob("*.tmp"))


@pytest.mark.parametrize("fails", ["model.safetensors", "config.json"])
def test_a_write_that_fails_leaves_what_was_there(net, monkeypatch, fails):
    """Each file is renamed when it is whole, the weights first."""
    before, replace, renamed = {p.name: p.read_bytes() for p in net.iterdir()}, os.replace, []

    def full(source, target):
        if target.name == fails:
            raise OSError(28, "No space left on device")
        renamed.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        tiny_gpt((0,), BYTES, seed=1).save_pretrained(net)
    assert renamed == ([] if fails == "model.safetensors" else ["model.safetensors"])
    after = {p.name: p.read_bytes() for p in net.iterdir()}
    assert {name for name in before if before[name] != after[name]} == set(
        renamed
    ) and after.keys() == before.keys()


def test_weights_and_shape_come_from_the_files_written_last(tmp_path):
    """What lies beside them from an earlier, divided or OpenAI's network is not read."""
    large = GPT2LMHeadModel.from_pretrained(save(tmp_path / "a", n_embd=16))
    large.save_pretrained(tmp_path / "b", max_shard_size="5KB")
    (tmp_path / "b" / "hparams.json").write_text("{}")
    ours = tiny_gpt(vocab_size=BYTES, n_embd=16, seed=3)
    ours.save_pretrained(tmp_path / "b")
    assert torch.equal(GPT.from_pretrained(tmp_path / "b").wte.weight, ours.wte.weight)


def save(folder, **more):
    tiny_gpt(vocab_size=BYTES, **more).save_pretrained(folder)
    return folder


def arguments(folder, **changes):
    """A run that lasts until it is stopped."""
    texts = dict(dataset=write_words(folder), retain="none", out=folder / "run")
    return typed(**TINY | SCRATCH | PLAIN | texts | dict(max_steps=1_000_000, eval_every=1_000_000) | changes)


def until_it_trains(process, folder, steps=3):
    log = folder / "run" / "metrics.jsonl"
    while not log.exists() or log.read_text().count('"kind": "step"') < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_closed_terminal_stops_a_run_in_order(tmp_path):
    """The shell and the system both send SIGHUP; all that was computed is saved."""
    process = program("train.py", *arguments(tmp_path))
    try:
        until_it_trains(process, tmp_path)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        status, printed = finished(process)
    finally:
        process.kill()
    assert status == 128 + signal.SIGHUP and "--resume continues it" in printed
    assert data.load_checkpoint(tmp_path / "run/ckpt.pt")["step"] == len(rows(tmp_path / "run", "step"))


def test_two_hang_ups_within_a_step_stop_a_run_once(tmp_path, monkeypatch):
    def hang_up(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)

    on_step(monkeypatch, hang_up)
    with pytest.raises(SystemExit) as e:
        train.main(arguments(tmp_path))
    assert e.value.code == 129 and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert data.load_checkpoint(tmp_path / "run/ckpt.pt")["step"] == 3


def test_nohup_goes_on_when_the_terminal_closes(tmp_path):
    command = ["nohup", sys.executable, ROOT / "train.py", *arguments(tmp_path, max_steps=60)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until_it_trains(process, tmp_path)
    process.send_signal(signal.SIGHUP)
    status, printed = finished(process)
    assert status == 0 and "stopped" not in printed and rows(tmp_path / "run", "result")


def test_a_run_survives_its_reader(tmp_path):
    """train.py ... | head -2: to its end, silently, with status 0; both streams may be the pipe."""
    process = program("train.py", *arguments(tmp_path, max_steps=30))
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert rows(tmp_path / "run", "result") and (tmp_path / "run/model/config.json").exists()
    process = program("train.py", *arguments(tmp_path, max_steps=40), "--resume", stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read().splitlines()
    assert process.wait() == 0 and all("cache folder" in line for line in said)


def test_a_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(save(tmp_path / "net"))
    write_words(tmp_path)
    texts = dict(init="~/net", dataset="~/words.txt", retain=old_text(tmp_path / "words.txt"))
    train.main(typed(**TINY | texts, out="~/run"))
    ev.main(["~/run", "--dataset=~/words.txt,docs", "--windows=2", "--out=~/again"])
    GPT.from_pretrained("~/net").save_pretrained("~/third")
    assert not (tmp_path / "net/~").exists()
    assert all((tmp_path / name).exists() for name in ("run/model", "again", "third/model.safetensors"))


# ----- 3. Their own texts -----


def whole(path):
    return "".join(data.own_text(str(path)).values())


def test_what_is_read_of_a_folder_is_said(tmp_path, capsys):
    """Suffixes in any case; what begins with a dot is left out; an empty file is no error; once."""
    folder = tmp_path / "mine"
    texts = {"A.TXT": "a\n", "b.Md": "b\n", "c.txt": "", "._a.txt": "\0Mac", ".ipynb_checkpoints/d.py": "d\n"}
    texts |= {"e.pdf": "e", "f.jsonl": '{"text": "f"}\n{"text": "g", "id": 1}\n'}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    data.check_name(str(folder))
    assert whole(folder) == data.EOT.join(["a\n", "b\n", "f", "g"])
    assert capsys.readouterr().err == f"{folder}: 4 files are read, 3 left out\n"


TEXTS = {  # bytes of a file: the text that they are
    "a mark.txt": (b"\xef\xbb\xbfone\ntwo\n", "one\ntwo\n"),
    "windows.txt": (b"one\r\ntwo\r\n", "one\ntwo\n"),
    "old mac.txt": (b"one\rtwo\r", "one\ntwo\n"),
    "rows.JSONL": (b'\xef\xbb\xbf{"text": "one\\n"}\r\n{"text": "two"}', f"one\n{data.EOT}two"),
    "table.csv": (b"a,b\r\n1,2\r\n", "a,b\n1,2\n"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_other_systems_are_the_same_text(tmp_path, name, capsys):
    raw, text = TEXTS[name]
    (tmp_path / name).write_bytes(raw)
    assert whole(tmp_path / name) == text
    assert capsys.readouterr().err.count("plain text") == name.endswith(".csv")


BAD = {  # a file: its bytes, what is said of it
    "utf16.txt": ("one\n".encode("utf-16-le"), ["NUL", "convert it to UTF-8"]),
    "marked.txt": ("one\n".encode("utf-16"), ["convert it"]),
    "empty.txt": (b"", ["is empty"]),
    "blank.txt": (b"\n \n", ["is empty"]),
    "other.jsonl": (b'{"text": "a"}\n{"content": "b"}\n', ["line 2", '"text"']),
    "list.jsonl": (b"[1]\n", ["line 1", '"text"']),
    "torn.jsonl": (b'{"text": "a"}\n{"te', ["line 2", "not JSON"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_text_that_cannot_be_read_is_told_what_it_is(tmp_path, name):
    raw, says = BAD[name]
    (tmp_path / name).write_bytes(raw)
    assert "--resume" not in refused(lambda: data.own_text(str(tmp_path / name)), name, *says)


def test_a_text_of_one_line_is_split_by_length_and_documents_between_each_other(tmp_path):
    (tmp_path / "line.txt").write_text("x" * 1000)
    assert [len(part) for part in data.own_text(str(tmp_path / "line.txt")).values()] == [900, 50, 50]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(200)))
    splits = data.own_text(str(tmp_path / "d.jsonl"))
    assert len("".join(splits.values()).split(data.EOT)) == 200
    assert splits["val"].startswith(data.EOT) and splits["test"].startswith(data.EOT)


def test_a_stdout_in_ascii_says_what_it_can(net, tmp_path):
    env = {"PYTHONIOENCODING": "ascii"}
    argv = [str(net), "--prompt=Größe \U0001f600", "--max_new_tokens=2"]
    status, printed = finished(program("eval.py", *argv, env=env))
    assert status == 0 and "Gr??e ?" in printed and "Traceback" not in printed


# ----- 4. Their networks -----


def reshape(net, act):
    """Read the tensors of a network, change them, and write them as another program would."""
    tensors = load_file(net / "model.safetensors")
    tensors = act(tensors) or tensors
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, net / "model.safetensors", {"format": "pt"}
    )


def rename(prefix):
    return lambda net: reshape(net, lambda tensors: {prefix + name: t for name, t in tensors.items()})


def divided(net):
    theirs = GPT2LMHeadModel.from_pretrained(net)
    (net / "model.safetensors").unlink()
    theirs.save_pretrained(net, max_shard_size="10KB")
    assert len(list(net.glob("*.safetensors"))) > 2


def masks(dtype):
    mask = torch.ones(1, 1, 16, 16).tril().to(dtype)
    return lambda net: reshape(net, lambda t: t.update({f"h.{i}.attn.bias": mask.clone() for i in range(4)}))


TAKEN = {  # the same network in other words
    "divided": divided,
    "module.": rename("module."),
    "_orig_mod.": rename("_orig_mod."),
    "module._orig_mod.transformer.": rename("module._orig_mod.transformer."),
    "gelu_pytorch_tanh": config(activation_function="gelu_pytorch_tanh"),
    "n_ctx alone": config(n_positions=None),
    "n_inner of 4 widths": config(n_inner=64),
    **{f"{dtype} masks": masks(dtype) for dtype in (torch.uint8, torch.bool, torch.int64, torch.float64)},
}


@pytest.mark.parametrize("what", TAKEN)
def test_the_same_network_in_other_words_is_taken(net, what):
    before = GPT.from_pretrained(net)
    TAKEN[what](net)
    after = GPT.from_pretrained(net)
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def only(name, raw=b"PK"):
    """In place of the weights a file of this name."""

    def act(net):
        (net / "model.safetensors").unlink()
        (net / name).write_bytes(raw)

    return act


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
SAVE, CUT = ["no model.safetensors", "save_pretrained"], ["resize_token_embeddings(50257)"]
SCORE = {"score.weight": torch.ones(2, 16)}
NETWORKS = {  # what is done to the folder of a network: what must be said
    "pytorch_model.bin": (only("pytorch_model.bin"), SAVE),
    "tf_model.h5": (only("tf_model.h5"), SAVE),
    "a git-lfs pointer": (only("model.safetensors", POINTER), ["model.safetensors", "git-lfs", "download"]),
    "a page": (only("model.safetensors", b"<!DOCTYPE html>"), ["model.safetensors", "web page", "download"]),
    "a shard is missing": (
        lambda net: (divided(net), next(net.glob("*-00002-*")).unlink()),
        ["no model-00002"],
    ),
    "50,258 ids": (config(vocab_size=50258), CUT),
    "50,304 ids": (config(vocab_size=50304), CUT),
    "n_inner": (config(n_inner=48), ["n_inner", "48", "64"]),
    "a classifier": (lambda net: reshape(net, lambda t: t | SCORE), ["score.weight", "GPT2LMHeadModel"]),
    "layers were cut": (config(n_layer=2), ["config.json", "delete generation and versions"]),
}


@pytest.mark.parametrize("what", NETWORKS)
def test_what_is_no_gpt2_that_can_be_read_is_told_what_to_do(net, what):
    act, says = NETWORKS[what]
    act(net)
    refused(lambda: GPT.from_pretrained(net), *says)


def nanogpt(folder):
    """A checkpoint as nanoGPT's train.py writes it."""
    folder.mkdir()
    state = {
        f"_orig_mod.transformer.{n}": p.detach() for n, p in tiny_gpt(vocab_size=BYTES).named_parameters()
    }
    args = dict(n_layer=2, n_head=2, n_embd=8, block_size=16, bias=True, vocab_size=BYTES, dropout=0.0)
    rest = dict(iter_num=9, best_val_loss=torch.tensor(3.0), config={"out_dir": "out"}, optimizer={})
    torch.save({"model": state, "model_args": args, **rest}, folder / "ckpt.pt")
    return folder


NAMES = {  # --init: what is said
    "net/model.safetensors": ["is a file", "folder"],
    "nano/ckpt.pt": ["is a file", "folder"],
    "nano": ["config.json", "transformers saved a GPT-2"],
    "distilgpt2": ["gpt2-medium", "transformers saved a GPT-2"],
    "somebody/gpt2": ["gpt2-medium", "transformers saved a GPT-2"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_folder_with_weights_is_told_what_is_one(net, tmp_path, monkeypatch, name):
    nanogpt(tmp_path / "nano")
    monkeypatch.chdir(tmp_path)
    refused(lambda: train.main(typed(init=name, dataset="docs", retain="none")), name, *NAMES[name])


def test_a_checkpoint_of_nanogpt_is_not_resumed(tmp_path):
    argv = typed("demo", init="scratch", out=nanogpt(tmp_path / "nano"), resume="yes")
    refused(lambda: train.main(argv), "ckpt.pt", "not of this program")


def test_a_local_folder_called_gpt2_is_not_taken_for_gpt2(tmp_path, monkeypatch, capsys):
    save(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert m.read_config("gpt2").n_embd == 768 and m.read_config("./gpt2").n_embd == 8
    m.read_config("gpt2")
    assert capsys.readouterr().err == "gpt2 is OpenAI's: for the folder here, write ./gpt2\n"


def test_a_log_torn_by_a_kill_is_mended_by_resuming(tmp_path, capsys):
    argv, run = arguments(tmp_path, max_steps=4), tmp_path / "run"
    train.main(argv)
    log = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(log[:-30])
    refused(lambda: ev.main([str(run)]), "metrics.jsonl", "--resume")
    train.main([*argv, "--resume"])
    assert rows(run, "result")


def test_torch_export_with_a_dynamic_length_computes_the_same(net):
    model = GPT.from_pretrained(net).eval()
    length = torch.export.Dim("length", min=2, max=16)
    exported = torch.export.export(
        model, (torch.zeros(1, 7, dtype=torch.long),), dynamic_shapes=({1: length},)
    )
    for T in (2, 3, 16):
        ids = torch.randint(BYTES, (1, T))
        assert torch.equal(exported.module()(ids)[0], model(ids)[0])


def test_decoding_with_a_cache_computes_what_a_whole_window_does(net):
    model, ids = GPT.from_pretrained(net).eval(), torch.randint(BYTES, (2, 16))
    cache = [[] for _ in model.h]
    for T in (5, *range(6, 17)):
        with torch.no_grad():
            assert torch.allclose(model.predict(ids[:, :T], cache), model(ids[:, :T])[0][:, -1], atol=1e-5)


# ----- 5. What an upload needs -----


def test_the_card_says_what_a_hub_reads_and_nothing_of_this_machine(tmp_path, capsys):
    """Its command is the one that makes the run again, also after a stop; names may hold YAML's signs."""
    text = tmp_path / "a, b: {c} #d.txt"
    shutil.move(write_words(tmp_path), text)
    texts = dict(dataset=text, retain=old_text(tmp_path / "old"), out=tmp_path / "run: 1")
    argv = typed(**TINY | SCRATCH | texts)
    train.main(argv)
    train.main([*argv, "--resume"])
    card = ModelCard.load(tmp_path / "run: 1/model/README.md")
    about, (result,) = card.data, rows(tmp_path / "run: 1", "result")
    assert (about.license, about.language, about.library_name) == ("mit", "en", "transformers")
    assert about.tags and about.base_model is None and about.model_name == "run: 1"
    metrics = {
        one.metric_name.removesuffix(" in nats per token"): one.metric_value for one in about.eval_results
    }
    losses = {"test loss": result["learn"]["grown"], "test loss on the old text": result["retain"]["grown"]}
    assert metrics == pytest.approx(losses | {"forgetting": ev.forgetting(result)}, abs=1e-4)
    assert {one.dataset_name for one in about.eval_results} == {text.name}
    command = "`python train.py "
    prose = [line for line in card.text.splitlines() if not line.startswith(command)]
    assert len(prose) == len(card.text.splitlines()) - 1
    assert str(tmp_path) not in "\n".join(prose) and "--resume" not in card.text


def test_a_card_names_gpt2_and_wikitext_where_a_run_began_with_them(tmp_path):
    train.main(arguments(tmp_path, max_steps=2))
    run = ev.read_run(tmp_path / "run")
    run["header"]["config"]["init"] = "gpt2-medium"
    run["result"]["learn"]["dataset"] = "wikitext2"
    card = ModelCard(ev.model_card(run))
    assert card.data.base_model == "openai-community/gpt2-medium" and card.data.datasets == [
        "Salesforce/wikitext"
    ]
    run["header"]["config"]["init"] = "mine/gpt2"  # a folder that is called so
    assert ModelCard(ev.model_card(run)).data.base_model is None


@pytest.mark.parametrize("again", [["--resume"], ["--resume=auto"], ["--resume", "yes"], []])
def test_the_command_of_a_run_makes_it_anew(again):
    assert (
        train.parse(["demo", "--lr=1", *again, "--seed=2"]).command == "python train.py demo --lr=1 --seed=2"
    )
