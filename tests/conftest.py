"""What all tests share: the repository on the path, a cache folder of their own, and what lies beside it."""

import os
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch._dynamo

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("GROWING_GPT_SHARED", ROOT.parent / "shared"))  # true data, if it is there
FIXTURES = ROOT / "tests" / "fixtures"

sys.path.insert(0, str(ROOT))
os.environ["GROWING_GPT_CACHE"] = tempfile.mkdtemp(prefix="growing-gpt-test-")  # before `data` is imported
if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED / "data/tiktoken").exists():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "data/tiktoken")

_bpe = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "/nowhere")) / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
needs_tiktoken = pytest.mark.skipif(
    not _bpe.exists(), reason="GPT-2's tokenizer files are not in TIKTOKEN_CACHE_DIR"
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def write_words(folder):
    """A text file in which there is something to learn."""
    words = random.Random(0).choices(["grow", "learn", "keep", "block", "layer", "token"], k=6000)
    path = Path(folder) / "words.txt"
    path.write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9)))
    return str(path)


def old_text(text):
    """Another text, beside `text`, for --retain: what is learned and what is kept are never the same."""
    path = Path(text).with_name("old.txt")
    if not path.exists():
        path.write_text("\n".join(f"the {i} of {i * i} was kept" for i in range(1200)))
    return str(path)


@pytest.fixture
def text(tmp_path):
    return write_words(tmp_path)


@pytest.fixture
def own_dynamo():
    """Each test starts without compiled graphs and leaves torch's settings as they were."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny network is faster on one
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, optimize_ddp=True):
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
