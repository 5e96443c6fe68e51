"""The counted rules of style, which keep every file readable.

They judge what can be counted; whether a page reads well, only a reader can say. A file that breaks
one holds too much in one place: find the thought in it that deserves a name, or a file, of its own.
"""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

COLUMNS = 100
FILE_LINES = 700
FUNCTION_LINES = 40  # without the docstring
LOOP_LINES = 75  # of `main`, and of a function that trains
USUAL_NODES = 18  # nodes of the syntax tree, in nine of ten simple statements of a file
MOST_NODES = 50  # in any of them

# From the ground up: a file imports only from its own floor and from those below. So infra/ has
# never heard of a transformer, and tasks/ has never seen a model.
FLOORS = """infra.__init__ infra.files infra.gpus infra.settings infra.distributed infra.sharding
infra.hub infra.download infra.checkpoint infra.kept infra.metrics infra.run tokenizer tasks decode
shape model documents tokenfiles lists data recipes likelihood released servers answers sample eval
pretrain soup counting anneal rollouts sft dpo rlvr posttrain plan compare""".split()

# Kinds of nodes, by their names in https://docs.python.org/3/library/ast.html
SIMPLE = "Assign AugAssign AnnAssign Return Expr Raise Assert Delete".split()
COMPREHENSIONS = "ListComp SetComp DictComp GeneratorExp".split()
IMPORTS = "Import ImportFrom".split()
STANDING_ALONE = "Call Yield YieldFrom Await Constant".split()  # a constant: docstring or ...
IN_TABLES = """Dict List Tuple Set Constant Name Attribute Load Call keyword
UnaryOp USub BinOp Mult Pow FloorDiv""".split()


def kind(node: ast.AST) -> str:
    return type(node).__name__


def counted_problems(path: str, text: str) -> list[str]:
    """What breaks a counted rule in a file of this text, each as "path:line: what"."""
    tree = ast.parse(text)
    found = [*lengths(text), *sizes(tree), *imports(path, tree)]
    for node in ast.walk(tree):
        found += forms(node)
    return [f"{path}:{line}: {what}" for line, what in sorted(found)]


def lengths(text: str):
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            yield number, f"{len(line)} columns, at most {COLUMNS}"
    if len(lines) > FILE_LINES:
        yield len(lines), f"{len(lines)} lines, at most {FILE_LINES}"


def forms(node: ast.AST):
    """The rules that one node can break."""
    if kind(node) in ("FunctionDef", "AsyncFunctionDef"):
        docstring = ast.get_docstring(node, clean=False)
        lines = node.end_lineno - node.lineno + 1
        lines -= docstring.count("\n") + 1 if docstring else 0
        trains = any(getattr(child, "attr", "") == "backward" for child in ast.walk(node))
        limit = LOOP_LINES if trains or node.name == "main" else FUNCTION_LINES
        if lines > limit:
            yield node.lineno, f"{node.name} has {lines} lines, at most {limit}"
    if kind(node) == "Assign" and kind(node.value) == "Lambda":
        yield node.lineno, "a lambda with a name: write def"
    if kind(node) in COMPREHENSIONS and len(node.generators) > 1:
        yield node.lineno, "a comprehension with more than one for: write a loop"
    if kind(node) == "Expr" and kind(node.value) not in STANDING_ALONE:
        yield node.lineno, "an expression as a statement: write if or for"


def sizes(tree: ast.Module):
    """How much one statement says: a large one is several thoughts, and each deserves a name."""
    counts = []
    for node in ast.walk(tree):
        is_docstring = kind(node) == "Expr" and kind(node.value) == "Constant"
        if kind(node) in SIMPLE and not is_docstring and not is_table(node):
            annotation = getattr(node, "annotation", None)
            nodes = count_nodes(node) - (count_nodes(annotation) if annotation else 0)
            counts.append((nodes, node.lineno))
    counts.sort()
    for nodes, line in counts:
        if nodes > MOST_NODES:
            yield line, f"a statement of {nodes} nodes, at most {MOST_NODES}"
    nodes, line = counts[len(counts) * 9 // 10] if counts else (0, 0)
    if nodes > USUAL_NODES:
        yield line, f"a tenth of all statements has {nodes} nodes or more, at most {USUAL_NODES}"


def count_nodes(tree: ast.AST) -> int:
    return sum(isinstance(node, ast.expr | ast.stmt) for node in ast.walk(tree))


def is_table(node: ast.AST) -> bool:
    """Does it assign a table: literals, names and calls, without a sum, a condition or a loop?"""
    value = node.value if kind(node) in ("Assign", "AnnAssign") else None
    return value is not None and all(kind(part) in IN_TABLES for part in ast.walk(value))


def imports(path: str, tree: ast.Module):
    here = floor(path.removesuffix(".py").replace("/", "."))
    if here < 0 and not path.startswith("tests/"):
        yield 1, "it stands on no floor: give it one in FLOORS"
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if kind(node) in IMPORTS else []
        module = getattr(node, "module", "")
        for name in [f"{module}.{name}" if module else name for name in names]:
            if path.startswith("tasks/") and name.split(".")[0] == "torch":
                yield node.lineno, "imports torch, but tasks/ is about text and numbers"
            if here >= 0 and floor(name) > here:
                yield node.lineno, f"imports {name}, which stands above it"


def floor(name: str) -> int:
    """The floor of a module, or of what is in it; -1 if it is none of ours."""
    floors = [i for i, module in enumerate(FLOORS) if f"{name}.".startswith(f"{module}.")]
    return floors[0] if floors else -1


def ruff_problems(path) -> list[str]:
    """What ruff finds in a file, in its format and by the rules of pyproject.toml."""
    found = []
    for command in (["format", "--check"], ["check"]):
        options = ["--quiet", "--no-cache", "--output-format=concise", "--config=pyproject.toml"]
        ruff = [sys.executable, "-m", "ruff", *command, *options, path]
        out = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
        found += (out.stdout + out.stderr).splitlines()
    return found


def files() -> list[str]:
    """The project's files of Python, as git lists them, and this one."""
    command = ["git", "ls-files", "*.py", ":!tests"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return [*tracked.split(), "tests/test_house.py"]


@pytest.mark.parametrize("path", files())
def test_a_file_keeps_the_rules(path):
    found = counted_problems(path, (ROOT / path).read_text()) + ruff_problems(path)
    assert not found, "\n".join(found)


X = "x += 1\n"


@pytest.mark.parametrize(
    "path, text, problem",
    [
        ("model.py", X + "#" * 101, "2: 101 columns"),
        ("model.py", X * 701, "701: 701 lines"),
        ("model.py", "def f():\n" + f"    {X}" * 40, "1: f has 41 lines"),
        ("model.py", "def main():\n" + f"    {X}" * 75, "1: main has 76 lines"),
        ("model.py", X * 20 + "x=a" + "+a" * 24, "21: a statement of 51 nodes"),
        ("model.py", X * 8 + "x = a" + " + a" * 8, "9: a tenth of all statements has 19 nodes"),
        ("model.py", "f = lambda: 1", "1: a lambda with a name"),
        ("model.py", "x = [b for a in c for b in a]", "1: a comprehension with more"),
        ("model.py", "a or b()", "1: an expression as a statement"),
        ("model.py", "[a() for a in b]", "1: an expression as a statement"),
        ("model.py", "def f():\n    import pretrain as p", "2: imports pretrain, which"),
        ("infra/files.py", "from infra import run", "1: imports infra.run, which stands above"),
        ("infra/run.py", "from tokenizer import byte_letters", "1: imports tokenizer.byte_letters"),
        ("tasks/ifeval.py", "from torch.nn import Module", "1: imports torch"),
        ("tasks/ifeval.py", "import model", "1: imports model, which stands above"),
        ("helpers.py", X, "1: it stands on no floor"),
    ],
)
def test_each_rule_can_be_broken(path, text, problem):
    (found,) = counted_problems(path, text)
    assert found.startswith(f"{path}:{problem}")


@pytest.mark.parametrize(
    "text",
    [
        "#" * 100 + "\n" + X * 699,
        "def f():\n" + '    """Of\n    two lines."""\n' + f"    {X}" * 39,
        "def f():\n    loss.backward()\n" + f"    {X}" * 73,
        "x = a" + " + a" * 7 + "\nx: dict[str, int] = a" + " + a" * 7,
        X * 20 + "x=a" + "+a" * 23,
        "TABLE = [" + "\n(2**10, f(x=-1)), " * 20 + "]",
        "def f():\n    yield\n    [g(a) for a in b].sort()",
        "from infra.files import sync\nfrom tasks import ifeval\nimport decode, torch",
    ],
)
def test_the_limits_are_allowed(text):
    assert not counted_problems("model.py", text)


@pytest.mark.parametrize("text, problem", [("x=1\n", "unformatted"), ("import os\n", "F401")])
def test_ruff_finds_its_own(tmp_path, text, problem):
    (tmp_path / "new.py").write_text(text)
    (found,) = ruff_problems(tmp_path / "new.py")
    assert "new.py:1:" in found and problem in found
