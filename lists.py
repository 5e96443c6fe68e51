"""Lists of token files, as they are published: which files, in which order, and how they come here.

    python pretrain.py --data @dolmino50.txt --data-root /data/olmo    # files that are here
    python pretrain.py --data @OLMo2-7B-stage1.yaml --take 100M        # of URLs, 100M tokens

A list has one path or URL a line, with `#` before comments; or `label,path`, as in OLMo-core's
mixes, with {TOKENIZER} for the folder of the tokenizer; or it is an official yaml, whose data.paths
count. The order of a list is that of the data, and a file that stands there k times is k times in
the mix. Sources: OLMo configs/official-1124, OLMo-core src/olmo_core/data/mixes.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar
from urllib.parse import urlsplit

from tqdm import tqdm

from infra.files import (
    UserError,
    check_room,
    first_line,
    join_problems,
    lock_folder,
    read_json,
    read_number,
    write_json,
)

TOKENIZER = "allenai/dolma2-tokenizer"  # what {TOKENIZER} stands for: its ids are the olmo2 ones
ATTEMPTS = 5  # of a download that breaks off; each goes on where the last one ended
PARALLEL = 4  # downloads at a time


@dataclass(frozen=True)
class Entry:
    """A line of a list."""

    place: str  # a path or a URL, with the root before it
    where: str  # file and line, for errors


def is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


# ------------------------------------------------------------------------------------------
# What a list says


def read_list(path: Path, root: str = "") -> list[Entry]:
    """The entries of a list, in its order. root: of relative paths; none: the list's folder.

    Raises UserError.
    """
    root = root or str(path.parent)
    entries = []
    for number, line in lines_of(path):
        label, comma, rest = line.partition(",")
        place = rest.strip() if comma and "/" not in label else line
        place = place.replace("{TOKENIZER}", TOKENIZER)
        if not is_url(place) and not os.path.isabs(place):
            place = f"{root.rstrip('/')}/{place}"
        entries.append(Entry(place, f"{path}, line {number}"))
    if not entries:
        raise UserError(f"{path} names no file")
    return entries


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that name a file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {path} cannot be read: {error}") from None
    in_yaml = path.suffix in (".yaml", ".yml")
    inside = not in_yaml  # of a yaml, the lines below `paths:` under `data:`
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if in_yaml and text and not text.startswith("- "):
            inside = text == "paths:"
        elif inside and text:
            yield number, text.removeprefix("- ").strip("'\" ")


def lists_in(data: tuple[str, ...]) -> list[Path]:
    """The lists among the values of --data."""
    return [Path(name[1:]) for name in data if name.startswith("@")]


def implies_olmo2(path: Path) -> bool:
    """Are the files of a list in the ids of the olmo2 tokenizer, by its name in their paths?"""
    return any("dolma2-tokenizer" in line or "{TOKENIZER}" in line for _, line in lines_of(path))


def source_of(place: str) -> str:
    """The source that a file belongs to: in the official lists the folder below preprocessed/.

    >>> source_of("http://olmo-data.org/preprocessed/dclm/x/part-0.npy"), source_of("/data/a/b.npy")
    ('dclm', 'a')
    """
    folders = place.split("/")[:-1]
    if "preprocessed" in folders[:-1]:
        return folders[folders.index("preprocessed") + 1]
    return folders[-1] if folders else place


# ------------------------------------------------------------------------------------------
# From a list to files that are here


def find_listed(
    path: Path, root: str = "", cache: Path = Path("cache"), take: int = 0
) -> list[Path]:
    """The files of a list, here; what it names by URL is downloaded to `cache`, each file once.

    take: only so many tokens in all, of each source its share, from its first files on; 0: all.
    Raises UserError with the lines of files that are missing.
    """
    entries = read_list(path, root)
    check_local(entries)
    wanted = dict.fromkeys(entry.place for entry in entries)  # place -> tokens, None: all
    if take:
        wanted = read_shares(entries, take, cache)
    where = {entry.place: entry.where for entry in entries}
    urls = {place: n for place, n in wanted.items() if is_url(place) or n}
    check_files_fit(entries, urls, cache)
    download_all(urls, where, cache)
    found = []
    for entry in entries:
        place = entry.place
        if place in urls:
            found.append(cached(place, cache, urls[place]))
        elif place in wanted:
            found.append(Path(place))
    return list(dict.fromkeys(found)) if take else found


def read_shares(entries: list[Entry], take: int, cache: Path) -> dict[str, int]:
    """`share_out`, once: afterwards it stands in the cache, and no server is asked again."""
    key = json.dumps([take, *(entry.place for entry in entries)])
    path = cache / f"take-{take}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    if not path.exists():
        wanted = share_out(entries, sizes_of(entries), take)
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    known = {entry.place for entry in entries}
    return {place: read_number(path, place) for place in read_json(path) if place in known}


def check_local(entries: list[Entry]) -> None:
    """Raise UserError with the lines of files that are not here."""
    missing = []
    for entry in entries:
        if not is_url(entry.place) and not Path(entry.place).is_file():
            missing.append(f"{entry.where}: no {entry.place}")
    if missing:
        raise UserError(f"{join_problems(missing, 3)}; relative paths count from --data-root")


def sizes_of(entries: list[Entry]) -> dict[str, int]:
    """place -> bytes of each file; of a URL as its server says. Raises UserError."""
    where = {entry.place: entry.where for entry in entries}
    with ThreadPoolExecutor(16) as threads:
        sizes = threads.map(size_of, where, where.values())
        return dict(zip(where, tqdm(sizes, "sizes", len(where), leave=False, disable=None)))


def size_of(place: str, where: str) -> int:
    """Bytes of a file."""
    import httpx

    if not is_url(place):
        return Path(place).stat().st_size
    try:
        answer = httpx.head(place, follow_redirects=True, timeout=30)
        answer.raise_for_status()
        return int(answer.headers["Content-Length"])
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise UserError(f"{where}: {place} cannot be had: {first_line(error)}") from None


def share_out(entries: list[Entry], sizes: dict[str, int], take: int) -> dict[str, int]:
    """place -> tokens to take of it: of each source its share of `take`, its first files first.

    What is taken is printed.
    """
    sources: dict[str, list[str]] = {}
    for entry in entries:
        sources.setdefault(source_of(entry.place), []).append(entry.place)
    total = sum(sizes[entry.place] for entry in entries)
    wanted = {}
    for source, places in sources.items():
        left = round(take * sum(sizes[place] for place in places) / total)
        for place in dict.fromkeys(places):
            tokens = min(left, sizes[place] // 4)
            left -= tokens
            if tokens:
                wanted[place] = tokens
                print(f"take      {tokens:,} of {sizes[place] // 4:,} tokens, {source}: {place}")
    return wanted


def check_files_fit(entries: list[Entry], urls: dict[str, int | None], cache: Path) -> None:
    """Raise UserError if what is to be downloaded does not fit on the disk: lists are long."""
    new = [
        e for e in entries if e.place in urls and not cached(e.place, cache, urls[e.place]).exists()
    ]
    if not new:
        return
    whole = sizes_of([entry for entry in new if urls[entry.place] is None])
    needed = sum(whole.values()) + sum(4 * tokens for tokens in urls.values() if tokens)
    check_room(cache, needed, "the list", "take a share of each source (--take 100M)")


# ------------------------------------------------------------------------------------------
# Downloads


def cached(place: str, cache: Path, tokens: int | None = None) -> Path:
    """Where a file lies in the cache; `tokens`: only its first so many.

    Raises UserError for a URL that would lie elsewhere.
    """
    parts = urlsplit(place)
    path = cache / (parts.netloc.replace(":", "-") or "here") / parts.path.lstrip("/")
    if ".." in path.parts[len(cache.parts) :]:
        raise UserError(f"{place} has .. in it")
    return path if tokens is None else path.with_name(f"{path.stem}.first-{tokens}.npy")


def download_all(urls: dict[str, int | None], where: dict[str, str], cache: Path) -> None:
    """Download what is not in the cache yet, some files at a time.

    urls: place -> tokens, None: all of it. where: place -> where it stands. Raises UserError.
    """
    paths = {place: cached(place, cache, tokens) for place, tokens in urls.items()}
    new = [place for place, path in paths.items() if not path.exists()]
    if not new:
        return
    cache.mkdir(parents=True, exist_ok=True)
    with (
        lock_folder(cache, wait=True),  # another process may fetch the same
        tqdm(desc="download", unit="B", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(PARALLEL) as threads,
    ):
        jobs = []
        for place in new:
            limit = 4 * urls[place] if urls[place] else None
            wanted = Download(place, paths[place], where[place], limit)
            jobs.append(threads.submit(wanted.fetch, bar))
        try:
            for job in jobs:
                job.result()
        finally:  # after an error and after Ctrl-C the others end, too
            Download.stopped.set()
            threads.shutdown(cancel_futures=True)
            Download.stopped.clear()


@dataclass(frozen=True)
class Download:
    """A file to come, whole or not at all. A part of it stays beside, and the next try goes on."""

    place: str  # a URL or a path
    path: Path
    where: str  # it stands, for errors
    limit: int | None  # bytes, from the first on; None: all

    stopped: ClassVar[threading.Event] = threading.Event()

    def fetch(self, bar: tqdm) -> None:
        """Download it, with some attempts. Raises UserError."""
        import httpx

        part = self.path.with_name(f"{self.path.name}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        problem = "it breaks off"
        for attempt in range(ATTEMPTS):
            if self.path.exists() or self.stopped.is_set():
                return
            try:
                size = self.fetch_rest(part, bar) if is_url(self.place) else self.copy(part)
                if size is None or part.stat().st_size == size:
                    os.replace(part, self.path)
            except (httpx.HTTPError, OSError) as error:
                problem = first_line(error)
                time.sleep(0.1 * 2**attempt)
        if not self.path.exists():
            raise UserError(f"{self.where}: {self.place} cannot be had: {problem}")

    def copy(self, part: Path) -> int | None:
        """Copy the first bytes of a file that is here."""
        with open(self.place, "rb") as file:
            part.write_bytes(file.read(self.limit))
        return self.limit

    def fetch_rest(self, part: Path, bar: tqdm) -> int | None:
        """Append to `part` what it lacks; returns the size that it must have, if that is known.

        A server that knows no ranges begins anew.
        """
        import httpx

        have = part.stat().st_size if part.exists() else 0
        if have and have == self.limit:
            return have
        headers = {"Accept-Encoding": "identity"}  # not compressed on the way
        if have or self.limit:
            headers["Range"] = f"bytes={have}-{self.limit - 1 if self.limit else ''}"
        options = dict(headers=headers, follow_redirects=True, timeout=30)
        with httpx.stream("GET", self.place, **options) as answer:
            if answer.status_code == 416:  # nothing is lacking
                return have
            answer.raise_for_status()
            goes_on = answer.status_code == 206
            length = answer.headers.get("Content-Length")
            with open(part, "ab" if goes_on else "wb") as file:
                self.append(answer.iter_raw(), file, bar)
        return self.limit or (int(length) + have * goes_on if length else None)

    def append(self, pieces: Iterator[bytes], file: BinaryIO, bar: tqdm) -> None:
        """Write the pieces, up to the limit."""
        for piece in pieces:
            if self.stopped.is_set():
                raise OSError("stopped")
            if self.limit:
                piece = piece[: self.limit - file.tell()]
            if not piece:
                return
            file.write(piece)
            bar.update(len(piece))
