"""Files that are whole or not there, lines of JSON, and errors that a person can act on.

Whatever is written here is written to a temporary name first and then renamed, so that a process
that is killed leaves the old file or the new one, never half of it.
"""

import contextlib
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(ValueError):
    """What a person got wrong, in one line: the value, the rule, and what to type next.

    everywhere: all ranks raise this error together, so that only rank 0 needs to print it.
    """

    def __init__(self, text: str, everywhere: bool = False):
        super().__init__(text)
        self.everywhere = everywhere


def did_you_mean(word: str, options: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint for a message about a word that is not among the options, or "".

    >>> did_you_mean("grop", ["sft", "grpo"]), did_you_mean("xyz", ["sft", "grpo"])
    (', did you mean grpo?', '')
    """
    close = difflib.get_close_matches(word, list(options), 1, cutoff)
    return f", did you mean {close[0]}?" if close else ""


def join_problems(problems: list[str], most: int = 5) -> str:
    """The first `most` problems in one line, and how many more there are.

    >>> join_problems(["a", "b", "c"], most=2)
    'a; b (and 1 more)'
    """
    shown = "; ".join(problems[:most])
    more = len(problems) - most
    return f"{shown} (and {more:,} more)" if more > 0 else shown


# ------------------------------------------------------------------------------------------
# JSON


def read_json(path: Path):
    """The content of a JSON file. Raises UserError that names a missing or damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line of a .jsonl, .jsonl.gz or .jsonl.zst file.

    Raises UserError with file and line for what is no JSON object, and for a damaged file.
    """
    with open(path, "rb") as file:
        try:
            for number, line in enumerate(open_text(path, file), 1):
                if line.strip():
                    yield number, parse_object(path, number, line)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}") from None


def parse_object(path: Path, number: int, line: str) -> dict:
    """The JSON object on a line. Raises UserError with file and line number."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        shown = line[:60].strip()
        raise UserError(f"{path}, line {number}: expected a JSON object, got {shown!r}")
    return row


def open_text(path: Path, file: io.BufferedReader) -> io.TextIOWrapper:
    """The text of an open file, decompressed as the ending of `path` says (.gz, .zst)."""
    if path.suffix == ".gz":
        file = gzip.open(file)
    elif path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"{path}: reading .zst needs the zstandard library: pip install zstandard"
            ) from None
        file = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return io.TextIOWrapper(file, encoding="utf-8", errors="replace")


# ------------------------------------------------------------------------------------------
# Folders


def make_folder(path: Path) -> Path:
    """An empty folder at `path`; what stood there is removed. Raises UserError."""
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}") from None


@contextlib.contextmanager
def temporary_folder(tmp: Path) -> Iterator[Path]:
    """An empty folder at `tmp`, to be renamed; if it was not, it goes, and so does an empty parent.

    Raises UserError where it cannot be written.
    """
    try:
        yield make_folder(tmp)
    except OSError as error:
        raise UserError(f"cannot write to {tmp.parent}: {error.strerror}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        with contextlib.suppress(OSError):
            tmp.parent.rmdir()


def is_plain_name(name: str) -> bool:
    """Is it one component of a path, of letters, digits, `.`, `_` and `-`?

    >>> is_plain_name("OLMo-2.1_b"), is_plain_name("x/../../home"), is_plain_name("..")
    (True, False, False)
    """
    return bool(re.fullmatch(r"[\w.-]{1,100}", name)) and name.strip(".") != ""


def made_here(folder: Path) -> bool:
    """Does a folder carry a mark of this project?

    The marks: corpus.json in it; or, of an hf/, the run.json or soup.json beside it.
    """
    if (folder / "corpus.json").exists():
        return True
    beside = (folder.parent / "run.json", folder.parent / "soup.json")
    return folder.name == "hf" and any(path.exists() for path in beside)


def replace_folder(tmp: Path, final: Path) -> None:
    """Rename the complete folder `tmp` to `final`; what stood there is removed only after that.

    A crash between the two renames leaves `.old-<name>`. Raises UserError where `final` was not
    made here.
    """
    if final.exists() and not made_here(final):
        raise UserError(
            f"{final} is in the way, and nothing in it says that it was made here: move it, and "
            "try again"
        )
    old = final.with_name(f".old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    tmp.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
