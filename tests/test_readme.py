"""What the README, the files and the help promise: counts, commands, imports."""
import ast
import functools
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
ORDER = ["model", "data", "eval", "pretrain", "anneal", "soup", "posttrain", "sample"]  # each imports from those before it only


def test_imports_go_one_way_and_nothing_happens_at_import(tmp_path):
    for name in ORDER:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not imported & set(ORDER[ORDER.index(name):]), name
    out = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(ORDER)}; import torch; "
                          "print(torch.initial_seed(), 'matplotlib' in sys.modules, 'transformers' in sys.modules, 'tokenizers' in sys.modules)"],
                         capture_output=True, text=True, cwd=tmp_path)
    seed, *rest = out.stdout.split()
    assert rest == ["False"] * 3 and not out.stderr and not list(tmp_path.iterdir())


@functools.cache
def help_of(script, *stage):
    return subprocess.run([sys.executable, ROOT / script, *stage, "--help"], capture_output=True, text=True)


@pytest.mark.parametrize("name", ORDER)
def test_help_and_docstring(name):
    out = help_of(f"{name}.py")
    assert out.returncode == 0 and out.stdout.strip() and not out.stderr
    docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    assert f"python {name}.py" in docstring


def test_every_command_names_what_exists():
    commands = re.findall(r"^python (\S+\.py)(.*)$", README, re.M) + re.findall(r"`python (\S+\.py)([^`]*)`", README)
    assert len(commands) > 8
    for script, rest in commands:
        assert (ROOT / script).exists(), script
        stage = [word for word in rest.split()[:1] if script == "posttrain.py" and word in ("sft", "prefs", "rm", "dpo", "ppo", "grpo")]
        shown = help_of(script, *stage).stdout if "--" in rest else ""
        for flag in re.findall(r" (--[\w-]+)", rest):
            assert flag in shown, (script, flag)
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
    text = "".join((ROOT / f"{name}.py").read_text() for name in ORDER)
    text += subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True).stdout
    for flag in re.findall(r"`(--[\w-]+)[ `]", README):
        assert flag.removeprefix("--no-").removeprefix("--").replace("-", "_") in text, flag


def test_top_level_holds_what_the_design_lists():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert top <= {"README.md", "LICENSE", "requirements.txt", "laptop.tiktoken", "figures", "tests", "pyproject.toml", "infra", "tasks", *(f"{name}.py" for name in ORDER)}
