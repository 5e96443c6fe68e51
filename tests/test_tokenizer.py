"""tokenizer.py against tiktoken and transformers, on texts that are hard to cut."""

import doctest
import json
import random

import pytest
import tiktoken
from conftest import SHARED, needs_cl100k
from transformers import AutoTokenizer

import tokenizer as module
from infra.files import UserError
from tasks.synthetic import embedded_documents
from tokenizer import get_tokenizer

HARD = [
    "",
    " ",
    "\n",
    "a",
    "naïve café",
    "日本語のテキスト、改行\n\n  と空白",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301\u0323 \u200b\u00a0\u2003x\u2028y",
    "don't I'LL we'Ve o'clock 'ſ",
    "x  =  1;\t\t// tabs\r\n\r\n   \n",
    "1234567890 3.14159 1,000 ½ ٣٤٥ ⅷ",
    "a" * 20_000,
    "ab " * 5000,
    " " * 3000 + "x",
    "!" * 3000,
    b"\xff\xfe broken \xc3\x28 bytes".decode("utf-8", "replace"),
    "\x00\x07\x1b control",
    "مرحبا بالعالم שלום Ελληνικά हिन्दी ไทย",
    "<|endoftext|>",
    "a<|endoftext|>b <|pad|>",
    "<|user|>\nHi\n<|assistant|>\nHello<|endoftext|>",
    "Straße İstanbul ǆ ﬁ",
    "e" + "\u0301" * 500,
]
BOTH = ["laptop", pytest.param("olmo2", marks=needs_cl100k)]


@needs_cl100k
def test_olmo2_is_cl100k_with_the_ids_of_the_release():
    olmo2, cl100k = get_tokenizer("olmo2"), tiktoken.get_encoding("cl100k_base")
    for text in HARD:
        if "<|" not in text:
            assert olmo2.encode(text) == cl100k.encode_ordinary(text), text[:50]
    assert (olmo2.vocab_size, olmo2.padded_vocab_size) == (100_278, 100_352)
    assert (olmo2.eos, olmo2.pad) == (100_257, 100_277)
    assert olmo2.encode("<|user|>\n") == [27, 91, 882, 91, 397]
    assert olmo2.encode("<|assistant|>\n") == [27, 91, 78191, 91, 397]
    assert olmo2.encode("<|system|>\n") == [27, 91, 9125, 91, 397]
    ids = {
        "|||PHONE_NUMBER|||": 100_261,
        "|||IP_ADDRESS|||": 100_263,
        "<|extra_id_0|>": 100_256,
        "<|fim_suffix|>": 100_260,
        "<|im_start|>": 100_264,
        "<|extra_id_10|>": 100_275,
        "<|endofprompt|>": 100_276,
    }
    assert {text: olmo2.encode(text) for text in ids} == {text: [i] for text, i in ids.items()}


@pytest.mark.parametrize("name", BOTH)
def test_exported_tokenizer_gives_the_same_ids_everywhere(name, tmp_path):
    ours = get_tokenizer(name)
    ours.save(tmp_path)
    theirs, back = AutoTokenizer.from_pretrained(tmp_path), get_tokenizer(tmp_path)
    for text in HARD:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=True)["input_ids"] == ids, text[:60]
        assert back.encode(text) == ids, text[:60]
        assert ours.decode(ids) == text and max(ids, default=0) < ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos, ours.pad)
    assert len(theirs) == ours.vocab_size
    assert (back.fingerprint, back.name) == (ours.fingerprint, name)
    assert (back.eos, back.pad) == (ours.eos, ours.pad)
    one_turn = [{"role": "user", "content": "Two plus two?"}]
    turns = [
        {"role": "system", "content": "Be kind."},
        *one_turn,
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "\nSure?\n"},
        {"role": "assistant", "content": ""},
    ]
    for messages, prompt in ((one_turn, True), (one_turn, False), (turns, False), (turns, True)):
        assert ours.apply_chat_template(messages, prompt) == theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=True, return_dict=False
        )
        assert ours.render_chat(messages, prompt) == theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )
    rendered = "<|endoftext|><|user|>\nTwo plus two?\n<|assistant|>\n"
    assert ours.render_chat(one_turn, True) == rendered
    with pytest.raises(UserError, match="message 1: expected a role"):
        ours.apply_chat_template([*one_turn, {"role": "robot", "content": "x"}])


def real_texts() -> dict[str, list[str]]:
    """The embedded corpus (a part of its questions), real texts, and characters of all Unicode."""
    rng = random.Random(0)
    texts = {"corpus": [], "unicode": []}
    for stage in (1, 2):
        for split in ("train", "val"):
            for documents in embedded_documents(split, stage).values():
                texts["corpus"] += documents[:2000]
    for top in (0x300, 0x3100, 0x1FAFF, 0x110000):
        for _ in range(200):
            points = [rng.randrange(top) for _ in range(300)]
            text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
            texts["unicode"].append(text)
    if SHARED.is_dir():
        play = (SHARED / "tinyshakespeare.txt").read_text()
        texts["shakespeare"] = [play, *play.split("\n\n")]
        texts["gsm8k"] = []
        for split in ("train", "test"):
            for line in open(SHARED / f"gsm8k_{split}.jsonl"):
                row = json.loads(line)
                texts["gsm8k"] += [row["question"], row["answer"]]
        prompts = open(SHARED / "ifeval_prompts.jsonl")
        texts["ifeval"] = [json.loads(line)["prompt"] for line in prompts]
    return texts


@pytest.mark.parametrize("name", BOTH)
def test_exported_tokenizer_gives_the_same_ids_over_whole_texts(name, tmp_path):
    ours = get_tokenizer(name)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for source, texts in real_texts().items():
        expected = theirs(texts, add_special_tokens=False)["input_ids"]
        assert ours.encode_batch(texts) == expected, source


def test_lone_surrogates_and_unknown_ids_do_no_harm():
    laptop = get_tokenizer("laptop")
    assert laptop.decode(laptop.encode("a\ud800b")) == "a\ufffdb"
    assert laptop.decode([laptop.encode("a")[0], 1023]) == "a\ufffd"
    assert laptop.decode(laptop.encode("é")[:1]) == "\ufffd"


def test_docstrings():
    assert doctest.testmod(module).failed == 0
