"""Everything that only a GPU can show, in one command: half an hour, three calls.

    python tests/gpu.py              # on one GPU, of torch 2.11 or 2.13; no network is needed
    python tests/gpu.py              # once more: the parts that are left
    python tests/gpu.py --only 1B    # one part anew
    python tests/gpu.py --dry        # every line on the CPU, with a tiny model: no figure counts

A part is a process of its own (tests/gpu_parts.py), which is killed when its minutes are over, so
that neither an error nor a lack of memory reaches the others. After each part the figures are
printed and kept in --out. Runs go to a temporary folder; nothing is written into the checkout.
"""

import argparse
import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from gpu_parts import PARTS  # noqa: E402

from infra.distributed import hash_of_code, run_cli  # noqa: E402
from infra.files import UserError, read_json, write_json  # noqa: E402
from infra.run import describe_machine  # noqa: E402

SCRIPT = Path(__file__).parent / "gpu_parts.py"


# ------------------------------------------------------------------------------------------
# What is kept


def describe(dry: bool) -> dict:
    """What figures depend on: those of another commit, device or torch are not taken over."""
    machine = describe_machine()
    return {
        "device": "the CPU (a dry run)" if dry else machine["hardware"]["gpu"],
        "torch": torch.__version__,
        "python": machine["versions"]["python"],
        "commit": machine["git"],
        "code": hash_of_code(),  # tells apart what is not committed
    }


def open_report(path: Path, here: dict) -> dict:
    """What an earlier call has left in a file, if it goes with what is `here`. Raises UserError.

    A report of something else keeps its figures under another name.
    """
    fresh = {"here": here, "parts": {}}
    if not path.exists():
        return fresh
    report = read_json(path)
    kinds = [type(report.get(key)) for key in fresh]
    if kinds != [dict, dict]:
        raise UserError(f"{path} is no report of this script: name another file with --out")
    changed = [name for name in here if report["here"].get(name) != here[name]]
    if not changed:
        return report
    now = datetime.datetime.now()
    old = path.with_name(f"{path.stem}-{now:%Y%m%d-%H%M%S}{path.suffix}")
    path.rename(old)
    print(f"{path} is of another {' and '.join(changed)}: all parts anew; it is now {old.name}")
    return fresh


# ------------------------------------------------------------------------------------------
# A part


def run_part(name: str, minutes: float, folder: Path, dry: bool) -> dict:
    """Run a part in a process group of its own, which does not outlive its minutes."""
    work = folder / name
    work.mkdir()
    figures, log = work / "figures.json", work / "log"
    command = [sys.executable, str(SCRIPT), name, str(figures), *["--dry"] * dry]
    began = time.monotonic()
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
            env=environment(dry),
        )
        try:
            status = process.wait(60 * minutes)
            error = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            error = f"killed: it took longer than its {minutes:g} minutes"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - began
    now = datetime.datetime.now()
    result = {"date": f"{now:%Y-%m-%d %H:%M}", "seconds": round(seconds, 1), "figures": {}}
    if error:
        lines = log.read_text(errors="replace").splitlines()
        result |= {"error": error, "log": lines[-30:]}
    result |= read_json(figures) if figures.exists() else {}
    shutil.rmtree(work)  # the next part needs the disk
    return result


def environment(dry: bool) -> dict[str, str]:
    """A part's environment: fragments of memory are joined, and a dry run sees no GPU."""
    changes = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if dry:
        changes = {"CUDA_VISIBLE_DEVICES": ""}
    return os.environ | changes


def table(name: str, result: dict) -> str:
    """A part's lines."""
    lines = [f"{name:10}{result['seconds']:7.0f} s  {result['date']}"]
    for key, value in result["figures"].items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        lines.append(f"{'':10}{key:44}{shown}")
    if "error" in result:
        lines += [f"{'':10}ERROR {result['error']}", *result.get("log", [])[-8:]]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------
# The command line


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    lines = []
    for name, (minutes, part) in PARTS.items():
        lines.append(f"  {name:10}{minutes:4g} minutes at most: {part.__doc__.splitlines()[0]}")
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["parts:", *lines]),
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="no part begins that may end later"
    )
    parser.add_argument("--only", choices=PARTS, metavar="PART", help="measure this part, anew")
    parser.add_argument("--out", default="gpu.json", help="the file of figures")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with a tiny model")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    began = time.monotonic()
    dry = options.dry
    if not (dry or torch.cuda.is_available()):
        raise UserError("there is no GPU here: --dry runs it with a tiny model on the CPU")
    if dry:
        print("a dry run with a tiny model on the CPU; no figure counts", flush=True)
    path = Path(options.out)
    report = open_report(path, describe(dry))
    write_json(path, report)  # whether it can be written must be known now
    done = report["parts"]
    print(", ".join(f"{name} {value}" for name, value in report["here"].items()))
    for name in done:
        print(table(name, done[name]))
    left = [name for name in PARTS if name not in done]
    if options.only:
        left = [options.only]
    most = max((PARTS[name][0] for name in left), default=0)
    if most > options.minutes:
        raise UserError(f"--minutes {options.minutes:g}: a part may take {most:g}, give as many")
    failed = []
    is_first = True  # it has its time in any case
    with tempfile.TemporaryDirectory() as folder:
        while left:
            minutes, _ = PARTS[left[0]]
            end = (time.monotonic() - began) / 60 + minutes
            if end > options.minutes and not is_first:
                break
            name = left.pop(0)
            done[name] = run_part(name, minutes, Path(folder), dry)
            is_first = False
            write_json(path, report)
            print(table(name, done[name]), flush=True)
            if "error" in done[name]:
                failed.append(name)
    if left:
        print(f"no time for {', '.join(left)}: the same command goes on with what is left")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; --only measures one of them anew")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the part must not go on alone
    run_cli(main)
