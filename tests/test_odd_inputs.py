"""What people bring: endings, encodings, damaged archives, token files of other formats, names."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import fails

import data as module
import eval as eval_module
from data import TokenData, get_tokenizer, token_files
from documents import plain_name
from infra.files import UserError, ending, json_lines
from tasks.conversations import Source, read_examples

ROWS = [json.dumps({"text": f"Note {i}: the lamp on pier {i % 7} was lit."}) for i in range(400)]
LINES = "\n".join(ROWS) + "\n"
PROSE = "".join(f"The river runs past mill number {i}.\n" for i in range(400))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def documents(*paths):
    """The documents of the token folder that data.py makes of the paths."""
    folder = Path("tokens", plain_name(Path(paths[0])))
    module.main([*map(str, paths)])
    laptop = get_tokenizer("laptop")
    texts = []
    for path in sorted(folder.rglob("*.npy")):
        texts += laptop.decode(np.fromfile(path, "<u4")).split("<|endoftext|>")[:-1]
    return texts


# ---- endings


def test_dolmas_endings_are_read_and_what_is_left_out_is_named(capsys):
    for name in ("wiki-0.json.gz", "pes2o-0.JSON.GZ"):
        write(f"dolma/data/{name}", gzip.compress(LINES.encode()))
    write("dolma/data/notes.JSONL", LINES)
    write("dolma/data/README.TXT", PROSE)
    write("dolma/data/list.csv", "a,b")
    found = documents("dolma")
    assert sum(text.startswith("Note") for text in found) == 1200
    assert sum("river" in text for text in found) == 2  # both sides of the split
    assert "left out, as no text: 1 files, dolma/data/list.csv" in capsys.readouterr().out


def test_zst_has_all_its_frames(capsys):
    import zstandard

    frames = [zstandard.ZstdCompressor().compress(LINES.encode()) for _ in range(2)]
    path = write("two.jsonl.zst", b"".join(frames))
    assert len(list(json_lines(path))) == 800
    for cut in (100, len(frames[0]) // 2, len(frames[0]) + 50):
        path.write_bytes(b"".join(frames)[:cut])
        with pytest.raises(UserError, match="two.jsonl.zst is damaged after line .*too early"):
            list(json_lines(path))


def test_hidden_twins_are_no_text(capsys):
    write("hidden/story.txt", PROSE)
    write("hidden/._story.txt", bytes(range(256)) * 14)
    write("hidden/.ipynb_checkpoints/story-checkpoint.txt", PROSE)
    assert len(documents("hidden")) == 2


def test_rows_of_every_ending_train(folder):
    row = {"messages": [{"role": "user", "content": "Hi"}]}
    for name in ("a.JSONL", "a.json", "a.json.gz", "a.jsonl.gz"):
        text = json.dumps(row).encode()
        write(name, gzip.compress(text) if name.endswith(".gz") else text)
        assert [found for _, found in Source((name,), 1).rows()] == [row]
    write("list.json", json.dumps([row]))
    with pytest.raises(UserError, match="list.json, line 1.*an array"):
        Source(("list.json",), 1).rows()


SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def test_other_layouts_are_named_and_read(folder):
    write("sharegpt.jsonl", json.dumps(SHAREGPT))
    write("alpaca.jsonl", json.dumps(ALPACA))
    laptop = get_tokenizer("laptop")
    for layout, words in [("sharegpt", "<|user|>\nHi\n"), ("alpaca", "Add.\n\n1 and 2")]:
        name = f"{layout}.jsonl"
        with pytest.raises(UserError, match=f"{name}, line 1: .*--layout {layout}"):
            read_examples(Source((name,), 1), ("messages",), laptop, 64, False)
        source = Source((name,), 1, layout=layout)
        ((example,),) = read_examples(source, ("messages",), laptop, 64, False)
        assert words in laptop.decode(example.tokens) and example.n_targets > 1
    write("bad.jsonl", json.dumps({"conversations": [{"from": "bing", "value": "x"}]}))
    with pytest.raises(UserError, match="bad.jsonl, line 1: .*human, gpt or system"):
        Source(("bad.jsonl",), 1, layout="sharegpt").rows()


def test_pairs_that_are_the_same_once_cut_are_left_out_and_counted(capsys):
    def say(answer):
        return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]

    long = "The same beginning of both answers. " * 20
    rows = [{"chosen": say(long + "good"), "rejected": say(long + "bad")}] * 3
    rows.append({"chosen": say("good"), "rejected": say("bad")})
    write("pairs.jsonl", "\n".join(map(json.dumps, rows)))
    source = Source(("pairs.jsonl",), 1)
    keys = ("chosen", "rejected")
    assert len(read_examples(source, keys, get_tokenizer("laptop"), 64, False)) == 1
    assert "3 of 4 pairs are the same in their first 64 tokens" in capsys.readouterr().out
    assert len(read_examples(source, keys, get_tokenizer("laptop"), None, False)) == 4


# ---- encodings


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_mark_of_utf8_is_no_text(name):
    write(name, b"\xef\xbb\xbf" + (PROSE if name == "a.txt" else LINES).encode())
    assert not any("\ufeff" in text for text in documents(name))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_other_encodings_are_refused(name, encoding, capsys):
    text = "Das Mädchen ging über die Brücke. " * 50
    row = json.dumps({"text": text}, ensure_ascii=False)
    write(name, (text if name == "a.txt" else row).encode(encoding))
    words = "0xe4 is no UTF-8" if encoding == "latin-1" else "is UTF-16"
    assert words in fails(module.main, [name], capsys)
    assert not Path("tokens").exists()


def test_line_ends_and_odd_characters_stay(capsys):
    write("crlf.txt", PROSE.replace("\n", "\r\n"))
    assert "".join(documents("crlf.txt")) == PROSE.replace("\n", "\r\n")
    text = "line\u2028and\u0085another " * 9
    write("u2028.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    assert documents("u2028.jsonl") == [text]
    write("half.jsonl", '{"text": "half a smile \\ud83d and more"}\n')
    assert documents("half.jsonl") == ["half a smile \ufffd and more"]


# ---- damage


def test_damaged_archives_are_named_and_leave_nothing(capsys):
    whole = gzip.compress("".join(f"{row}\n" for row in ROWS * 50).encode(), 1)
    middle = bytearray(whole)
    middle[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    with pytest.raises((OSError, zlib.error)):
        gzip.decompress(bytes(middle))
    cases = {
        "middle": bytes(middle),
        "cut": whole[: len(whole) // 2],
        "not_gzip": LINES.encode(),
        "tail": whole + b"xxxx",
    }
    for name, content in cases.items():
        write(f"{name}.jsonl.gz", content)
        error = fails(module.main, [f"{name}.jsonl.gz"], capsys)
        # Before the checksum is read, damage in the middle may show as a row that is none.
        assert f"{name}.jsonl.gz is damaged after line" in error or name == "middle"
        assert f"{name}.jsonl.gz" in error and " line " in error
    assert not Path("tokens").exists()


def test_deep_brackets_are_one_line(capsys):
    deep = '{"text": "x", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    write("deep.jsonl", LINES + deep)
    assert "deep.jsonl, line 401" in fails(module.main, ["deep.jsonl"], capsys)


# ---- token files


def token_data(path):
    return TokenData(token_files([path], "train"), 8, get_tokenizer("laptop"))


def test_token_files_of_other_formats_are_found_at_the_start(folder):
    ids = np.random.default_rng(0).integers(1, 1000, 4000)
    kinds = {
        "int64": ids.astype("<i8"),
        "uint16": ids.astype("<u2"),
        "big-endian": ids.astype(">u4"),
    }
    for kind, array in kinds.items():
        array.tofile(f"{kind}.npy")
        with pytest.raises(UserError, match=f"{kind}.npy holds {kind}"):
            token_data(f"{kind}.npy")
    np.save("saved.npy", ids.astype("<u4"))
    with pytest.raises(UserError, match="saved.npy has NumPy's own header"):
        token_data("saved.npy")
    ids.astype("<u4").tofile("good.npy")
    assert len(token_data("good.npy")) == 500
    ids[-1] = 70_000  # late in the file
    ids.astype("<u4").tofile("late.npy")
    with pytest.raises(UserError, match="late.npy has the id 70000, beyond"):
        token_data("late.npy")


# ---- names


@pytest.mark.parametrize(
    "path, name",
    [
        ("corpora/v1.5", "v1.5"),
        ("v1.6.jsonl.gz", "v1.6"),
        ("my corpus (é)", "my-corpus-é"),
        (".hidden", "hidden"),
        ("wiki-0000.JSON.gz", "wiki-0000"),
    ],
)
def test_names_of_token_folders(path, name):
    assert plain_name(Path(path)) == name


def test_here_and_above_have_names(folder):
    assert plain_name(Path(".")) == folder.name
    assert plain_name(Path("..")) == folder.parent.name


def test_two_files_of_one_name_are_two_columns(tmp_path):
    laptop = get_tokenizer("laptop")
    write("same/a/test.jsonl", json.dumps({"text": "alpha " * 300}))
    write("same/b/test.jsonl", json.dumps({"text": "omega zebra quilt " * 300}))
    made = tmp_path / "made"
    made.mkdir()
    paths = ("same/a/test.jsonl", "same/b/test.jsonl")
    sources = eval_module.text_sources(paths, laptop, made)
    texts = {name: laptop.decode(np.fromfile(files[0], "<u4")) for name, files in sources.items()}
    assert texts.keys() == {"a-test", "b-test"}
    assert "alpha" in texts["a-test"] and "omega" in texts["b-test"]


def test_endings():
    assert ending(Path("a.TXT.zst")) == ".txt" and ending(Path("a.json.gz.bak")) == ""
