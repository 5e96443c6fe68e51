"""Shared by all tests: the scripts on the path, offline data where it is at hand, and the embedded corpus, built once."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real inputs kept beside a checkout; the project does not need them
sys.path.insert(0, str(ROOT))
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads; asked for what is not here, the libraries would try for half a minute
if (SHARED / "tiktoken").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken")

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared: real inputs are not at hand")
needs_cl100k = pytest.mark.skipif(not (SHARED / "tiktoken").is_dir() and "TIKTOKEN_CACHE_DIR" not in os.environ,
                                  reason="no ../shared: cl100k_base is not at hand")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder that has the embedded corpus under tokens/, as a user's has after the first run."""
    from data import embedded_corpus, get_tokenizer
    folder = tmp_path_factory.mktemp("work")
    embedded_corpus(get_tokenizer("laptop"), folder / "tokens")
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    """The tests' working folder, `workplace`."""
    monkeypatch.chdir(workplace)
    return workplace


def fails(main, arguments, capsys) -> str:
    """Run a script's main as its command does; it must exit with status 2. Returns its one line on standard error."""
    from model import run_cli
    with pytest.raises(SystemExit) as exit:
        run_cli(lambda: main(arguments))
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and lines[-1].startswith("error: "), lines
    return lines[-1]
