"""data.py against tiktoken, transformers and OLMo-core, and on text as people have it."""
import contextlib
import doctest
import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import SHARED, fails, needs_cl100k, needs_shared
from transformers import AutoTokenizer

import data as module
from data import (TASKS, THINGS, TokenData, embedded_documents, get_tokenizer, has_repeats, is_prose, make_targets, remake_vocab, task_items,
                  token_files, write_tokens)
from infra.files import UserError, replace_folder

HARD = ["", " ", "\n", "a", "naïve café", "日本語のテキスト、改行\n\n  と空白", "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301\u0323 \u200b\u00a0\u2003x\u2028y", "don't I'LL we'Ve o'clock 'ſ",
        "x  =  1;\t\t// tabs\r\n\r\n   \n", "1234567890 3.14159 1,000 ½ ٣٤٥ ⅷ", "a" * 20_000, "ab " * 5000, " " * 3000 + "x", "!" * 3000,
        b"\xff\xfe broken \xc3\x28 bytes".decode("utf-8", "replace"), "\x00\x07\x1b control", "مرحبا بالعالم שלום Ελληνικά हिन्दी ไทย",
        "<|endoftext|>", "a<|endoftext|>b <|pad|>", "<|user|>\nHi\n<|assistant|>\nHello<|endoftext|>", "Straße İstanbul ǆ ﬁ", "e" + "\u0301" * 500]
BOTH = ["laptop", pytest.param("olmo2", marks=needs_cl100k)]


@needs_cl100k
def test_olmo2_is_cl100k_with_the_ids_of_the_release():
    olmo2, cl100k = get_tokenizer("olmo2"), tiktoken.get_encoding("cl100k_base")
    for text in HARD:
        if "<|" not in text:
            assert olmo2.encode(text) == cl100k.encode_ordinary(text), text[:50]
    assert (olmo2.vocab_size, olmo2.padded_vocab_size, olmo2.eos, olmo2.pad) == (100_278, 100_352, 100_257, 100_277)
    assert olmo2.encode("<|user|>\n") == [27, 91, 882, 91, 397]
    assert olmo2.encode("<|assistant|>\n") == [27, 91, 78191, 91, 397]
    assert olmo2.encode("<|system|>\n") == [27, 91, 9125, 91, 397]
    ids = {"|||PHONE_NUMBER|||": 100_261, "|||IP_ADDRESS|||": 100_263, "<|extra_id_0|>": 100_256, "<|fim_suffix|>": 100_260,
           "<|im_start|>": 100_264, "<|extra_id_10|>": 100_275, "<|endofprompt|>": 100_276}
    assert {text: olmo2.encode(text) for text in ids} == {text: [i] for text, i in ids.items()}


@pytest.mark.parametrize("name", BOTH)
def test_exported_tokenizer_gives_the_same_ids_everywhere(name, tmp_path):
    ours = get_tokenizer(name)
    ours.save(tmp_path)
    theirs, back = AutoTokenizer.from_pretrained(tmp_path), get_tokenizer(tmp_path)
    for text in HARD:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=True)["input_ids"] == ids == back.encode(text), text[:60]
        assert ours.decode(ids) == text and max(ids, default=0) < ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (ours.eos, ours.pad, ours.vocab_size)
    assert (back.fingerprint, back.name, back.eos, back.pad) == (ours.fingerprint, name, ours.eos, ours.pad)
    one_turn = [{"role": "user", "content": "Two plus two?"}]
    turns = [{"role": "system", "content": "Be kind."}, *one_turn, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "\nSure?\n"},
             {"role": "assistant", "content": ""}]
    for messages, prompt in ((one_turn, True), (one_turn, False), (turns, False), (turns, True)):
        assert ours.apply_chat_template(messages, prompt) == theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert ours.render_chat(messages, prompt) == theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert ours.render_chat(one_turn, True) == "<|endoftext|><|user|>\nTwo plus two?\n<|assistant|>\n"
    with pytest.raises(UserError, match="message 1 needs a role"):
        ours.apply_chat_template([*one_turn, {"role": "robot", "content": "x"}])


def real_texts() -> dict[str, list[str]]:
    """The embedded corpus (of its generators a part), Shakespeare, GSM8K, IFEval's prompts, and characters drawn from all of Unicode."""
    rng = random.Random(0)
    texts = {"corpus": [document for stage in (1, 2) for split in ("train", "val") for documents in embedded_documents(split, stage).values()
                        for document in documents[:2000]],
             "unicode": ["".join(chr(c) for c in (rng.randrange(top) for _ in range(300)) if not 0xD800 <= c < 0xE000)
                         for top in (0x300, 0x3100, 0x1FAFF, 0x110000) for _ in range(200)]}
    if SHARED.is_dir():
        play = (SHARED / "tinyshakespeare.txt").read_text()
        texts["shakespeare"] = [play, *play.split("\n\n")]
        texts["gsm8k"] = [json.loads(line)[key] for split in ("train", "test") for line in open(SHARED / f"gsm8k_{split}.jsonl") for key in ("question", "answer")]
        texts["ifeval"] = [json.loads(line)["prompt"] for line in open(SHARED / "ifeval_prompts.jsonl")]
    return texts


@pytest.mark.parametrize("name", BOTH)
def test_exported_tokenizer_gives_the_same_ids_over_whole_texts(name, tmp_path):
    ours = get_tokenizer(name)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for source, texts in real_texts().items():
        assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"], source


def test_lone_surrogates_and_unknown_ids_do_no_harm():
    laptop = get_tokenizer("laptop")
    assert laptop.decode(laptop.encode("a\ud800b")) == "a\ufffdb"
    assert laptop.decode([laptop.encode("a")[0], 1023]) == "a\ufffd"
    assert laptop.decode(laptop.encode("é")[:1]) == "\ufffd"


def test_laptop_vocabulary_is_what_its_command_makes(tmp_path):
    remake_vocab(tmp_path / "again.tiktoken")
    again, shipped = ({line.split()[0] for line in path.read_text().splitlines()} for path in
                      (tmp_path / "again.tiktoken", module.HERE / "laptop.tiktoken"))
    assert len(again) == len(shipped) == 1000
    assert len(again & shipped) > 900  # another Python has other docstrings
    laptop = get_tokenizer("laptop")
    assert all(laptop.ranks[bytes([b])] == b for b in range(256)) and (laptop.eos, laptop.pad) == (1000, 1001)
    assert laptop.encode("2024")[-1] == laptop.encode("4")[0]  # a digit at a time


# ---- token files


def make_files(folder, lengths, seed=0):
    """Official-like token files: raw uint32, no .json beside them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = [folder / f"part-{i}.npy" for i in range(len(lengths))]
    for path, length in zip(paths, lengths):
        rng.integers(0, 1000, length).astype("<u4").tofile(path)
    return paths


def test_token_files_are_the_official_format(tmp_path):
    laptop = get_tokenizer("laptop")
    counts = write_tokens(["def f():", "", "x = 1\n"], tmp_path, "mine", laptop)
    raw = (tmp_path / "mine-00000.npy").read_bytes()
    expected = [*laptop.encode("def f():"), 1000, 1000, *laptop.encode("x = 1\n"), 1000]
    assert list(memoryview(raw).cast("I")) == expected and counts == {"tokens": len(expected), "documents": 3, "bytes": 14}
    sidecar = json.loads((tmp_path / "mine-00000.json").read_text())
    assert sidecar["tokens"] == len(expected) and sidecar["tokenizer"] == "laptop" and len(sidecar["sha256"]) == 64
    assert token_files([tmp_path], "train") == [tmp_path / "mine-00000.npy"]


def test_files_roll_over_and_documents_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_TOKENS", 50)
    laptop = get_tokenizer("laptop")
    texts = [f"document number {i} of some words" for i in range(30)]
    total = write_tokens(texts, tmp_path, "mine", laptop)
    parts = [np.fromfile(path, "<u4") for path in token_files([tmp_path], "train")]
    assert len(parts) > 5 and all(len(part) <= 51 and part[-1] == laptop.eos for part in parts)
    assert sum(map(len, parts)) == total["tokens"]
    assert laptop.decode(np.concatenate(parts)).split("<|endoftext|>")[:-1] == texts


def olmo_core_batches(paths, seq_len, batch, seed, epoch, rank, world, work_dir):
    """The batches [.., T] that OLMo-core's own loader gives a rank."""
    from olmo_core.data import DataCollator, NumpyFSLDataLoader, NumpyFSLDataset
    dataset = NumpyFSLDataset(*paths, sequence_length=seq_len, pad_token_id=1001, eos_token_id=1000, vocab_size=1002,
                              dtype=np.uint32)
    dataset.prepare()
    loader = NumpyFSLDataLoader(dataset, collator=DataCollator(pad_token_id=1001), work_dir=work_dir, global_batch_size=batch * seq_len,
                                seed=seed, dp_rank=rank, dp_world_size=world)
    loader.reshuffle(epoch)
    return [b["input_ids"].numpy() for b in loader]


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2), (3, 4)])
def test_order_of_instances_equals_olmo_core(rank, world, tmp_path):
    paths = make_files(tmp_path / "files", [1000, 333, 64, 31, 2048])
    paths.append(paths[1])  # a file listed twice is seen twice
    ours = TokenData(paths, 32, get_tokenizer("laptop"))
    assert len(ours) == 31 + 10 + 2 + 0 + 64 + 10
    per_epoch = len(ours) // 8
    for epoch in (1, 2):
        theirs = olmo_core_batches(paths, 32, 8, 34_521, epoch, rank, world, tmp_path / "work")
        assert len(theirs) == per_epoch
        for i, batch in enumerate(theirs):
            tokens, targets = ours.batch((epoch - 1) * per_epoch + i, 8, 34_521, first_epoch=1, rank=rank, world=world)
            assert np.array_equal(tokens, batch)
            assert np.array_equal(targets[:, :-1], batch[:, 1:]) and (targets[:, -1] == -100).all()


def test_batches_depend_on_their_step_alone(tmp_path):
    paths = make_files(tmp_path / "files", [5000, 700])
    laptop = get_tokenizer("laptop")
    first = TokenData(paths, 16, laptop)
    in_order = [first.batch(step, 12, seed=5)[0] for step in range(90)]  # three epochs
    fresh = TokenData(paths, 16, laptop)
    assert all(np.array_equal(fresh.batch(step, 12, seed=5)[0], in_order[step]) for step in (88, 3, 41))
    for step in (0, 50):
        rows = np.empty((12, 16), np.int64)
        for rank in range(3):
            rows[rank::3] = first.batch(step, 12, seed=5, rank=rank, world=3)[0]
        assert np.array_equal(rows, in_order[step])
    epoch = np.concatenate([first.positions(step, 12, 5) for step in range(len(first) // 12)])
    assert len(set(epoch)) == len(epoch)  # no instance twice in an epoch
    assert first.hash == fresh.hash != TokenData(paths[::-1], 16, laptop).hash


def test_repeat_filter_equals_olmo_core():
    from olmo_core.data.utils import find_periodic_sequences
    rng = np.random.default_rng(0)
    verdicts = []
    for trial in range(400):
        tokens = rng.integers(0, 3 if trial % 2 else 1000, 600)
        n, times, start = rng.integers(1, 16), rng.integers(29, 36), rng.integers(0, 40)
        piece = np.tile(rng.integers(0, 1000, n), times)[: 600 - start]
        tokens[start : start + len(piece)] = piece
        verdict = any(found.times >= 32 for found in find_periodic_sequences(tokens, max_period=13, min_period=1))
        assert has_repeats(tokens) == verdict, (n, times, start)
        verdicts.append(verdict)
    assert 50 < sum(verdicts) < 350
    rows = np.stack([np.arange(64), np.tile([7], 64)])
    assert (make_targets(rows, mask_repeats=True)[1] == -100).all() and make_targets(rows, mask_repeats=True)[0, 0] == 1


def test_bad_files_are_refused(tmp_path):
    laptop = get_tokenizer("laptop")
    paths = make_files(tmp_path, [100, 100])

    def refused(words, path=paths[0], length=10):
        with pytest.raises(UserError, match=words):
            data = TokenData(token_files([path], "train"), length, laptop)
            data.batch(0, 4, 0)

    refused("does not exist", tmp_path / "none.npy")
    (tmp_path / "empty").mkdir()
    refused("holds no token file", tmp_path / "empty")
    refused("1 instances of 60 tokens are fewer than one batch of 4", length=60)
    np.array([5, 2000] * 50, "<u4").tofile(paths[0])
    refused(re.escape("id 2000 near token"))
    paths[0].write_bytes(b"")
    refused("is empty")
    paths[0].write_bytes(b"12345")
    refused("multiple of 4")
    write_tokens(["some text"] * 50, tmp_path / "cut", "cut", laptop)
    cut = tmp_path / "cut" / "cut-00000.npy"
    cut.write_bytes(cut.read_bytes()[:-40])
    refused("truncated", cut)
    sidecar = cut.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "fingerprint": "0" * 12, "tokenizer": "other"}))
    cut.write_bytes(cut.read_bytes() + bytes(40))
    refused("was made with the tokenizer 'other'", cut)
    sidecar.write_text("{")
    refused("cannot be read", cut)


# ---- the embedded corpus


def test_embedded_corpus_is_split_and_deduplicated():
    train, val = embedded_documents("train"), embedded_documents("val")
    assert {source: len(documents) > 0 for source, documents in train.items()} == dict.fromkeys(["docs", "code", "math", "qa"], True)
    paragraphs = [" ".join(p.split()) for source in ("docs", "code") for d in train[source] for p in re.split(r"\n\s*\n", d)]
    long = [p for p in paragraphs if len(p) > 20]
    assert len(long) == len(set(long)) > 10_000
    held = {" ".join(p.split()) for source in ("docs", "code") for d in val[source] for p in re.split(r"\n\s*\n", d)}
    assert not {p for p in held if len(p) > 20} & set(long)
    assert sum(len(d) for d in train["docs"]) > 1_000_000 and sum(len(d) for d in val["docs"]) > 30_000
    assert embedded_documents("val") == val
    second, second_val = embedded_documents("train", stage=2), embedded_documents("val", stage=2)
    assert list(second) == list(second_val) == ["prose", "math", "qa", "instruct", "sums"]
    sentences = [" ".join(p.split()) for d in second["prose"] for p in d.split("\n\n") if p.strip()]
    assert len(sentences) > 1000 and set(sentences) < set(paragraphs) and all(is_prose(p) for p in sentences)
    assert not set(sentences) & {" ".join(p.split()) for d in second_val["prose"] for p in d.split("\n\n") if p.strip()}
    for task in ("math", "qa"):
        assert second[task] != train[task] and second_val[task] == val[task]


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_share_no_operands_with_training(task):
    def operands(item):
        return tuple(sorted(re.findall(r"\d+|" + "|".join(THINGS) if task == "instruct" else r"\d+", item["prompt"])))

    train, val = list(task_items(task, "train", 20_000)), list(task_items(task, "val", 600))
    assert len({item["prompt"] for item in val}) == 600
    assert not set(map(operands, train)) & set(map(operands, val))
    assert list(task_items(task, "val", 600)) == val != list(task_items(task, "val", 600, seed=1))
    for item in train[:500]:  # the answers are true
        if task == "instruct":
            a, b, c = re.findall("|".join(THINGS), item["prompt"])
            assert item["gold"] == {"capital": f"{a}, {b} and {c}".upper(), "other way": f"{c}, {b} and {a}", "twice": f"{a} {a} {b}",
                                    "one per line": f"- {a}\n- {b}\n- {c}"}[re.search("capital|other way|twice|one per line", item["prompt"])[0]]
            continue
        a, b = map(int, re.findall(r"\d+", item["prompt"]))
        if task == "math":
            assert int(item["gold"]) == (a + b if re.search("[+]|more", item["prompt"]) else a - b) and item["answer"].endswith(f"The answer is {item['gold']}.")
            steps = re.findall(r"(\d+) ([+-]) (\d+)(?: [+-] (1))? = (\d+)", item["answer"])
            assert len(steps) == 2
            for x, sign, y, carry, result in steps:
                assert int(x) + (1 if sign == "+" else -1) * (int(y) + int(carry or 0)) == int(result)
        else:
            order = [str(a), str(b)] if "Which" in item["prompt"] else re.findall(r"(\w+) has", item["prompt"])[:2]
            assert item["gold"] == order[(a > b) != bool(re.search("larger|more", item["prompt"]))]


# ---- your own text


def test_your_own_text_in_every_format(tmp_path, monkeypatch, capsys):
    import zstandard
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "dump" / "deep"
    folder.mkdir(parents=True)
    documents = [f"Document {i}: wörds and {i * i}." for i in range(400)]
    lines = [json.dumps({"text": text, "id": 1}) + "\n" for text in documents]
    (folder / "a.jsonl").write_text("".join(lines[:100]) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(lines[100:200]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress("".join(lines[200:]).encode()))
    (folder / "d.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    (folder / "ignored.md").write_text("no")
    module.main(["dump"])
    shown = capsys.readouterr().out
    assert "train/dump-00000" in shown and "val/dump-00000" in shown and "an instance of 128 tokens" in shown
    laptop = get_tokenizer("laptop")
    texts = {split: laptop.decode(np.fromfile(tmp_path / f"tokens/dump/{split}/dump-00000.npy", "<u4")).split("<|endoftext|>")[:-1]
             for split in ("train", "val")}
    assert sorted(t for split in texts.values() for t in split if t.startswith("Document")) == sorted(documents)
    assert 5 < len(texts["val"]) < 50
    tail = texts["val"][-1].splitlines()  # the end of the .txt, from the beginning of a line
    assert tail[0].startswith("line 95") and tail[-1] == "line 999" and texts["train"][-1].splitlines()[-1] == f"line {int(tail[0][5:]) - 1}"
    assert "tokens/dump exists" in fails(module.main, ["dump"], capsys)


def test_bad_text_is_refused_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    assert "bad.jsonl, line 2" in fails(module.main, ["bad.jsonl"], capsys)
    (tmp_path / "list.jsonl").write_text('[1]\n')
    assert "list.jsonl, line 1" in fails(module.main, ["list.jsonl"], capsys)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 1000)[:40])
    assert "cut.jsonl.gz is damaged" in fails(module.main, ["cut.jsonl.gz"], capsys)
    (tmp_path / "empty.txt").write_text(" \n")
    assert "no text to train on" in fails(module.main, ["empty.txt"], capsys)
    assert "does not exist" in fails(module.main, ["nothing.txt"], capsys)
    (tmp_path / "line.txt").write_text("no end of a line " * 100)
    module.main(["line.txt"])
    capsys.readouterr()
    assert (tmp_path / "tokens/line/val").is_dir()
    (tmp_path / "x.md").write_text("x")
    assert "no .txt" in fails(module.main, ["x.md"], capsys)
    assert "val-fraction" in fails(module.main, ["bad.jsonl", "--val-fraction", "nan"], capsys)
    assert "no tokenizer 'gpt9'" in fails(module.main, ["bad.jsonl", "--tokenizer", "gpt9"], capsys)
    assert [p.name for p in (tmp_path / "tokens").glob("*")] == ["line"] and not list((tmp_path / "tokens").glob(".*"))


@pytest.fixture
def small_corpus(monkeypatch):
    """The embedded corpus in small: how it is stored is what matters."""
    monkeypatch.setattr(module, "embedded_documents", lambda split, stage=1: {"docs": ["A document.\n"], "math": ["1 + 1 = 2\n"]})


@pytest.mark.parametrize("name", ["x/../../precious", "/precious", "..", "", "precious\0", "x" * 300, ["precious"]])
def test_a_downloaded_name_leads_nowhere_else(name, tmp_path, monkeypatch, small_corpus):
    """What a tokenizer_config.json calls itself names no folder but one below tokens/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens/embedded-x").mkdir(parents=True)
    for folder in ("precious", "tokens/precious"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thesis.txt").write_text("three years")
    get_tokenizer("laptop").save("theirs")
    config = json.loads(Path("theirs/tokenizer_config.json").read_text())
    Path("theirs/tokenizer_config.json").write_text(json.dumps(config | {"name": name}))
    tokenizer = get_tokenizer("theirs")
    for stage, kind in ((1, "embedded"), (2, "dolmino")):
        made = module.embedded_corpus(tokenizer, stage=stage)
        assert made == Path("tokens") / f"{kind}-{tokenizer.fingerprint}"
        assert made.resolve().parent == tmp_path / "tokens" and (made / "corpus.json").exists()
    for folder in ("precious", "tokens/precious"):
        assert (tmp_path / folder / "thesis.txt").read_text() == "three years"


def test_only_what_was_made_here_is_replaced(tmp_path, monkeypatch, small_corpus):
    """A folder of the user's that bears the name of ours stays; ours, of an older version, is renewed."""
    monkeypatch.chdir(tmp_path)
    laptop = get_tokenizer("laptop")
    folder = Path("tokens/embedded-laptop")
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("three years")
    with pytest.raises(UserError, match="embedded-laptop is in the way"):
        module.embedded_corpus(laptop)
    assert (folder / "thesis.txt").exists() and [path.name for path in Path("tokens").iterdir()] == ["embedded-laptop"]
    (folder / "thesis.txt").unlink()
    (folder / "corpus.json").write_text('{"version": "of last year"}')
    assert module.embedded_corpus(laptop) == folder and (folder / "train").is_dir()

    for new, mark, refused in (("a", "", True), ("b", "run.json", False), ("c", "soup.json", False)):
        for name in ("hf", ".saving-hf"):
            (tmp_path / new / name).mkdir(parents=True)
            (tmp_path / new / name / "weights").write_text(name)
        if mark:
            (tmp_path / new / mark).write_text("{}")
        with pytest.raises(UserError, match="in the way") if refused else contextlib.nullcontext():
            replace_folder(tmp_path / new / ".saving-hf", tmp_path / new / "hf")
        assert (tmp_path / new / "hf/weights").read_text() == ("hf" if refused else ".saving-hf")


@pytest.mark.parametrize("name", ["../precious", "a/b", "..", "/tmp/x"])
def test_names_given_by_hand_are_plain_too(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes.txt").write_text("a line of text\n" * 100)
    assert "must be a plain name" in fails(module.main, ["my notes.txt", "--name", name], capsys)
    module.main(["my notes.txt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my notes.txt", "tokens"]
    assert (tmp_path / "tokens/my-notes/train").is_dir()


@needs_shared
def test_tiny_shakespeare_survives(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module.main([str(SHARED / "tinyshakespeare.txt")])
    laptop = get_tokenizer("laptop")
    text = "".join(laptop.decode(np.fromfile(tmp_path / f"tokens/tinyshakespeare/{split}/tinyshakespeare-00000.npy", "<u4")[:-1])
                   for split in ("train", "val"))
    assert text == (SHARED / "tinyshakespeare.txt").read_text()


def test_docstrings():
    assert doctest.testmod(module).failed == 0
