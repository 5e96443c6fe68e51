"""Shared by all tests: the scripts on the path, offline data where it is at hand, the embedded corpora, built once, and
what keeps tests apart: any of them may run alone, in any order, on any worker."""

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = (
    ROOT.parent / "shared" / "data"
)  # real inputs kept beside a checkout; the project does not need them
sys.path.insert(0, str(ROOT))
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = (
    "1"  # no test downloads; asked for what is not here, the libraries would try for half a minute
)
if (SHARED / "tiktoken").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken")

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="no ../shared: real inputs are not at hand"
)
needs_cl100k = pytest.mark.skipif(
    not (SHARED / "tiktoken").is_dir() and "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="no ../shared: cl100k_base is not at hand",
)


@pytest.fixture(scope="session", autouse=True)
def threads():
    """The number of threads that torch starts with."""
    import torch

    return torch.get_num_threads()


@pytest.fixture(autouse=True)
def afresh(threads, tmp_path):
    """Each test starts in an empty folder, not in the checkout, and with torch's own number of threads: a run's --threads stays set."""
    import torch

    torch.set_num_threads(threads)
    with contextlib.chdir(tmp_path):
        yield


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """The embedded corpora of both stages."""
    from data import embedded_corpus, get_tokenizer

    folder = tmp_path_factory.mktemp("corpora")
    for stage in (1, 2):
        embedded_corpus(get_tokenizer("laptop"), folder, stage=stage)
    return folder


@pytest.fixture(scope="module")
def workplace(corpora, tmp_path_factory):
    """A folder for the tests of one file, with the embedded corpora under tokens/, as a user's has after the first runs."""
    from data import get_tokenizer

    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(corpora, folder / "tokens")
    get_tokenizer.cache_clear()  # it may know "runs/first" of another file's workplace
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    """The tests' working folder, `workplace`. Tests of one file share it: a name under it belongs to one test or fixture."""
    monkeypatch.chdir(workplace)
    return workplace


FLAGS = "--seq-len 32 --batch 4 --threads 1 --save-every 4 --keep 0 --eval-every 8 --val-tokens 512"
SHORT = [*FLAGS.split(), *"--log-every 8 --warmup 512 --horizon 4096 --questions 0".split()]


@pytest.fixture(scope="module")
def made(workplace):
    """A run of eight steps, runs/first, with its states."""
    import pretrain

    out = workplace / "runs/first"
    with contextlib.chdir(workplace):
        pretrain.main([*SHORT, "--tokens", "1024", "--out", str(out)])
    return out


@pytest.fixture
def run(made, here):
    """A copy of it, which a test may damage."""
    shutil.rmtree(here / "runs/copy", ignore_errors=True)
    return Path(shutil.copytree(made, here / "runs/copy"))


@pytest.fixture
def sigint():
    """SIGINT interrupts, as at a terminal. A shell starts what runs in the background with SIGINT ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fails(main, arguments, capsys) -> str:
    """Run a script's main as its command does; it must exit with status 2. Returns its one line on standard error."""
    from infra.distributed import run_cli

    with pytest.raises(SystemExit) as exit:
        run_cli(lambda: main(arguments))
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and lines[-1].startswith("error: "), lines
    return lines[-1]
