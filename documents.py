"""Files of text that people have, and the documents in them.

A .txt is one document. Rows of JSON (.jsonl, .json, .ndjson) have one each, under "text". Either
may be compressed (.gz, .zst). All must be UTF-8. data.py makes token files of the documents.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from infra.files import (
    ROWS,
    TEXT,
    UserError,
    check_library,
    ending,
    join_problems,
    json_lines,
    text_lines,
    text_stem,
)


def find_texts(paths: Iterable[Path]) -> list[Path]:
    """The texts that the paths name, or that are in folders that they name.

    Prints what is left out. Hidden files and folders are no texts: macOS and Jupyter leave twins of
    others there. Raises UserError.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        found = files_in(path) if path.is_dir() else [path]
        texts = [file for file in found if ending(file)]
        if not texts:
            kinds = ", ".join(TEXT + ROWS)
            raise UserError(f"{path}: no {kinds} file, plain or with .gz or .zst")
        others = [str(file) for file in found if file not in texts]
        if others:
            print(f"left out, as no text: {len(others):,} files, {join_problems(others, 3)}")
        files += texts
    if any(file.suffix.lower() == ".zst" for file in files):
        check_library("zstandard", "reading .zst")
    return files


def files_in(folder: Path) -> list[Path]:
    """All regular files of a folder, without what is hidden."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            found.append(path)
    return found


def plain_name(path: Path) -> str:
    """The name of a folder of tokens, after that of the text: its own, without a text's endings.

    >>> plain_name(Path("corpora/v1.5")), plain_name(Path("my corpus/wiki-0000.json.gz"))
    ('v1.5', 'wiki-0000')
    """
    name = text_stem(path) if ending(path) else path.resolve().name  # of "." and "..", too
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def read_split(files: list[Path], split: str, val_fraction: float, bar: tqdm) -> Iterator[str]:
    """The texts of one side of the split."""
    for path in files:
        for side, text in read_documents(path, val_fraction, bar):
            if side == split:
                yield text


def read_documents(path: Path, val_fraction: float, bar: tqdm) -> Iterator[tuple[str, str]]:
    """(split, text) of each document of a file; `bar` is moved by the file's bytes.

    Held out are the last lines of a .txt, and of rows the documents that their hash chooses. Raises
    UserError with file and line for what is no JSON object with a string under `text`, for other
    encodings than UTF-8, and for a damaged archive.
    """
    if ending(path) in TEXT:
        yield from read_text(path, val_fraction)
        bar.update(path.stat().st_size)
        return
    for number, row in json_lines(path, bar):
        text = row.get("text")
        if not isinstance(text, str):
            raise UserError(
                f"{path}, line {number}: expected a JSON object with a string under "
                f'"text", got {str(row)[:60]!r}'
            )
        if text.strip():
            text = whole_characters(text)
            yield "val" if unit_hash(text) < val_fraction else "train", text


def read_text(path: Path, val_fraction: float) -> Iterator[tuple[str, str]]:
    """(split, text) of a .txt, cut at the end of a line, if there is one."""
    with open(path, "rb") as file:
        text = "".join(line for _, line in text_lines(path, file))
    cut = len(text)
    if val_fraction:
        cut = int(cut * (1 - val_fraction))
        cut = text.rfind("\n", 0, cut) + 1 or cut
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        if part.strip():
            yield split, part


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON's escapes can spell.

    >>> whole_characters("\\ud83d, \\ud83d\\ude00") == "\\ufffd, \\U0001f600"
    True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.md5(text.encode("utf-8", "replace")).hexdigest()[:8], 16) / 2**32
