"""tests/gpu.py, which has half an hour of a GPU: no figure is lost, no part stops the others.

The driver is the real one, with real processes; a small script takes the place of the parts.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_parts
import pytest
from conftest import ROOT, fails

from counting import is_compiled
from plan import GIB, Plan

CHILD = """
import json, os, pathlib, subprocess, sys, time
name, file = sys.argv[1:3]
pathlib.Path(file).write_text(json.dumps({"figures": {"speed": time.time()}}))
if name == "dies":
    print("what it said last", flush=True)
    os.abort()
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(file).write_text(json.dumps({"figures": {"child": child.pid}}))
    time.sleep(600)
"""


def part(real):
    """Measures nothing."""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Three parts in the place of the real ones; the last one hangs."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(gpu, "SCRIPT", tmp_path / "child.py")
    table = {"works": (2, part), "dies": (2, part), "hangs": (0.05, part)}
    monkeypatch.setattr(gpu, "PARTS", table)
    return table


def call(*arguments, status=0):
    """Run it here; returns the parts of gpu.json."""
    try:
        gpu.main(["--dry", *arguments])
        ended = 0
    except SystemExit as error:
        ended = 0 if error.code is None else 1
    assert ended == status
    return json.loads(Path("gpu.json").read_text())["parts"]


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_each_part_is_recorded_whatever_becomes_of_the_others(parts, capsys):
    done = call(status=1)
    assert list(done) == ["works", "dies", "hangs"]
    assert done["works"]["figures"]["speed"] and "error" not in done["works"]
    assert done["dies"]["error"] == "ended with status -6" and done["dies"]["figures"]["speed"]
    assert done["dies"]["log"] == ["what it said last"]
    assert done["hangs"]["error"] == "killed: it took longer than its 0.05 minutes"
    assert done["hangs"]["seconds"] < 30
    time.sleep(0.1)
    assert not is_running(done["hangs"]["figures"]["child"])
    shown = capsys.readouterr().out
    assert "ERROR ended with status -6" in shown and "what it said last" in shown


def test_the_next_call_goes_on_with_what_is_left(parts, capsys):
    del parts["hangs"], parts["dies"]
    before = call()
    parts["also works"] = (2, part)
    both = call()
    assert both["works"] == before["works"] and "speed" in both["also works"]["figures"]
    anew = call("--only", "works")
    assert anew["works"] != both["works"] and anew["also works"] == both["also works"]
    assert call() == anew  # nothing is left


def test_no_part_begins_that_may_end_too_late(parts, capsys):
    parts["works"] = (0.05, part)
    parts["dies"] = (0.0501, part)  # of what is left after the first, too much
    del parts["hangs"]
    assert list(call("--minutes", "0.0501")) == ["works"]
    assert "no time for dies" in capsys.readouterr().out
    line = fails(gpu.main, ["--dry", "--minutes", "0.01"], capsys)
    assert "--minutes 0.01: a part may take 0.0501" in line


@pytest.mark.parametrize("name", ["commit", "device", "code", "torch"])
def test_figures_of_another_commit_or_device_are_not_taken_over(parts, name, capsys):
    del parts["hangs"], parts["dies"]
    before = call()
    report = json.loads(Path("gpu.json").read_text())
    report["here"][name] = "another"
    Path("gpu.json").write_text(json.dumps(report))
    assert call()["works"] != before["works"]
    assert f"gpu.json is of another {name}: all parts anew" in capsys.readouterr().out
    (old,) = Path().glob("gpu-*.json")
    assert json.loads(old.read_text()) == report


def test_a_file_that_is_no_report_is_left_alone(parts, capsys):
    Path("gpu.json").write_text('{"layers": 4}')
    assert "gpu.json is no report of this script" in fails(gpu.main, ["--dry"], capsys)
    assert Path("gpu.json").read_text() == '{"layers": 4}'


PARTS = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import gpu_parts
def raises(real):
    yield {{"first": 1}}
    raise RuntimeError("out of luck\\nand more")
def is_killed(real):
    yield {{"first": 1}}
    os.kill(os.getpid(), signal.SIGKILL)
gpu_parts.main({{"raises": (1, raises), "is_killed": (1, is_killed)}})
"""


@pytest.mark.parametrize(
    "name, status, more",
    [("raises", 1, {"error": "RuntimeError: out of luck"}), ("is_killed", -9, {})],
)
def test_a_part_keeps_what_it_measured_before_its_end(name, status, more):
    command = [sys.executable, "-c", PARTS, name, "out.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert json.loads(Path("out.json").read_text()) == {"figures": {"first": 1}, **more}


def test_as_many_layers_of_the_7b_as_the_plan_says():
    """Nine tenths of the memory are used, and one layer more would be too many."""
    c = gpu_parts.settings_of(True, "7B")
    layers = gpu_parts.layers_that_fit(c, 80 * GIB)
    planned = []
    for n in (layers, layers + 1):
        plan = Plan(gpu_parts.shape_of(True, "7B", layers=n), c)
        planned.append(plan.memory(c.micro_batch, is_compiled(c)).total())
    assert planned[0] <= 0.9 * 80 * GIB < planned[1]
