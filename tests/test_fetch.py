"""Fetching: data.fetch against a real HTTP server on loopback that misbehaves, and what a user without a
network reads."""

import contextlib
import hashlib
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import conftest
import numpy as np
import pytest

import data
import model
import train

BODY = np.random.default_rng(0).bytes(5_000_000)
SIZE = len(BODY)
SHA256 = hashlib.sha256(BODY).hexdigest()
HALF = 2_400_000
PAGE = b"<html><body>Sign in to the hotel's network</body></html>".ljust(210)
NOWHERE = "http://127.0.0.1:9"  # nobody listens there: a proxy there makes every fetch fail at once


def answer(h, fault, first):
    """Answer the GET request h with a fault. `first`: nobody has asked for this path before."""
    start = int(h.headers.get("Range", "bytes=0-")[6:-1])
    if fault == "refuses Python" and "python" in h.headers.get("User-Agent", "python").lower():
        return reply(h, 403)
    if fault == "404":
        return reply(h, 404, PAGE)
    if fault == "redirect" and h.path != "/elsewhere":
        return reply(h, 302, location="/elsewhere")
    if fault == "redirect loop":
        return reply(h, 302, location=h.path)
    if fault == "error page":
        return reply(h, 200, PAGE)
    if fault == "wrong hash":
        return reply(h, 200, BODY[:-1] + b"?")
    if fault == "slow":
        h.server.closing.wait(0.2)
    if fault == "endless":
        h.send_response(200)
        h.end_headers()
        for _ in range(100):  # 500 MB, or until the client hangs up, which raises ConnectionError here
            h.wfile.write(BODY)
        return
    if fault == "silent" or (fault == "stalls" and first):
        if fault == "stalls":
            reply(h, 200, BODY, send=HALF)
        h.wfile.flush()
        return h.server.closing.wait(20)
    if fault == "always truncated":
        return reply(h, 206, BODY[start:], send=600_000, start=start)
    if fault.startswith("truncated") and first:
        return reply(h, 200, BODY, send=HALF)
    if start and fault == "range from elsewhere" and first:  # says so, and sends it
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
            first = self.path not in [r["path"] for r in seen]
            seen.append(request)
            with contextlib.suppress(ConnectionError):  # the client may have had enough
                answer(self, fault, first)
                request["sent all"] = True

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.closing = True, threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/weights", seen
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between the tests and their server, and no test waits 30 seconds for a silent one."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    get = data.requests.get
    impatient = lambda *args, **options: get(*args, **options | {"timeout": 0.6})
    monkeypatch.setattr(data.requests, "get", impatient)


def fetch(url, path, size=SIZE, sha256=SHA256):
    return data.fetch([url] if isinstance(url, str) else url, path, size, sha256)


def refused(urls, path, *words, **right):
    """The fetch must end in one UserError that says which file, where to put it and what went wrong where. An
    unverified file never gets the name; and what is kept as a beginning of the file is one."""
    before = path.read_bytes() if path.exists() else None
    named = [path.name, str(path.parent), *([urls] if isinstance(urls, str) else urls), *words]
    conftest.refused(lambda: fetch(urls, path, **right), *named)
    assert (path.read_bytes() if path.exists() else None) == before
    part = path.with_name(path.name + ".part")
    assert not part.exists() or BODY.startswith(part.read_bytes())


RIGHT = {  # the server's fault, what lies in PATH.part: requests until the file is there
    ("none", None): 1,
    ("truncated", None): 2,
    ("truncated, ignores Range", None): 2,
    ("stalls", None): 2,
    ("redirect", None): 2,
    ("refuses Python", None): 1,
    ("none", "half"): 1,
    ("none", "all of it"): 0,  # a process was killed before it could rename it
    ("none", "another end"): 1,
    ("none", "another beginning"): 2,
    ("none", "too long"): 1,
    ("range from elsewhere", "half"): 2,  # the size would be right
}
PARTS = {"half": BODY[:HALF], "all of it": BODY, "too long": BODY + b"?"}
PARTS |= {"another end": BODY[:-1] + b"?", "another beginning": b"?" * HALF}


@pytest.mark.parametrize("fault, part", RIGHT)
def test_fault_is_overcome(tmp_path, fault, part):
    """What a second request can put right must end in the right file, in as few requests. What can become
    the file is not asked for again; what cannot costs one attempt."""
    folder = tmp_path / "new folder"
    if part:
        folder.mkdir()
        (folder / "weights.part").write_bytes(PARTS[part])
    with serve(fault) as (url, seen):
        sha256 = None if fault == "range from elsewhere" else SHA256
        assert fetch(url, folder / "weights", sha256=sha256).read_bytes() == BODY
    assert {p.name for p in folder.iterdir()} - {"weights.lock"} == {"weights"}
    assert len(seen) == RIGHT[fault, part]
    if fault in ("truncated", "stalls"):
        assert HALF - 2**20 < int(seen[1]["Range"][6:-1]) <= HALF, "at most one chunk is lost"


WRONG = {  # fault: what the message says of it, where a user needs it
    "error page": "210 bytes",
    "wrong hash": "",
    "404": "404",
    "redirect loop": "",
    "silent": "",
    "endless": "5,000,000",
}


@pytest.mark.parametrize("fault", WRONG)
def test_fault_is_refused(tmp_path, fault):
    """What cannot be put right must end in one sentence that says why, and leave no wrong file."""
    with serve(fault) as (url, seen):
        refused(url, tmp_path / "weights", WRONG[fault])
    assert len(seen) <= 2 * 31  # requests follows 30 redirects
    assert fault != "endless" or not any("sent all" in request for request in seen), "the disk would be full"


@pytest.mark.parametrize("right", [dict(), dict(sha256=None)])
def test_error_page_is_never_a_part(tmp_path, right):
    """An error page must neither be appended to what has arrived nor be taken for a beginning. Of some files
    only the size is published: then nothing else would notice."""
    (tmp_path / "weights.part").write_bytes(BODY[:HALF])
    with serve("error page") as (url, _):
        refused(url, tmp_path / "weights", **right)
    with serve("truncated") as (url, _):
        assert fetch(url, tmp_path / "weights", **right).read_bytes() == BODY


@pytest.mark.parametrize("fault", ["error page", "wrong hash", "404", "always truncated", "redirect loop"])
def test_second_mirror_is_tried(tmp_path, fault):
    """A broken first mirror must not keep the second from delivering, nor spoil what it delivers."""
    with serve(fault) as (broken, _), serve("404") as (gone, _):
        refused([broken, gone], tmp_path / "weights", "404")  # and both are named
    with serve(fault) as (broken, _), serve() as (good, seen):
        assert fetch([broken, good], tmp_path / "weights").read_bytes() == BODY
    assert len(seen) == 1
    start = int(seen[0].get("Range", "bytes=0-")[6:-1])
    assert (start > 2_000_000) == (fault == "always truncated")  # it goes on where both calls came to


def test_two_at_once_fetch_once(tmp_path):
    """Ranks and parallel runs start together: who waited must look again before it fetches."""
    pytest.importorskip("fcntl")
    with serve("slow") as (url, seen), ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda _: fetch(url, tmp_path / "weights"), range(3)))
    assert set(paths) == {tmp_path / "weights"} and paths[0].read_bytes() == BODY
    assert len(seen) == 1


def test_file_put_by_hand_needs_no_network(tmp_path, monkeypatch):
    """The way without a network: a file with the right hash under its name is used, and nothing is asked."""
    monkeypatch.setattr(socket, "socket", None)
    (tmp_path / "weights").write_bytes(BODY)
    assert fetch(NOWHERE, tmp_path / "weights") == tmp_path / "weights"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"], "a read-only folder must do"


@pytest.mark.parametrize("wrong", [PAGE, BODY[:-1] + b"?"])
def test_wrong_file_by_hand_is_replaced_by_a_right_one_only(tmp_path, wrong):
    """It is not used, and goes away only when the right one is there."""
    (tmp_path / "weights").write_bytes(wrong)
    refused(NOWHERE, tmp_path / "weights")
    with serve() as (url, _):
        assert fetch(url, tmp_path / "weights").read_bytes() == BODY


# ----- without a network: what the user reads -----


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache folder, an empty folder to work in, and a proxy that is not there."""
    for kind in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(kind, NOWHERE)
    monkeypatch.setenv("GROWING_GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    data.cache_dir.cache_clear()
    data._bpe.cache_clear()
    yield tmp_path
    data.cache_dir.cache_clear()
    data._bpe.cache_clear()


def test_train_without_a_network(offline):
    """The first thing a user without a network does ends in one sentence: which file, and where to put it."""
    conftest.refused(lambda: train.main([]), model.DATA, str(offline / "cache" / "gpt2-124M"))
    assert not list((offline / "cache").rglob("*.part")) and not list((offline / "work").iterdir())


def test_tokenizer_without_a_network(offline):
    """tiktoken alone would end in a long traceback: the message says which file goes where."""
    name = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # tiktoken's, of vocab.bpe
    named = [str(offline / "tiktoken"), name, f"{data.ENCODINGS}vocab.bpe"]
    conftest.refused(lambda: data.encode("hello"), *named)


def test_cache_folder_that_cannot_be_one(offline, monkeypatch):
    """Found before anything is downloaded, and named."""
    (offline / "file").write_text("")
    monkeypatch.setenv("GROWING_GPT_CACHE", str(offline / "file" / "cache"))
    conftest.refused(data.cache_dir, os.path.join("file", "cache"))
