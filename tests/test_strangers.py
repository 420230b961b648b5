"""What people bring who have never seen this program: their networks, texts, terminals and habits.

Each test is one thing that went wrong for somebody, held against programs from elsewhere: transformers,
safetensors, huggingface_hub, torch.export, nohup, a pipe that closes."""

import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import conftest as c
import pytest
import torch
from conftest import BYTES, PLAIN, SCRATCH, TINY, joined, refused, rows, tiny_gpt, typed, whole, write_words
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, pipeline

import data
import eval as ev
import model as m
import train
from model import GPT

SIZES = [BYTES, pytest.param(data.GPT2, marks=c.needs_tiktoken)]


def save(folder, generation=(0, 0), **more):
    tiny_gpt(generation, BYTES, **more).save_pretrained(folder)
    return folder


@pytest.fixture
def net(tmp_path):
    """The folder of a small network of bytes that was grown twice; three versions are in it."""
    return save(tmp_path / "net", (0, 0, 1, 2), n_embd=16, versions=(0, 1, 2))


@pytest.fixture(autouse=True)
def anew():
    data.tell.cache_clear()  # what is said once is said once a test


# ----- 1. Numbers that are wrong without a word -----

VOCABULARIES = {  # what somebody made of it: whether the network can be used
    "re-serialised": (lambda v: dict(sorted(v.items(), reverse=True)), True),
    "without end of text": (lambda v: {token: i for token, i in v.items() if token != data.EOT}, True),
    "two ids swapped": (lambda v: v | {"a": v["b"], "b": v["a"]}, False),
    "a token less": (lambda v: dict(list(v.items())[:-2]), False),
}


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("size", SIZES)
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
    """After a step in transformers the last version stands alone; one line says so; no way back."""
    assert GPT.from_pretrained(net).config.versions == (0, 1, 2)
    theirs, ids = GPT2LMHeadModel.from_pretrained(net), torch.randint(BYTES, (4, 16))
    theirs(ids, labels=ids).loss.backward()
    torch.optim.AdamW(theirs.parameters(), 1e-2).step()
    theirs.save_pretrained(tmp_path / "trained")
    assert json.loads((tmp_path / "trained/config.json").read_text())["versions"] == [0, 1, 2]
    for _ in range(2):
        again = GPT.from_pretrained(tmp_path / "trained").eval()
    assert again.config.versions == (2,) and again.config.generation == (0, 0, 1, 2)
    assert capsys.readouterr().err.count("last version stands alone") == 1
    assert torch.allclose(again(ids)[0], theirs.eval()(ids).logits, atol=1e-4)
    back = [str(tmp_path / "trained"), "--version=0", f"--out={tmp_path / 'never'}"]
    refused(lambda: ev.main(back), "no version 0")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fast", [True, False])
def test_transformers_has_the_ids_of_data_encode(tmp_path, size, fast):
    tiny_gpt(vocab_size=size).save_pretrained(tmp_path)
    tokenizer, draw = AutoTokenizer.from_pretrained(tmp_path, use_fast=fast), random.Random(0)
    alphabet = [*map(chr, range(0, 0x250)), "\u4e2d", "\U0001f600", "\n", " a", "'s", "<|end", data.EOT] * 2
    for _ in range(500):
        text = "".join(draw.choices(alphabet, k=draw.randrange(40)))
        ids = tokenizer(text)["input_ids"]
        assert ids == data.encode(text, size).tolist()
        assert tokenizer.decode(ids) == text == data.decode(ids, size)
    assert tokenizer.eos_token_id == size - 1 and len(tokenizer) == size
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["clean_up_tokenization_spaces"] is False  # older transformers'


def test_the_pipeline_of_transformers_continues_a_prompt_of_bytes(net):
    generate = pipeline("text-generation", str(net))
    told = generate("ab", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    ours = ev.sample([GPT.from_pretrained(net).eval()], "ab", 8, temperature=0)
    assert told.replace(data.EOT, "") == ours and len(ours) > 2


# ----- 2. Lost files, lost work -----


def test_saving_replaces_only_what_it_writes(net):
    """A divided or OpenAI's network that lay there before stays, too, and is not read."""
    divided(net)
    (net / "deep").mkdir()
    others = {path: path.read_bytes() for path in net.glob("*-of-*")}
    others |= {net / name: b"{}" for name in ("thesis.tex", "deep/notes.md", "README.md", "hparams.json")}
    for path, raw in others.items():
        path.write_bytes(raw)
    for folder, seed in ((net, 1), (net / "deep" / "..", 2)):
        ours = tiny_gpt((0,), BYTES, n_embd=16, seed=seed)
        ours.save_pretrained(folder)
        assert torch.equal(GPT.from_pretrained(net).wte.weight, ours.wte.weight)
    assert all(path.read_bytes() == raw for path, raw in others.items())
    assert not list(net.rglob("*.tmp"))


@pytest.mark.parametrize(
    "fails, written", [("model.safetensors", []), ("config.json", ["model.safetensors"])]
)
def test_a_write_that_fails_leaves_what_was_there(net, monkeypatch, fails, written):
    """Each file is renamed when it is whole, the weights first."""
    before, replace = {p.name: p.read_bytes() for p in net.iterdir()}, os.replace

    def full(source, target):
        if target.name == fails:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save(net, (0,), seed=1)
    after = {p.name: p.read_bytes() for p in net.iterdir()}
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == written


def arguments(folder, **changes):
    """A run that lasts until it is stopped."""
    options = PLAIN | dict(retain="none", max_steps=1_000_000, eval_every=1_000_000) | changes
    return c.arguments(write_words(folder), folder / "run", **options)


def test_a_run_survives_its_terminal_and_its_reader(tmp_path):
    """nohup train.py ... | head -1: to its end, silently, with status 0; both streams may be the pipe."""
    log, command = tmp_path / "run/metrics.jsonl", ["nohup", sys.executable, c.ROOT / "train.py"]
    command += arguments(tmp_path, max_steps=60)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline()
    process.stdout.close()
    while not log.exists() or '"kind": "step"' not in log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert rows(tmp_path / "run", "result") and (tmp_path / "run/model/config.json").exists()
    argv = [*arguments(tmp_path, max_steps=70), "--resume"]
    process = c.program("train.py", *argv, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read().splitlines()
    assert process.wait() == 0 and all("cache folder" in line for line in said)


def test_a_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(save(tmp_path / "net"))
    texts = dict(dataset="~/words.txt", retain=c.old_text(write_words(tmp_path)))
    train.main(typed(**TINY | texts, init="~/net", out="~/run"))
    ev.main(["~/run", "--dataset=~/words.txt,docs", "--windows=2", "--out=~/again"])
    GPT.from_pretrained("~/net").save_pretrained("~/third")
    assert not (tmp_path / "net/~").exists()
    assert all((tmp_path / name).exists() for name in ("run/model", "again", "third/model.safetensors"))


# ----- 3. Their own texts -----


def test_what_is_read_of_a_folder_is_said(tmp_path, capsys):
    """Every .txt, .md, .py and .jsonl file, in any case, in the order of the paths; what begins with a dot is
    left out; an empty file is no error; once."""
    folder = tmp_path / "mine"
    texts = {"A.TXT": "a\n", "b.Md": "b\n", "c.txt": "", "._a.txt": "\0Mac", ".ipynb_checkpoints/d.py": "d\n"}
    texts |= {"e.pdf": "e", "f.jsonl": '{"text": "f"}\n{"text": "g", "id": 1}\n', "b/z.md": "z\n"}
    texts |= {"b/c/d.py": "d\n", "folder.md/e.txt": "e\n", "a.txt.gz": "gz", "0.bin": "0"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    data.check_name(str(folder))
    assert whole(folder) == data.EOT.join(["a\n", "d\n", "z\n", "b\n", "f", "g", "e\n"])
    assert capsys.readouterr().err == f"{folder}: 7 files are read, 5 left out\n"


TEXTS = {  # bytes of a file: the text that they are, or what is said of them
    "a mark.txt": (b"\xef\xbb\xbfone\ntwo\n", "one\ntwo\n"),
    "windows.txt": (b"one\r\ntwo\r\n", "one\ntwo\n"),
    "old mac.txt": (b"one\rtwo\r", "one\ntwo\n"),
    "rows.JSONL": (b'\xef\xbb\xbf{"text": "one\\n"}\r\n\n{"text": "two"}\n\n', f"one\n{data.EOT}two"),
    "table.csv": (b"a,b\r\n1,2\r\n", "a,b\n1,2\n"),
    "utf16.txt": ("one\n".encode("utf-16-le"), ["NUL", "convert it to UTF-8"]),
    "marked.txt": ("one\n".encode("utf-16"), ["convert it"]),
    "latin.txt": (b"caf\xe9\n" * 300, ["UTF-8 at byte 3"]),
    "other.jsonl": (b'{"text": "a"}\n{"content": "b"}\n', ["line 2", '"text"']),
    "list.jsonl": (b"[1]\n", ["line 1", '"text"']),
    "number.jsonl": (b'{"text": 1}\n', ["line 1", '"text"']),
    "torn.jsonl": (b'{"text": "a"}\n{"te', ["line 2", "JSON"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_other_systems_are_the_same_text_or_told_what_they_are(tmp_path, name, capsys):
    raw, expected = TEXTS[name]
    (tmp_path / name).write_bytes(raw)
    if isinstance(expected, list):
        refused(lambda: whole(tmp_path / name), name, *expected)
    else:
        assert whole(tmp_path / name) == expected
    assert capsys.readouterr().err.count("plain text") == name.endswith(".csv")


def test_a_text_without_lines_is_split_by_length_and_rows_between_each_other(tmp_path):
    for name, text in {"line.txt": "x" * 1000, "wide.txt": "é" * 505, "end.txt": "x" * 999 + "\n"}.items():
        (tmp_path / name).write_text(text, "utf-8")
        splits = joined(data.split([(tmp_path / name, data.length(tmp_path / name))]))
        assert "".join(splits.values()) == text
        assert [round(len(part) / len(text), 2) for part in splits.values()] == [0.9, 0.05, 0.05]
    for texts in ([f"document {i}" for i in range(200)], [f"{i} book" * 300_000 for i in range(6)]):
        path = tmp_path / "d.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        splits = joined({k: part for k, part in data.split([(path, data.length(path))]).items() if part})
        assert sum((part.split(data.EOT) for part in splits.values()), []) == texts


def test_a_stdout_in_ascii_says_what_it_can(net, monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "argv", typed("eval.py", net, prompt="Größe \U0001f600", max_new_tokens=2))
    said = sys.stdout.buffer
    with pytest.raises(SystemExit) as e:
        ev.run_main(ev.main)
    assert not e.value.code and b"Gr??e ?" in said.getvalue()


# ----- 4. Their networks -----


def config(**changes):
    """Who calls it with a network's folder changes its config.json; None takes a key away."""

    def act(net):
        values = json.loads((net / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (net / "config.json").write_text(json.dumps(kept))

    return act


def tensors(change):
    """The same for its tensors, written as another program would."""

    def act(net):
        path = net / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return act


def rename(prefix):
    return tensors(lambda t: {prefix + name: p for name, p in t.items()})


def tensor(name, change):
    return tensors(lambda t: t | {name: change(t[name])})


def masks(dtype):
    mask = torch.ones(1, 1, 16, 16).tril().to(dtype)
    return tensors(lambda t: t | {f"h.{i}.attn.bias": mask.clone() for i in range(4)})


def divided(net):
    theirs = GPT2LMHeadModel.from_pretrained(net)
    (net / "model.safetensors").unlink()
    theirs.save_pretrained(net, max_shard_size="10KB")
    assert len(list(net.glob("*.safetensors"))) > 2


def only(name, raw=b"PK"):
    """In place of the weights a file of this name."""
    return lambda net: ((net / "model.safetensors").unlink(), (net / name).write_bytes(raw))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
SCORE = {"score.weight": torch.ones(2, 16)}
BIAS, HEAD = "h.1.mlp.c_fc.bias", "lm_head.weight"
WRONG = dict(model_type="llama", activation_function="relu", tie_word_embeddings=False, n_head=3, n_embd=None)
WRONG |= {"vocab_size": 257.0, "n_positions": -28}
NETWORKS = {  # what is done to the folder of a network: what must be said; nothing if it is the same network
    "divided": (divided, []),
    "module.": (rename("module."), []),
    "module._orig_mod.transformer.": (rename("module._orig_mod.transformer."), []),
    "gelu_pytorch_tanh": (config(activation_function="gelu_pytorch_tanh"), []),
    "n_ctx alone": (config(n_positions=None), []),
    "n_inner of 4 widths": (config(n_inner=64), []),
    **{f"{dtype} masks": (masks(dtype), []) for dtype in (torch.uint8, torch.bool, torch.float64)},
    "pytorch_model.bin": (only("pytorch_model.bin"), ["no model.safetensors", "save_pretrained"]),
    "tf_model.h5": (only("tf_model.h5"), ["no model.safetensors", "save_pretrained"]),
    "a git-lfs pointer": (only("model.safetensors", POINTER), ["model.safetensors", "git-lfs", "download"]),
    "a page": (only("model.safetensors", b"<!DOCTYPE html>"), ["model.safetensors", "web page", "download"]),
    "no shard": (lambda net: (divided(net), next(net.glob("*-00002-*")).unlink()), ["no model-00002"]),
    "an index": (lambda net: (divided(net), next(net.glob("*x.json")).write_text("{}")), ["index.json"]),
    "50,258 ids": (config(vocab_size=50258), ["resize_token_embeddings(50257)"]),
    "50,304 ids": (config(vocab_size=50304), ["resize_token_embeddings(50257)"]),
    "n_inner": (config(n_inner=48), ["n_inner", "48", "64"]),
    # what would load, and compute nonsense
    **{key: (config(**{key: value}), ["config.json", key]) for key, value in WRONG.items()},
    "a tensor less": (tensors(lambda t: {n: p for n, p in t.items() if n != BIAS}), [f"{BIAS}: missing"]),
    "another shape": (tensor("ln_f.bias", lambda p: torch.zeros(17)), ["ln_f.bias", "(17,)", "(16,)"]),
    "transposed": (tensor("h.0.attn.c_attn.weight", lambda p: p.t().contiguous()), ["c_attn.weight"]),
    "float64": (tensor(BIAS, torch.Tensor.double), [f"{BIAS} is stored as F64"]),
    "uint8": (tensor(BIAS, torch.Tensor.byte), [f"{BIAS} is stored as U8"]),  # read as masks only
    "its own head": (tensors(lambda t: t | {HEAD: t["wte.weight"] + 1e-6}), [f"{HEAD} is not wte.weight"]),
    "a classifier": (tensors(lambda t: t | SCORE), ["score.weight", "GPT2LMHeadModel"]),
    "layers were cut": (config(n_layer=2), ["config.json", "delete generation and versions"]),
}


@pytest.mark.parametrize("what", NETWORKS)
def test_a_network_in_other_words_is_taken_or_told_what_to_do(net, what):
    act, says = NETWORKS[what]
    before = GPT.from_pretrained(net)
    act(net)
    if says:
        refused(lambda: GPT.from_pretrained(net), *says)
    else:
        after = GPT.from_pretrained(net)
        assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


NAMES = {  # what is typed: what is said
    "--init=net/model.safetensors": ["net/model.safetensors", "is a file", "folder"],
    "--init=nano/ckpt.pt": ["nano/ckpt.pt", "is a file", "folder"],
    "--init=nano": ["nano", "config.json", "transformers saved a GPT-2"],
    "--init=distilgpt2": ["distilgpt2", "gpt2-medium", "transformers saved a GPT-2"],
    "--init=somebody/gpt2": ["somebody/gpt2", "gpt2-medium", "transformers saved a GPT-2"],
    "--init=out/x": ["out/x/model"],  # a run instead of its network
    "--init=out/x/": ["out/x/model"],
    "demo --init=scratch --out=nano --resume": ["ckpt.pt", "not of this program"],
}


@pytest.mark.parametrize("words", NAMES)
def test_what_is_no_folder_with_weights_is_told_what_is_one(net, tmp_path, monkeypatch, words):
    """nano has a checkpoint as nanoGPT's train.py writes it."""
    state = {f"_orig_mod.transformer.{name}": p for name, p in load_file(net / "model.safetensors").items()}
    args = dict(n_layer=4, n_head=2, n_embd=16, block_size=16, bias=True, vocab_size=BYTES, dropout=0.0)
    rest = dict(iter_num=9, best_val_loss=torch.tensor(3.0), config={"out_dir": "out"}, optimizer={})
    (tmp_path / "nano").mkdir()
    torch.save({"model": state, "model_args": args, **rest}, tmp_path / "nano/ckpt.pt")
    shutil.copytree(net, tmp_path / "out/x/model")
    (tmp_path / "out/x/metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    refused(lambda: train.main(typed(*words.split(), dataset="docs", retain="none")), *NAMES[words])


def test_a_local_folder_called_gpt2_is_not_taken_for_gpt2(tmp_path, monkeypatch, capsys):
    save(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert [m.read_config(name).n_embd for name in ("gpt2", "./gpt2", "gpt2")] == [768, 8, 768]
    assert capsys.readouterr().err == "gpt2 is OpenAI's: for the folder here, write ./gpt2\n"


def test_exported_with_a_dynamic_length_or_cached_it_computes_the_same(net):
    model, ids = GPT.from_pretrained(net).eval(), torch.randint(BYTES, (1, 16))
    lengths = ({1: torch.export.Dim("length", min=2, max=16)},)
    exported = torch.export.export(model, (ids[:, :7],), dynamic_shapes=lengths).module()
    cache = {}
    for T in range(2, 17):
        with torch.no_grad():
            logits = model(ids[:, :T])[0]
            assert torch.equal(exported(ids[:, :T])[0], logits)
            assert torch.allclose(model.predict(ids[:, :T], cache), logits[:, -1], atol=1e-5)
    assert [keys.size(2) for keys, _ in cache.values()] == [16] * 4  # of each block, all but the new


# ----- 5. What an upload needs -----


def test_the_card_says_what_a_hub_reads_and_nothing_of_this_machine(tmp_path):
    """Its command is the one that makes the run again, also after a stop; names may hold YAML's signs."""
    text = tmp_path / "a, b: {c} #d.txt"
    shutil.move(write_words(tmp_path), text)
    texts = dict(dataset=text, retain=c.old_text(tmp_path / "old"), out=tmp_path / "run: 1")
    argv = typed(**TINY | SCRATCH | texts)
    for at, again in enumerate((["--resume=auto"], ["--resume"], ["--resume", "yes"], ["--resume=auto"])):
        train.main([*argv[:at], *again, *argv[at:]])
        card = ModelCard.load(tmp_path / "run: 1/model/README.md")
        (command,) = [line for line in card.text.splitlines() if line.startswith("`python train.py ")]
        assert shlex.split(command.strip("`"))[2:] == argv
    assert str(tmp_path) not in card.text.replace(command, "")
    about, (result,) = card.data, rows(tmp_path / "run: 1", "result")
    assert (about.license, about.language, about.library_name) == ("mit", "en", "transformers")
    assert about.tags and about.base_model is None and about.model_name == "run: 1"
    metrics = {row.metric_name.split(" in nats")[0]: row.metric_value for row in about.eval_results}
    losses = {"test loss": result["learn"]["grown"], "test loss on the old text": result["retain"]["grown"]}
    assert metrics == pytest.approx(losses | {"forgetting": ev.forgetting(result)}, abs=1e-4)
    assert {row.dataset_name for row in about.eval_results} == {text.name}


def test_a_card_names_gpt2_and_wikitext_where_a_run_began_with_them(tmp_path):
    train.main(arguments(tmp_path, max_steps=2))
    run = ev.read_run(tmp_path / "run")
    run["result"]["learn"]["dataset"] = "wikitext2"
    for init, base in {"gpt2-medium": "openai-community/gpt2-medium", "mine/gpt2": None}.items():
        run["header"]["config"]["init"] = init
        about = ModelCard(ev.model_card(run)).data
        assert about.base_model == base and about.datasets == ["Salesforce/wikitext"]
