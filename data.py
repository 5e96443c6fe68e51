"""Text to tokens, tokens to files, files to batches.

    python data.py                     # build the embedded corpus (pretrain.py does it when needed)
    python data.py shakespeare.txt     # your own text -> tokens/shakespeare/
    python pretrain.py --data tokens/shakespeare
    python data.py dump/ --tokenizer olmo2 --name dump  # a folder of .txt, .jsonl, .json.gz

Three things here are exactly those of the official trainers, so that files, order and batches can
be exchanged:
  - a token file (`.npy` by name) is a headerless stream of little-endian uint32; EOS ends each
    document, there is no BOS;
  - an instance is T consecutive tokens within one file; a file's remainder is dropped; documents
    are cut where they fall;
  - the order of an epoch is one permutation of all instances, PCG64(seed + epoch), or of chunks of
    neighbouring instances (the 32B's stage 1: of pairs); a batch is the next rows of it.
A batch is a function of (files, seed, step, rank, world size). Nothing is iterated, so a run
resumes by its step alone.
Sources: OLMo olmo/data/{memmap_dataset,iterable_dataset}.py, OLMo-core data/data_loader.py.

Letters of shapes: T tokens of an instance, N instances.
"""

import base64
import collections
import copy
import functools
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from documents import find_texts, plain_name, read_split
from infra.distributed import run_cli
from infra.files import (
    UserError,
    did_you_mean,
    ending,
    is_plain_name,
    read_json,
    replace_folder,
    sha256,
    temporary_folder,
    tmp_beside,
    write_json,
)
from infra.settings import Threads, check_ranges
from lists import find_listed
from tasks.synthetic import SOURCES, VERSION_SOURCE, embedded_documents

# People import get_tokenizer and Tokenizer from here.
from tokenizer import LAPTOP, LAPTOP_FILE, Tokenizer, get_tokenizer, unspell

# ------------------------------------------------------------------------------------------
# Writing token files

# The files of the official mixes have at most so many tokens.
PART_TOKENS = 2**29


def write_tokens(
    documents: Iterable[str], folder: Path, name: str, tokenizer: Tokenizer
) -> dict[str, int]:
    """Tokenise documents into folder/name-00000.npy and on; returns {tokens, documents, bytes}."""
    totals = collections.Counter(tokens=0, documents=0, bytes=0)
    rows = number_parts(documents, tokenizer)
    for number, part in itertools.groupby(rows, key=lambda row: row[0]):
        totals.update(write_part(part, folder / f"{name}-{number:05d}.npy", tokenizer))
    return totals


def number_parts(
    documents: Iterable[str], tokenizer: Tokenizer
) -> Iterator[tuple[int, str, list[int]]]:
    """(number of its part, text, ids) of each document: a part is a file, no document is cut."""
    number = 0
    size = 0
    for batch in batched(documents, characters=2**22):
        for text, ids in zip(batch, tokenizer.encode_batch(batch)):
            if size and size + len(ids) > PART_TOKENS:
                number += 1
                size = 0
            size += len(ids) + 1  # EOS
            yield number, text, ids


def write_part(
    rows: Iterable[tuple[int, str, list[int]]], path: Path, tokenizer: Tokenizer
) -> dict[str, int]:
    """Write one token file and the .json beside it; returns {tokens, documents, bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = collections.Counter()
    with open(path, "wb") as file:
        for _, text, ids in rows:
            np.array([*ids, tokenizer.eos], "<u4").tofile(file)
            n_bytes = len(text.encode("utf-8", "replace"))
            counts.update(tokens=len(ids) + 1, documents=1, bytes=n_bytes)
    sidecar = {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        **counts,
        "sha256": sha256(path),
    }
    write_json(path.with_suffix(".json"), sidecar)
    return counts


def batched(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of texts of about so many characters together, enough to keep every core busy."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------
# Choosing token files

DOWNLOADS = Path("tokens/downloads")  # of lists with URLs


def token_files(
    paths: Iterable[str | Path], split: str, root: str = "", take: int = 0
) -> list[Path]:
    """The .npy files behind --data: files as they are; of a folder, those of its `split`.

    split: train or val; a folder without such subfolders counts as a whole. @LIST: the files of a
    list (lists.py), whose relative paths count from `root`; `take`: only so many tokens of it. A
    file that is listed k times is k times in the mix, as in the official lists. Raises UserError
    where there is none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if str(path).startswith("@"):
            files += find_listed(Path(str(path)[1:]), root, DOWNLOADS, take)
        elif path.is_dir():
            files += folder_files(path, split)
        elif not path.exists():
            raise UserError(
                f"{path} does not exist: expected token files (.npy) or folders made by data.py"
            )
        elif path.suffix != ".npy":
            hint = ": tokenise it first, with python data.py" if ending(path) else ", and no text"
            raise UserError(f"{path} is no token file (.npy){hint}")
        else:
            files.append(path)
    return files


def folder_files(folder: Path, split: str) -> list[Path]:
    """The token files of a folder's split. Raises UserError where there is none."""
    if (folder / split).is_dir():
        folder = folder / split
    elif split == "val" and (folder / "train").is_dir():
        raise UserError(f"{folder} has no val/: it was made without held-out text")
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise UserError(f"{folder} holds no token file (.npy): make some with python data.py TEXT")
    return files


def mix_shares(mix: Iterable[str]) -> dict[str, float]:
    """{source: its share of the tokens} of a mix of parts that read source=weight.

    A source is one of the embedded corpus (prose=0.5) or, as for --data, a folder or a file
    (tokens/mine=2). Weights count relative to their sum. Raises UserError.

    >>> mix_shares(["math=1", "docs=9"])
    {'math': 0.1, 'docs': 0.9}
    """
    weights: dict[str, float] = {}
    for part in mix:
        name, _, text = part.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight <= 1e15:
            raise UserError(
                f"--mix {part}: expected source=weight with a weight above 0 and up to 1e15, as in "
                "prose=0.9 math=0.1"
            )
        if name in weights:
            raise UserError(
                f"--mix {' '.join(mix)}: name each source once, with the weight that it has in all"
            )
        if name not in SOURCES and not Path(name).exists():
            near = Path("tokens", name)
            hint = f", did you mean {near}?" if near.exists() else did_you_mean(name, SOURCES)
            raise UserError(
                f"--mix {part}: no such source{hint}; the embedded ones are {', '.join(SOURCES)}, "
                "all others are folders or token files"
            )
        weights[name] = weight
    total = sum(weights.values())
    for name, weight in weights.items():
        if weight < 1e-9 * total:
            raise UserError(f"--mix {name}={weight:g}: its share of the tokens is as good as none")
    return {name: weight / total for name, weight in weights.items()}


def mix_sources(
    mix: Iterable[str], split: str, tokenizer: Tokenizer
) -> dict[str, tuple[float, list[Path]]]:
    """{source: (its share, its files of `split`)} of a mix. Raises UserError.

    On val, a source without held-out files has none.
    """
    sources = {}
    for name, share in mix_shares(mix).items():
        files = []
        if name in SOURCES:
            corpus = embedded_corpus(tokenizer, stage=SOURCES[name])
            files = sorted((corpus / split).glob(f"{name}-*.npy"))
        elif split == "train" or Path(name, "val").is_dir():
            files = token_files([name], split)
        sources[name] = (share, files)
    return sources


def mix_files(
    sources: dict[str, tuple[float, list[Path]]], instances: int, seq_len: int
) -> tuple[list[Path], list[int]]:
    """(files, instances to take of each): `instances` in all, shared out by weight.

    Of a source that has more, the first instances take part. The files of one that has less are
    listed again, as in the official mixes. Every order of this list is the same data.
    """
    files = []
    counts = []
    share = 0.0  # of this source and those before
    begin = 0
    for name, (weight, paths) in sources.items():
        share += weight
        end = round(instances * share)
        sizes = [path.stat().st_size // 4 // seq_len for path in paths]
        if not sum(sizes):
            raise UserError(f"--mix {name}: no instance of {seq_len} tokens")
        for path, size in itertools.cycle(zip(paths, sizes)):
            take = min(size, end - begin)
            begin += take
            if take:
                files.append(path)
                counts.append(take)
            if begin == end:
                break
    return files, counts


# ------------------------------------------------------------------------------------------
# Batches

# Token files of so many bytes in all are hashed before they are used. That takes a second.
HASHED_BYTES = 2**30


@dataclass(eq=False)
class TokenData:
    """Instances of `seq_len` tokens over token files, in the official order.

    Raises UserError for a file that is empty, truncated, of another format, changed since it was
    made, or made by another tokenizer.
    """

    files: list[Path]
    seq_len: int
    tokenizer: Tokenizer
    # How many chunks of each file take part, its first ones (None: all), see `mix_files`.
    counts: list[int] | None = None
    # So many neighbouring instances stay together in the order. OLMo-core has the same number as
    # max_target_sequence_length / sequence_length.
    chunk: int = 1

    def __post_init__(self):
        self.sidecars = [read_sidecar(path, self.tokenizer) for path in self.files]
        if sum(path.stat().st_size for path in set(self.files)) <= HASHED_BYTES:
            check_hashes(self.files, self.sidecars)
        # A file's remainder below a chunk is dropped.
        size = self.chunk * self.seq_len
        chunks = self.counts or [row["tokens"] // size for row in self.sidecars]
        lengths = self.chunk * np.array(chunks)
        # File i has the instances begins[i] to ends[i].
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths
        self._open = functools.lru_cache(maxsize=4096)(open_tokens)
        self._order = functools.lru_cache(maxsize=1)(self.order)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def hash(self) -> str:
        """12 hex digits of what the data are: names, sizes, and contents where a sidecar knows."""
        rows = [
            [path.name, sidecar["tokens"], sidecar.get("sha256")]
            for path, sidecar in zip(self.files, self.sidecars)
        ]
        if self.counts:
            rows.append(self.counts)
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]

    def instance(self, i: int) -> np.ndarray:
        """Tokens [T] of instance i, int64. Raises UserError on an id beyond the vocabulary."""
        file = int(np.searchsorted(self.ends, i, side="right"))
        start = (i - int(self.begins[file])) * self.seq_len
        tokens = self._open(self.files[file])[start : start + self.seq_len].astype(np.int64)
        size = self.tokenizer.vocab_size
        if tokens.max() >= size:
            raise UserError(
                f"{self.files[file]} has the id {tokens.max()} near token "
                f"{start + tokens.argmax()}, beyond the {size} entries of the tokenizer "
                f"{self.tokenizer.name!r}: name the one that made it (--tokenizer)"
            )
        return tokens

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """All instances, shuffled, uint32 [N].

        4 bytes each: 3.8 GB for the 3.9T tokens of the official mix.
        """
        order = np.arange(len(self) // self.chunk, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
        if self.chunk > 1:
            within = np.arange(self.chunk, dtype=np.uint32)
            order = (order[:, None] * np.uint32(self.chunk) + within).reshape(-1)
        return order

    def positions(self, step: int, rows: int, seed: int, first_epoch: int = 0) -> np.ndarray:
        """The instances [rows] of the global batch of `step` (from 0).

        Each epoch drops the last instances, those that fill no batch.
        """
        batches = len(self) // rows
        if batches == 0:
            smaller = f"--batch {len(self)}" if len(self) else "a smaller --seq-len"
            raise UserError(
                f"{len(self)} instances of {self.seq_len} tokens are fewer than one batch of "
                f"{rows}: give more data, or {smaller}"
            )
        epoch, batch = divmod(step, batches)
        return self._order(seed, first_epoch + epoch)[batch * rows : (batch + 1) * rows]

    def batch(
        self,
        step: int,
        rows: int,
        seed: int,
        first_epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        mask_repeats: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """tokens, targets [rows / world, T] of a rank, int64.

        A rank has every world-th row of the global batch. For targets see `make_targets`.
        """
        positions = self.positions(step, rows, seed, first_epoch)[rank::world]
        tokens = np.stack([self.instance(int(i)) for i in positions])
        return tokens, make_targets(tokens, mask_repeats)


def read_sidecar(path: Path, tokenizer: Tokenizer) -> dict:
    """{tokens, ...}: a token file's length, and what the .json beside it knows, if there is one.

    Raises UserError for a file that is empty, truncated, of another format, or made by another
    tokenizer.
    """
    beside = path.with_suffix(".json")
    sidecar = read_json(beside) if beside.exists() else {}
    size = path.stat().st_size
    tokens = sidecar.get("tokens", size // 4)
    if type(tokens) is not int:
        raise UserError(f"{beside}: expected a whole number under 'tokens', got {tokens!r}")
    if size == 0:
        raise UserError(f"{path} is empty")
    check_header(path)
    if size != 4 * tokens:
        raise UserError(
            f"{path} is truncated or no token file: {size} bytes, expected a multiple of 4: "
            f"4 x {tokens} tokens"
        )
    if sidecar.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        name = str(sidecar.get("tokenizer", "unknown"))
        other = f"the model has {tokenizer.name!r}"
        if name == tokenizer.name:
            other = "the model has another one of that name"
        raise UserError(
            f"{path} was made with the tokenizer {name!r}, {other}: tokenise the text again with "
            "that of the model (data.py TEXT --tokenizer MODEL), or train a new model on it"
        )
    check_ids(path, tokenizer)
    return sidecar | {"tokens": tokens}


def check_hashes(files: list[Path], sidecars: list[dict]) -> None:
    """Raise UserError for a file whose bytes are not those of the sha256 beside it."""
    known = {path: sidecar.get("sha256") for path, sidecar in zip(files, sidecars)}
    for path, expected in known.items():
        if expected and hash_of(path, path.stat().st_mtime_ns) != expected:
            raise UserError(
                f"{path} has changed since it was made: its sha256 is not that of "
                f"{path.with_suffix('.json').name}; tokenise the text again"
            )


@functools.lru_cache(4096)
def hash_of(path: Path, changed: int) -> str:
    """The sha256 of a file, computed once as long as it is not changed: evaluations come again."""
    return sha256(path)


def check_header(path: Path) -> None:
    """Raise UserError for a file of np.save: a token file has no header."""
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise UserError(
                f"{path} has NumPy's own header: a token file is plain little-endian uint32; write "
                "it by np.load(PATH).astype('<u4').tofile(PATH)"
            )


def check_ids(path: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError for ids beyond the vocabulary, or numbers of another type, in a sample.

    The sample: up to 16 stretches of 256 tokens, evenly spread.
    """
    tokens = open_tokens(path)
    starts = np.linspace(0, max(0, len(tokens) - 256), 16).astype(int)
    starts += starts % 2  # at an even place, so that int64 shows
    sample = np.concatenate([tokens[start : start + 256] for start in np.unique(starts)])
    size = tokenizer.vocab_size
    if len(sample) > 2 and not sample[1::2].any() and sample.any():
        raise UserError(f"{path} holds int64: a token file is plain little-endian uint32")
    if sample.max() < size:
        return
    kinds = {"uint16": sample.view("<u2"), "big-endian uint32": sample.view(">u4")}
    for kind, values in kinds.items():
        if values.max() < size:
            raise UserError(f"{path} holds {kind}: a token file is plain little-endian uint32")
    raise UserError(
        f"{path} has the id {sample.max()}, beyond the {size} entries of the tokenizer "
        f"{tokenizer.name!r}: name the one that made it (--tokenizer)"
    )


def open_tokens(path: Path) -> np.ndarray:
    """The tokens of a file, mapped: what is not used is not read."""
    return np.memmap(path, "<u4", "r")


def make_targets(tokens: np.ndarray, mask_repeats: bool = False) -> np.ndarray:
    """targets[:, t] = tokens[:, t + 1], of tokens [B, T].

    The last has no next token within its instance and is -100, so that 4,096 tokens give 4,095
    targets. `mask_repeats` sets all targets of a row with a repeated n-gram to -100 (paper section
    3.1).

    >>> make_targets(np.array([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    if mask_repeats:
        targets[[has_repeats(row) for row in tokens]] = -100
    return targets


def has_repeats(tokens: np.ndarray, longest: int = 13, times: int = 32) -> bool:
    """Does any n-gram of 1 to `longest` of the tokens [T] stand `times` or more times in a row?

    Source: OLMo olmo/data/util.py

    >>> has_repeats(np.array([1, 2] * 32)), has_repeats(np.array([1, 2] * 31 + [1]))
    (True, False)
    """
    for n in range(1, longest + 1):
        # Between two of these positions, each token equals the one n before.
        differs = np.flatnonzero(tokens[n:] != tokens[:-n])
        stretches = np.diff(differs, prepend=-1, append=len(tokens) - n) - 1
        if (stretches.max() + n) // n >= times:
            return True
    return False


# ------------------------------------------------------------------------------------------
# The embedded corpus


def embedded_corpus(tokenizer: Tokenizer, out: Path = Path("tokens"), stage: int = 1) -> Path:
    """The folder of a stage's embedded corpus in a tokenizer's ids.

    It is built when it is absent or of another version.
    """
    # The name may come from a downloaded tokenizer_config.json: it must not be a path.
    name = tokenizer.name if is_plain_name(tokenizer.name) else tokenizer.fingerprint
    kind = "embedded" if stage == 1 else "dolmino"
    folder = out / f"{kind}-{name}"
    parts = VERSION_SOURCE.read_bytes() + tokenizer.fingerprint.encode() + sys.version.encode()
    version = hashlib.sha256(parts).hexdigest()[:12]
    if has_version(folder, version):
        return folder
    with temporary_folder(tmp_beside(folder)) as tmp:
        counts = {}
        digest = hashlib.sha256()
        for split in ("train", "val"):
            sources = embedded_documents(split, stage).items()
            bar = tqdm(sources, f"{folder.name}, {split}", leave=False, disable=None)
            for source, texts in bar:
                # A file's order is free: instances are shuffled, neighbours are not.
                random.Random(0).shuffle(texts)
                counts[f"{split}/{source}"] = write_tokens(texts, tmp / split, source, tokenizer)
                digest.update("\0".join(texts).encode("utf-8", "replace"))
        mark = {
            "version": version,
            "python": sys.version.split()[0],
            "sha256": digest.hexdigest(),
            "counts": counts,
        }
        write_json(tmp / "corpus.json", mark)
        # Another process, started beside this one, may have been faster.
        if not has_version(folder, version):
            replace_folder(tmp, folder)
    return folder


def has_version(folder: Path, version: str) -> bool:
    """Does the folder hold an embedded corpus of this version?"""
    mark = folder / "corpus.json"
    return mark.exists() and read_json(mark).get("version") == version


def remake_vocab(path: Path, size: int = 1000) -> None:
    """Train the laptop vocabulary again, and write it as a tiktoken rank file.

    Hugging Face's `tokenizers` library trains it. Raises UserError where it is not installed.
    """
    try:
        from tokenizers import Regex, Tokenizer as Learner, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError(
            "remaking the vocabulary needs the tokenizers library: pip install tokenizers"
        ) from None
    corpus = embedded_documents("train")
    texts = corpus["docs"] + corpus["code"] + corpus["math"][::4] + corpus["qa"][::4]
    # So that the headers of the chat template take few tokens.
    texts += ["<|system|>\n\n<|user|>\n\n<|assistant|>\n"] * 500

    split = pre_tokenizers.Split(Regex(LAPTOP), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner = Learner(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=byte_level.alphabet()
    )
    learner.train_from_iterator(texts, trainer)

    # The order of the merges is the order of the ids, after those of the single bytes.
    vocab = learner.get_vocab()
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [unspell(word) for word in sorted(vocab, key=vocab.get) if len(word) > 1]
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    path.write_text("".join(lines))
    print(f"{path}: {len(tokens)} entries, sha256 {sha256(path)[:12]}")


# ------------------------------------------------------------------------------------------
# Your own text


@dataclass(frozen=True)
class Config:
    # .txt, .jsonl or .json (a line: an object with "text"), also .gz and .zst, or folders of them;
    # none: the embedded corpus
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    # of the folder tokens/<name>/; default: the name of the first path, without endings
    name: str = ""
    # laptop, olmo2, or a folder with tokenizer.json
    tokenizer: str = "laptop"
    # held out: the last part of each .txt, or so many of the .jsonl documents
    val_fraction: float = 0.05
    # where <name>/ is made
    out: Path = Path("tokens")
    # CPU threads; 0: all cores
    threads: Threads = 0
    # train laptop.tiktoken again (needs the tokenizers library)
    remake_vocab: bool = False
    # compare the token files in the given folders with the sha256 beside each, and make nothing
    verify: bool = False


def tokenize_paths(config: Config, tokenizer: Tokenizer) -> Path:
    """Tokenise config.paths into <out>/<name>/{train,val}/; the folder.

    Raises UserError, leaving nothing behind.
    """
    files = find_texts(config.paths)
    folder = new_folder(config)
    totals = {}
    size = sum(path.stat().st_size for path in files)
    with temporary_folder(tmp_beside(folder)) as tmp:
        for split in ("train", "val"):
            with tqdm(total=size, desc=split, unit="B", unit_scale=True) as bar:
                texts = read_split(files, split, config.val_fraction, bar)
                totals[split] = write_tokens(texts, tmp / split, folder.name, tokenizer)
        if not totals["train"]["tokens"]:
            raise UserError(f"{', '.join(map(str, config.paths))}: no text to train on")
        tmp.rename(folder)
    return folder


def new_folder(config: Config) -> Path:
    """Where the tokens go. Raises UserError where it exists or flags are wrong."""
    if not 0 <= config.val_fraction < 1:
        raise UserError(f"--val-fraction {config.val_fraction} must be at least 0 and below 1")
    name = config.name or plain_name(config.paths[0])
    if not is_plain_name(name):
        raise UserError(
            f"--name {name!r} must be a plain name, of letters, digits, '.', '_' and '-': it "
            f"becomes a folder in {config.out}"
        )
    folder = config.out / name
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or choose another --name")
    return folder


def show(folder: Path, tokenizer: Tokenizer) -> None:
    """Print the counts of a token folder and the beginning of what a model will see first."""
    print(" " * 24 + "  documents       tokens        bytes  bytes/token")
    for path in sorted(folder.glob("*/*.npy")):
        row = read_json(path.with_suffix(".json"))
        print(
            f"{path.parent.name + '/' + path.stem:24}{row['documents']:>11,}{row['tokens']:>13,}"
            f"{row['bytes']:>13,}{row['bytes'] / row['tokens']:>13.2f}"
        )
    data = TokenData(token_files([folder], "train"), 128, tokenizer)
    if len(data):
        tokens, _ = data.batch(0, 1, seed=6198)
        print("an instance of 128 tokens, the first in the shuffled order:")
        print(repr(tokenizer.decode(tokens[0])))


def verify_tokens(paths: Iterable[Path]) -> None:
    """Print how many token files are what their sidecars say. Raises UserError for one that is not.

    Before training that happens by itself where all files have at most 1 GiB.
    """
    files: list[Path] = []
    for path in paths:
        files += [path] if path.is_file() else sorted(path.rglob("*.npy"))
    sidecars = []
    for path in files:
        beside = path.with_suffix(".json")
        sidecars.append(read_json(beside) if beside.exists() else {})
    check_hashes(files, sidecars)
    known = sum("sha256" in sidecar for sidecar in sidecars)
    print(f"{known:,} of {len(files):,} token files have a sha256 beside them, and are as it says")


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    if config.remake_vocab:
        return remake_vocab(LAPTOP_FILE)
    if config.verify:
        return verify_tokens(config.paths)
    check_ranges(config)
    tokenizer = copy.copy(get_tokenizer(config.tokenizer))
    tokenizer.threads = config.threads or tokenizer.threads
    if config.paths:
        folder = tokenize_paths(config, tokenizer)
    else:
        folder = embedded_corpus(tokenizer, config.out)
    show(folder, tokenizer)
    print(f"{folder} (tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} entries)")


if __name__ == "__main__":
    run_cli(main)
