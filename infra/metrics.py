"""What a run records and shows: rows of metrics.jsonl, one line per log step, curves.

A row is one flat JSON object: event (step, eval, sample, questions), step, tokens, and the event's
values. A number that is not finite is written as null.
"""

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infra.files import check_library, write_text
from infra.settings import RunSettings

# ------------------------------------------------------------------------------------------
# Rows


def read_metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl.

    A last line that a crash has cut short is left out. So are other lines that are no rows, as
    after a power cut, and how many they are is printed: a run must not stand still for them.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = [row for row in map(parse_row, lines) if row]
    if len(rows) < len(lines):
        text = f"{len(lines) - len(rows):,} lines of {path} are no rows, and are left out"
        print(text, file=sys.stderr)
    return rows


def parse_row(line: bytes) -> dict | None:
    """A line of metrics.jsonl; None if it is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("event"), str)
    return row if is_row and type(row.get("step")) is int else None


def rows_of(run: Path, event: str) -> list[dict]:
    """The rows of one event."""
    return [row for row in read_metrics(run) if row["event"] == event]


class MetricsFile:
    """Appends rows to metrics.jsonl, on rank 0, and to those who draw them while a run goes on.

    They are Weights & Biases (--wandb) and TensorBoard (--tensorboard).
    """

    def __init__(self, run: Path, rank: int, last_step: int, settings: RunSettings):
        """Keep only rows up to `last_step`: a resumed run repeats the steps after its state."""
        self.wandb = None
        self.tensorboard = None
        self.n_rows = 0
        self.n_before_state = 0
        if rank == 0:
            kept = [row for row in read_metrics(run) if row["step"] <= last_step]
            write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
            self.n_rows = len(kept)
            # The evaluation after a step comes after the state of that step.
            before = [row["step"] < last_step or row["event"] == "step" for row in kept]
            self.n_before_state = sum(before)
            self.wandb = start_wandb(run, settings)
            self.tensorboard = start_tensorboard(run, settings, last_step)
        path = run / "metrics.jsonl" if rank == 0 else os.devnull
        self.file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, row: dict) -> None:
        plain = {name: None if is_not_finite(value) else value for name, value in row.items()}
        self.file.write(json.dumps(plain) + "\n")
        self.n_rows += 1
        numbers = flat_numbers(row)
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(f"{row['event']}/{name}", value, row["step"])

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        self.file.flush()
        if self.file.name != os.devnull:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def is_not_finite(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def flat_numbers(row: dict) -> dict[str, float]:
    """The numbers of a row, also those of its columns.

    >>> flat_numbers({"event": "eval", "step": 8, "bpb": {"docs": 2.5}})
    {'step': 8, 'bpb/docs': 2.5}
    """
    numbers = {}
    for name, value in row.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{key}": number for key, number in flat_numbers(value).items()}
        elif isinstance(value, (int, float)):
            numbers[name] = value
    return numbers


def check_loggers(settings: RunSettings) -> None:
    """Raise UserError for a library that is asked for and is not here, before all work."""
    if settings.wandb:
        check_library("wandb", "--wandb")
    if settings.tensorboard:
        check_library("tensorboard", "--tensorboard")


def start_wandb(run: Path, settings: RunSettings):
    """A run at Weights & Biases, or None without a project."""
    if not settings.wandb:
        return None
    import wandb

    name = str(run)
    return wandb.init(
        project=settings.wandb,
        name=name,
        config=asdict(settings),
        resume="allow",
        id=name.replace("/", "-"),
    )


def start_tensorboard(run: Path, settings: RunSettings, last_step: int):
    """A writer of TensorBoard's files, or None; what it has of later steps is not shown."""
    if not settings.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=last_step + 1)


# ------------------------------------------------------------------------------------------
# Progress on the terminal


class Progress:
    """The clock of a loop: time per step without evaluations and saves, speed, time left."""

    def __init__(self, first_step: int, total: int, flops_per_token: float, peak: float):
        """peak: FLOP/s of all accelerators together; 0 where it is not known, as on a CPU."""
        self.first_step = first_step
        self.total = total
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.seconds = 0.0
        self.tokens = 0.0
        self.resume_clock()

    def resume_clock(self) -> None:
        """Begin to measure the next step."""
        self.then = time.perf_counter()

    def count_step(self, tokens: float) -> dict[str, float | None]:
        """What the clock says of the step that ends now."""
        seconds = time.perf_counter() - self.then
        self.seconds += seconds
        self.tokens += tokens
        speed = tokens / seconds
        row = {"tokens_per_s": round(speed, 1), "seconds": round(self.seconds, 3)}
        return row | {"mfu": self.mfu(speed)} if self.flops_per_token else row

    def mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOPs utilisation: useful FLOP/s over the peak; None if the peak is not known."""
        return tokens_per_s * self.flops_per_token / self.peak if self.peak else None

    def line(self, step: int, values: dict[str, float]) -> str:
        """One line: step, values, tokens/s and MFU since the start, time left."""
        speed = self.tokens / self.seconds
        left = (self.total - step) * self.seconds / (step - self.first_step)
        words = [f"step {step:>{len(str(self.total))}}/{self.total}"]
        words += [show(name, value) for name, value in values.items() if name != "z_loss"]
        if self.tokens:
            words.append(f"{speed / 1000:7.1f}k tok/s")
        if self.flops_per_token:
            mfu = self.mfu(speed)
            words.append("MFU n/a" if mfu is None else f"MFU {100 * mfu:.1f}%")
        return "  ".join([*words, f"{datetime.timedelta(seconds=int(left))} left"])


# How metrics stand on the terminal; those without a line here: three digits.
FORMATS = {"loss": "loss {:7.4f}", "lr": "lr {:.2e}", "grad_norm": "grad {:7.3f}"}


def show(name: str, value: float) -> str:
    """A metric on the terminal.

    >>> show("lr", 0.0004), show("kl", 0.01234)
    ('lr 4.00e-04', 'kl 0.0123')
    """
    return FORMATS.get(name, name + " {:#.3g}").format(value)


# ------------------------------------------------------------------------------------------
# Curves


@dataclass(frozen=True)
class Curve:
    """Points to join; or bars, where the style has a width."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    style: dict = field(default_factory=dict)  # keywords of matplotlib's plot or bar


@dataclass(frozen=True)
class Panel:
    """A plot with its axes."""

    title: str
    curves: list[Curve]
    axes: dict = field(default_factory=dict)  # keywords of matplotlib's Axes.set
    marks: Sequence[float] = ()  # vertical lines


def token_unit(tokens: Iterable[float]) -> tuple[float, str]:
    """(unit, label) of an axis that shows tokens."""
    return (1e9, "tokens (billion)") if max(tokens) > 2e9 else (1e6, "tokens (million)")


def plot_curves(
    path: Path,
    panels: list[Panel],
    columns: int = 4,
    title: str = "",
    size: tuple[float, float] = (3.2, 2.6),
) -> None:
    """Draw panels, each of `size` inches, into a PNG file, atomically."""
    if not panels:
        return
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    for place, panel in enumerate(panels, 1):
        draw(figure.add_subplot(rows, columns, place), panel)
    figure.suptitle(title)
    tmp = path.with_name(path.name + ".tmp")
    figure.savefig(tmp, format="png", dpi=110)
    os.replace(tmp, path)


def draw(axis, panel: Panel) -> None:
    """Draw one panel."""
    for curve in panel.curves:
        kind = axis.bar if "width" in curve.style else axis.plot
        kind(curve.x, curve.y, label=curve.label, **curve.style)
    for position in panel.marks:
        axis.axvline(position, color="black", linewidth=0.6, alpha=0.5)
    axis.set(title=panel.title, **panel.axes)
    axis.grid(alpha=0.3)
    if any(curve.label for curve in panel.curves):
        axis.legend(fontsize=8)


# Not drawn: what a row is about, and its times.
NOT_METRICS = {"event", "step", "tokens", "skipped", "tokens_per_s", "seconds", "mfu"}


def plot_run(run: Path) -> None:
    """Draw curves.png: each metric of a run's steps, then what was measured on held-out data."""
    steps = rows_of(run, "step")
    if not steps:
        return
    x = [row["step"] for row in steps]
    skipped = [row["step"] for row in steps if row.get("skipped")]
    panels = []
    for name in steps[0]:
        if name not in NOT_METRICS:
            values = [math.nan if row.get(name) is None else row[name] for row in steps]
            is_norm = name == "grad_norm" and max(values) > 0
            axes = {"yscale": "log"} if is_norm else {}
            curves = [Curve(x, values, style={"linewidth": 0.8, "alpha": 0.3})]
            curves.append(Curve(x, smooth(values)))
            panels.append(Panel(name, curves, axes, skipped))
    evals = rows_of(run, "eval")
    x = [row["step"] for row in evals]
    for name in measured(evals[-1]) if evals else ():
        values = [measured(row).get(name, math.nan) for row in evals]
        panels.append(Panel(f"held-out {name}", [Curve(x, values, style={"marker": "."})]))
    plot_curves(run / "curves.png", panels, title=f"{run}, by step")


def measured(row: dict) -> dict[str, float]:
    """What a row of event `eval` has measured: bits per byte by source, or columns."""
    return row.get("bpb") or row.get("held_out") or {}


def smooth(values: list[float], weight: float = 0.05) -> list[float]:
    """A running average; what is not a number does not enter it.

    >>> smooth([1.0, 2.0, math.nan], weight=0.5)
    [1.0, 1.5, 1.5]
    """
    average = next(filter(math.isfinite, values), math.nan)
    averages = []
    for value in values:
        if math.isfinite(value):
            average += weight * (value - average)
        averages.append(average)
    return averages
