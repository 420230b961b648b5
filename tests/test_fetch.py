"""Fetching: data.fetch against a real HTTP server on loopback that misbehaves, and what a user without a
network reads."""

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT, needs_tiktoken

import data

BODY = np.random.default_rng(0).bytes(5_000_000)
SIZE = len(BODY)
SHA256 = hashlib.sha256(BODY).hexdigest()
HALF = 2_400_000
PAGE = b"<html><body>Sign in to the hotel's network</body></html>".ljust(210)
NOWHERE = "http://127.0.0.1:9"  # nobody listens there: a proxy there makes every fetch fail at once


def answer(h, fault, times):
    """Answer the GET request h with a fault; `times` counts the requests for this path, this one included."""
    start = int(h.headers.get("Range", "bytes=0-")[6:-1])
    if fault == "refuses Python" and "python" in h.headers.get("User-Agent", "python").lower():
        return reply(h, 403)
    if fault in ("403", "404", "500"):
        return reply(h, int(fault), PAGE)
    if fault == "redirect" and h.path != "/elsewhere":
        return reply(h, 302, location="/elsewhere")
    if fault == "redirect loop":
        return reply(h, 302, location=h.path)
    if fault == "error page":
        return reply(h, 200, PAGE)
    if fault == "empty":
        return reply(h, 200, b"")
    if fault == "oversized":
        return reply(h, 200, BODY + b"?")
    if fault == "slow":
        h.server.closing.wait(1)
    if fault == "endless":
        h.send_response(200)
        h.end_headers()
        for _ in range(100):  # 500 MB, or until the client hangs up, which raises ConnectionError here
            h.wfile.write(BODY)
        return
    if fault == "wrong hash":
        return reply(h, 200, BODY[:-1] + b"?")
    if fault == "silent" or (fault == "stalls" and times == 1):
        if fault == "stalls":
            reply(h, 200, BODY, send=HALF)
        h.wfile.flush()
        return h.server.closing.wait(20)
    if fault == "416" or start >= SIZE:
        return reply(h, 416)
    if fault == "always truncated":
        return reply(h, 206, BODY[start:], send=1_100_000, start=start)
    if fault.startswith("truncated") and times == 1:
        return reply(h, 200, BODY, send=HALF)
    if start and fault == "range from elsewhere" and times < 3:  # says so, and sends it
        return reply(h, 206, BODY[: SIZE - start], start=0)
    if start and fault != "truncated, ignores Range":
        return reply(h, 206, BODY[start:], start=start)
    return reply(h, 200, BODY)


def reply(h, status, body=b"", send=None, start=None, location=None):
    h.send_response(status)
    h.send_header("Content-Length", str(len(body)))
    if start is not None:
        h.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}")
    if location:
        h.send_header("Location", location)
    h.end_headers()
    h.wfile.write(body[:send])


@contextlib.contextmanager
def serve(fault="none"):
    """(address, list of the requests' headers) of a server whose every file is BODY, with a fault."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            request = dict(self.headers, path=self.path)
            seen.append(request)
            with contextlib.suppress(ConnectionError):  # the client may have had enough
                answer(self, fault, [r["path"] for r in seen].count(self.path))
                request["sent all"] = True

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.closing = True, threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between the tests and their server, and no test waits 30 seconds for a silent one."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    get = data.requests.get
    impatient = lambda *args, **options: get(*args, **options | {"timeout": 0.3})
    monkeypatch.setattr(data.requests, "get", impatient)


def fetch(urls, path, size=SIZE, sha256=SHA256):
    return data.fetch(urls, path, size, sha256)


def refused(urls, path, *reasons, size=SIZE, sha256=SHA256):
    """The fetch must end in one UserError that names the file and the reasons, and keep nothing wrong."""
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(data.UserError) as e:
        fetch(urls, path, size, sha256)
    for words in (path.name, str(path.parent), *urls, *reasons):
        assert words in str(e.value), (words, str(e.value))
    assert str(e.value).startswith(f"check the network, or put {path.name} into {path.parent} by hand: ")
    assert (path.read_bytes() if path.exists() else None) == before, "an unverified file got the name"
    part = path.with_name(path.name + ".part")
    assert not part.exists() or (BODY.startswith(part.read_bytes()) and part.stat().st_size > 210)


RIGHT = {  # fault: requests until the file is there
    "none": 1,
    "truncated": 2,
    "truncated, ignores Range": 2,
    "stalls": 2,
    "redirect": 2,
    "refuses Python": 1,
}


@pytest.mark.parametrize("fault", RIGHT)
def test_fault_is_overcome(tmp_path, fault):
    """What a second request can put right must end in the right file, in as few requests."""
    with serve(fault) as (url, seen):
        path = fetch([f"{url}/weights"], tmp_path / "new folder" / "weights")
    assert path.read_bytes() == BODY
    assert {p.name for p in path.parent.iterdir()} <= {"weights", "weights.lock"}
    assert len(seen) == RIGHT[fault]
    if fault in ("truncated", "stalls"):
        assert HALF - 2**20 < int(seen[1]["Range"][6:-1]) <= HALF, "at most one chunk is lost"
    assert all("growing-gpt" in request["User-Agent"] for request in seen), "some servers refuse Python's"


WRONG = {  # fault: what the message says
    "error page": "has 210 bytes instead of 5,000,000",
    "empty": "has 0 bytes",
    "wrong hash": "wrong sha256",
    "403": "HTTP status 403",
    "404": "HTTP status 404",
    "500": "HTTP status 500",
    "416": "HTTP status 416",
    "redirect loop": "redirects without end",
    "silent": "Timeout",
    "oversized": "instead of 5,000,000",
    "always truncated": "Error after 4,",
}


@pytest.mark.parametrize("fault", WRONG)
def test_fault_is_refused(tmp_path, fault):
    """What cannot be put right must end in one sentence that says why, and leave no wrong file."""
    with serve(fault) as (url, seen):
        refused([f"{url}/weights"], tmp_path / "weights", WRONG[fault])
    assert len(seen) <= 31  # requests follows 30 redirects


def test_error_page_after_a_good_beginning_is_not_kept(tmp_path):
    """An error page must neither be appended to what has arrived nor stay where it was."""
    (tmp_path / "weights.part").write_bytes(BODY[:HALF])
    with serve("error page") as (url, _):
        refused([f"{url}/weights"], tmp_path / "weights", "210 bytes")
    with serve() as (url, _):
        assert fetch([f"{url}/weights"], tmp_path / "weights").read_bytes() == BODY


@pytest.mark.parametrize("size, sha256", [(SIZE, None), (None, SHA256)])
def test_one_of_size_and_hash_is_enough(tmp_path, size, sha256):
    """Of some files only the size or only the hash is published: an error page must fail by either."""
    with serve("error page") as (url, _):
        refused([f"{url}/weights"], tmp_path / "weights", "has", size=size, sha256=sha256)
    with serve("truncated") as (url, _):
        assert fetch([f"{url}/weights"], tmp_path / "weights", size, sha256).read_bytes() == BODY


def test_endless_body_is_not_read_to_its_end(tmp_path):
    """A server that sends for ever must not fill the disk: reading stops just past the size."""
    with serve("endless") as (url, seen):
        refused([f"{url}/weights"], tmp_path / "weights", "instead of 5,000,000")
    assert [request.get("sent all") for request in seen] == [None]


def test_connection_refused(tmp_path):
    """A server that is down must be reported at once."""
    refused([f"{NOWHERE}/weights"], tmp_path / "weights", "ConnectionError")


@pytest.mark.parametrize("fault", ["error page", "wrong hash", "404", "always truncated", "redirect loop"])
def test_second_mirror_is_tried(tmp_path, fault):
    """A broken first mirror must not keep the second from delivering, nor spoil what it delivers."""
    with serve(fault) as (broken, _), serve() as (good, seen):
        path = fetch([f"{broken}/weights", f"{good}/weights"], tmp_path / "weights")
    assert path.read_bytes() == BODY and len(seen) == 1
    goes_on = "Range" in seen[0]  # with what the first did deliver
    assert goes_on == (fault == "always truncated")


def test_both_mirrors_are_blamed(tmp_path):
    """When nobody delivers, the message must name every address with its own reason."""
    with serve("404") as (first, _), serve("wrong hash") as (second, _):
        urls = [f"{first}/weights", f"{second}/weights"]
        refused(urls, tmp_path / "weights", f"{urls[0]}: HTTP status 404", f"{urls[1]}: has the wrong sha256")


@pytest.mark.parametrize("part", [BODY[:-1] + b"?", b"?" * HALF, BODY + b"?"], ids=["end", "middle", "long"])
def test_wrong_part_is_thrown_away(tmp_path, part):
    """A .part that cannot become the file (416, or the hash fails) costs one attempt."""
    (tmp_path / "weights.part").write_bytes(part)
    with serve() as (url, seen):
        assert fetch([f"{url}/weights"], tmp_path / "weights").read_bytes() == BODY
    assert ["Range" in request for request in seen] == [True, False]


def test_complete_part_needs_no_more_bytes(tmp_path):
    """A process killed between the last byte and the renaming leaves a whole .part: 416, verify, rename."""
    (tmp_path / "weights.part").write_bytes(BODY)
    with serve() as (url, seen):
        assert fetch([f"{url}/weights"], tmp_path / "weights").read_bytes() == BODY
    assert len(seen) <= 1


def test_answer_from_another_offset_is_not_appended(tmp_path):
    """A 206 that starts elsewhere than asked must not be appended, though the size would be right."""
    (tmp_path / "weights.part").write_bytes(BODY[:HALF])
    with serve("range from elsewhere") as (url, _):
        path = fetch([f"{url}/weights"], tmp_path / "weights", sha256=None)
    assert path.read_bytes() == BODY


def test_two_processes_fetch_once(tmp_path):
    """Ranks and parallel runs start together: all must get the file, and the server must see one request."""
    line = "import sys, data; data.fetch([sys.argv[1]], sys.argv[2], int(sys.argv[3]), sys.argv[4])"
    with serve("slow") as (url, seen):
        command = [
            sys.executable,
            "-c",
            line,
            f"{url}/weights",
            str(tmp_path / "weights"),
            str(SIZE),
            SHA256,
        ]
        processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
        assert [p.wait(60) for p in processes] == [0, 0]
    assert (tmp_path / "weights").read_bytes() == BODY
    assert len(seen) == 1


def test_waiting_process_finds_the_file(tmp_path):
    """Who waited for the lock must look again before it fetches. (Windows has no such lock: twice there.)"""
    if data.fcntl is None:
        pytest.skip("no file locks on this system")
    path = tmp_path / "weights"
    with serve() as (url, seen), data.lock(tmp_path / "weights.lock"):
        result = []
        other = threading.Thread(target=lambda: result.append(fetch([f"{url}/weights"], path)))
        other.start()
        other.join(0.3)
        assert other.is_alive() and not seen, "it must wait for the lock"
        path.write_bytes(BODY)
    other.join(10)
    assert result == [path] and not seen


def test_file_put_by_hand_needs_no_network(tmp_path, monkeypatch):
    """The way without a network: a file with the right hash under its name is used, and nothing is asked."""
    monkeypatch.setattr(socket, "socket", None)
    (tmp_path / "weights").write_bytes(BODY)
    assert fetch([f"{NOWHERE}/weights"], tmp_path / "weights") == tmp_path / "weights"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"], "a read-only folder must do"


@pytest.mark.parametrize("wrong", [PAGE, b"", BODY[:-1] + b"?"])
def test_wrong_file_by_hand_is_replaced_by_a_right_one_only(tmp_path, wrong):
    """A wrong file must be named as such; it goes away only when the right one is there."""
    path = tmp_path / "weights"
    path.write_bytes(wrong)
    with serve("error page") as (url, _):
        refused([f"{url}/weights"], path, "wrong sha256" if len(wrong) > 210 else f"has {len(wrong)} bytes")
    assert path.read_bytes() == wrong
    with serve() as (url, _):
        assert fetch([f"{url}/weights"], path).read_bytes() == BODY


def test_folder_that_is_a_file(tmp_path):
    """A cache folder that cannot be one must be reported, not traced back."""
    (tmp_path / "cache").write_text("a file")
    with serve() as (url, seen), pytest.raises(data.UserError, match="weights"):
        fetch([f"{url}/weights"], tmp_path / "cache" / "weights")
    assert not seen


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path):
    """A cache folder without permission to write must be reported, with its name."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    with serve() as (url, _), pytest.raises(data.UserError, match=f"{folder}.*ermission"):
        fetch([f"{url}/weights"], folder / "weights")


def test_full_disk(tmp_path, monkeypatch):
    """A disk that fills up must be reported with the system's reason."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "_download", full)
    with pytest.raises(data.UserError, match="weights.*No space left on device"):
        fetch([f"{NOWHERE}/weights"], tmp_path / "weights")


# ----- without a network: what the user reads -----


def offline(tmp_path, *command, **more):
    """Run a program in a fresh folder through a proxy that is not there."""
    gone = {"no_proxy", "NO_PROXY", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "GROWING_GPT_CACHE"}
    env = {k: v for k, v in os.environ.items() if k not in gone}
    env |= {f"{kind}_proxy": NOWHERE for kind in ("http", "https", "all")}
    env |= {k.upper(): v for k, v in env.items() if k.endswith("_proxy")} | more
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *command], cwd=work, env=env, capture_output=True, text=True, timeout=120
    )


def test_train_without_a_network(tmp_path):
    """The first thing a user without a network does must end in one message that says what to do."""
    p = offline(tmp_path, str(ROOT / "train.py"), f"--cache_dir={tmp_path / 'cache'}")
    assert p.returncode == 1 and "Traceback" not in p.stdout + p.stderr
    errors = [line for line in p.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and p.stderr.rstrip().endswith(errors[0])
    assert errors[0].startswith("error: check the network, or run `python train.py demo`, which needs none")
    folder = tmp_path / "cache"
    for words in (
        "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/model.ckpt.index",
        f"{folder / 'gpt2-124M'} by hand",
        "model.ckpt.index, model.ckpt.data-00000-of-00001",
        f"model.safetensors into {folder / 'huggingface-gpt2'}",
        "https://huggingface.co/openai-community/gpt2/resolve/",
        "ConnectionError" if "ConnectionError" in errors[0] else "ProxyError",
        "`python train.py demo`",
    ):
        assert words in errors[0], (words, errors[0])
    assert not list(folder.rglob("*.part")) and not list((tmp_path / "work").iterdir())


def test_tokenizer_without_a_network(tmp_path, monkeypatch):
    """tiktoken alone would end in a long traceback: the message must say which files go where."""
    data._bpe.cache_clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for kind in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(kind, NOWHERE)
    with pytest.raises(data.UserError) as e:
        data.encode("hello")
    names = {"vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"}
    names |= {"encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}
    for words in ("TIKTOKEN_CACHE_DIR", str(tmp_path), *names, *names.values(), data.ENCODINGS):
        assert words in str(e.value), (words, str(e.value))
    assert str(e.value).startswith("check the network, or put vocab.bpe and encoder.json from")


@needs_tiktoken
def test_tokenizer_with_files_put_by_hand(tmp_path, monkeypatch):
    """The advice of that message must work: both files under their names, and no connection is made."""
    files = data.tokenizer_files()
    for path in files.values():
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    data._bpe.cache_clear()
    assert data.encode("hello world").tolist() == [31373, 995]  # GPT-2's, as published
    monkeypatch.undo()
    assert data.tokenizer_files() == files


def test_unwritable_cache_folder_is_a_sentence(tmp_path, monkeypatch):
    """--cache_dir under a file cannot be made: the message must name it and the option."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GROWING_GPT_CACHE", str(tmp_path / "file" / "cache"))
    data.cache_dir.cache_clear()
    with pytest.raises(data.UserError, match="file/cache.*--cache_dir"):
        data.cache_dir()
    data.cache_dir.cache_clear()
