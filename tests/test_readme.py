"""What the README, the docs, the files and the help promise: counts, commands, links, imports."""

import ast
import contextlib
import functools
import graphlib
import importlib
import io
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_NAMES = [page.name for page in PAGES]
COMMANDS = [
    "model",
    "data",
    "sample",
    "eval",
    "pretrain",
    "anneal",
    "soup",
    "posttrain",
    "plan",
    "compare",
]
STAGES = ["sft", "prefs", "rm", "dpo", "ppo", "grpo"]

# The house from the ground up: a file imports only from floors below its own.
FLOORS = [
    ["infra.files"],
    ["infra.gpus"],
    ["infra.settings", "infra.distributed", "infra.hub", "infra.download"],
    ["infra.sharding"],
    ["infra.checkpoint"],
    ["infra.kept"],
    ["infra.metrics"],
    ["infra.run"],
    ["tokenizer"],
    [
        "tasks.synthetic",
        "tasks.benchmarks",
        "tasks.requests",
        "tasks.mmlu",
        "tasks.published",
        "tasks.sympy_server",
        "tasks.verifiers",
        "tasks.ifeval",
        "tasks.constraints",
        "tasks.mathematics",
        "tasks.flex_match",
        "tasks.own_reward",
        "tasks.conversations",
    ],
    ["decode"],
    ["shape"],
    ["model"],
    ["documents", "tokenfiles"],
    ["lists"],
    ["data"],
    ["recipes"],
    ["likelihood", "released"],
    ["servers"],
    ["answers"],
    ["sample", "eval"],
    ["pretrain", "soup"],
    ["counting"],
    ["anneal", "rollouts"],
    ["sft"],
    ["dpo"],
    ["rlvr"],
    ["posttrain"],
    ["plan", "compare"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def imports_of(module):
    """Every name that a file imports, in functions too (`from infra import x`: infra.x)."""
    names = set()
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}, line {node.lineno}: name the module in full"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tracked_files():
    out = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True)
    return out.stdout.split()


# ---- The files


def test_imports_go_downwards():
    graph = {}
    for module, floor in FLOOR_OF.items():
        graph[module] = imports_of(module) & FLOOR_OF.keys()
        for name in graph[module]:
            same_wing = "." in name and name.split(".")[0] == module.split(".")[0]
            highest = floor if same_wing else floor - 1
            assert FLOOR_OF[name] <= highest, f"{module} imports {name}, which stands above it"
        if module.startswith("tasks."):
            packages = {name.split(".")[0] for name in imports_of(module)}
            assert not packages & {"torch", "model"}, module
    graphlib.TopologicalSorter(graph).prepare()  # raises where two files import each other


def test_nothing_happens_at_import(tmp_path):
    late = ("matplotlib", "transformers", "tokenizers", "datasets")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(FLOOR_OF)}; "
    program += f"print([name for name in {late} if name in sys.modules])"
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (out.stdout, out.stderr) == ("[]\n", "")
    assert not list(tmp_path.iterdir())


@functools.cache
def help_of(script):
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True)


@functools.cache
def help_of_stage(stage):
    """What `python posttrain.py STAGE --help` prints, without a process for each."""
    posttrain = importlib.import_module("posttrain")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        posttrain.main([stage, "--help"])
    return printed.getvalue()


@functools.cache
def help_of_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_docstring(name):
    out = help_of(f"{name}.py")
    assert out.returncode == 0 and out.stdout.strip() and not out.stderr
    docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    assert f"python {name}.py" in docstring


def test_top_level_holds_what_is_allowed():
    modules = [name for name in FLOOR_OF if "." not in name]
    allowed = {f"{name}.py" for name in modules} | {
        "README.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "requirements.txt",
        "pyproject.toml",
        "laptop.tiktoken",
        "figures",
        "docs",
        "tests",
        "infra",
        "tasks",
    }
    top = {path.split("/")[0] for path in tracked_files() if not path.startswith(".")}
    assert top <= allowed, top - allowed


def test_map_of_files_is_the_house():
    mapped = re.findall(r"^\| \[([\w/]+\.py)\]\(\1\) \| \w", README, re.M)
    kept = [path for path in tracked_files() if re.fullmatch(r"((infra|tasks)/)?\w+\.py", path)]
    there = [path for path in kept if not path.endswith("__init__.py")]
    assert sorted(mapped) == sorted(there)
    assert sorted(mapped) == sorted(str(path_of(name).relative_to(ROOT)) for name in FLOOR_OF)


# ---- The pages


def prose_of(text):
    """A page without its code blocks, tables and pictures."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"^(\||!\[).*$", "", text, flags=re.M)


def sentences_of(text):
    """The sentences of a page; a link counts as its words."""
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", prose_of(text))
    for block in re.split(r"\n\s*\n|\n(?=- |\d\. |#)", text):
        yield from re.split(r"(?<=[.!?:]) +(?=[A-Z`*])", " ".join(block.split()))


def test_readme_is_short_and_has_the_two_commands():
    assert len(README.splitlines()) <= 250
    lines = README.splitlines()
    scripts = ["pretrain.py", "anneal.py", "soup.py", "posttrain.py"]
    first = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt"
    assert " && ".join([first, *(f"python {script}" for script in scripts)]) in lines
    second = "pip install -r requirements.txt -r tests/requirements.txt"
    assert f"{second} && python -m pytest tests -n 2 --dist loadfile" in lines


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_lines_and_sentences_are_short(page):
    text = page.read_text()
    wide = [line for line in prose_of(text).splitlines() if len(line) > 100]
    assert not wide, wide
    long = [sentence for sentence in sentences_of(text) if len(sentence) > 200]
    assert not long, long


def slugs_of(text):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_resolve(page):
    text = page.read_text()
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if not path.startswith("http"):
            target = page.parent / path if path else page
            assert target.exists(), path
            assert not anchor or anchor in slugs_of(target.read_text()), f"{path}#{anchor}"
    for path in re.findall(r"`((?:tests|infra|tasks|docs|figures)/[\w/-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def spans_of(text):
    """What stands in `backquotes`, in tables too."""
    text = prose_of(text) + "\n".join(re.findall(r"^\|.*", text, re.M))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands_of(text):
    """(words before the script, script, words after it) of each command that runs one of ours."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    lines = blocks.replace("\\\n", " ").splitlines() + spans_of(text)
    for line in lines:
        for part in re.split(r"&&|\||;", re.sub(r"(^|\s)#.*", "", line)):
            start = r"(python |(?:srun )?torchrun .*?)?"
            if found := re.match(start + r"([\w/]+\.py)(?:\s(.*)|$)", part.strip()):
                yield found[1] or "", found[2], found[3] or ""


def flags_of(words):
    return re.findall(r"(?:^|\s)(--[\w-]+)", words)


def has_flag(text, flag):
    return re.search(rf"{flag}(?![\w-])", text) is not None


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_every_command_names_what_exists(page):
    for before, script, after in commands_of(page.read_text()):
        path = script if "/" in script or (ROOT / script).exists() else f"tests/{script}"
        assert (ROOT / path).exists(), script
        first = after.split(" ")[0]
        is_stage = path == "posttrain.py" and first in STAGES
        for flag in flags_of(after):
            shown = help_of_stage(first) if is_stage else help_of(path).stdout
            assert has_flag(shown, flag), (script, after)
        for flag in flags_of(before):
            assert has_flag(help_of_torchrun(), flag), flag


def test_every_flag_that_stands_alone_exists():
    spans = [span for page in PAGES for span in spans_of(page.read_text()) if span[:2] == "--"]
    flags = {flag for span in spans for flag in flags_of(span)}
    helps = [help_of(f"{name}.py").stdout for name in COMMANDS] + [help_of_torchrun()]
    helps += [help_of_stage(stage) for stage in STAGES]
    helps += [help_of("tests/kill.py").stdout, help_of("tests/bench.py").stdout]
    helps += [help_of("tests/gpu.py").stdout]
    assert len(flags) > 30
    missing = sorted(flag for flag in flags if not any(has_flag(text, flag) for text in helps))
    assert not missing, missing


def test_new_names_are_where_contributing_says():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| `([\w/]+\.py)` \|$", text, re.M)
    assert len(rows) > 40
    missing = []
    for names, path in rows:
        source = (ROOT / path).read_text()
        found = re.findall(r"`(\w+)`", names)
        missing += [f"{name} in {path}" for name in found if not re.search(rf"\b{name}\b", source)]
    for name, path in re.findall(r"`(\w+)`(?: [^`\n]{0,20})?\s\(`([\w/]+\.py)`\)", text):
        if not re.search(rf"\b{name}\b", (ROOT / path).read_text()):
            missing.append(f"{name} in {path}")
    assert not missing, missing
