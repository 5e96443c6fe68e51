"""Runs side by side: one figure of their curves, and a table of what differs in their settings.

    python compare.py runs/tiny/pretrain runs/mine                  # draws compare.png
    python compare.py runs/ablation-* --out figures/ablations.png

Runs of any stage: each is a folder with metrics.jsonl and run.json. The figure has a panel for each
metric of their steps (loss, z-loss, rate, gradient norm, ...), smoothed, and one for each held-out
measure. The x axis is tokens where all runs count them, else steps.
"""

import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import tyro

from anneal import print_columns, show
from infra.distributed import run_cli
from infra.files import UserError
from infra.metrics import (
    NOT_METRICS,
    Curve,
    Panel,
    measured,
    plot_curves,
    rows_of,
    smooth,
    token_unit,
)
from infra.run import settings_of_run
from pretrain import SHAPE_FLAGS

# Settings that say where a run lies and how it is watched, not what is learnt.
NOT_SHOWN = {"out", "wandb", "tensorboard", "log_every", "save_every", "keep", "eval_every"}


@dataclass(frozen=True)
class Config:
    # folders of runs, two or more
    runs: tyro.conf.Positional[tuple[str, ...]]
    # the figure
    out: Path = Path("compare.png")


def differing_settings(runs: list[str]) -> list[tuple[str, ...]]:
    """Rows of a table: the setting, and its value in each run, of all settings that differ."""
    settings = [settings_of_run(Path(run)) for run in runs]
    names = dict.fromkeys(chain.from_iterable(settings))
    rows = []
    for name in names:
        values = tuple(show_setting(name, one.get(name)) for one in settings)
        if len(set(values)) > 1 and name not in NOT_SHOWN:
            rows.append((name, *values))
    return rows


def show_setting(name: str, value) -> str:
    """A setting's value, for people; a dash where it says nothing."""
    says_nothing = value in (None, "", ()) or (name in SHAPE_FLAGS and value == 0)
    return "-" if says_nothing else show(value)


@dataclass(frozen=True)
class Axis:
    """What the curves are drawn against: tokens, or steps where a run does not count tokens."""

    by_tokens: bool
    unit: float
    label: str

    def place(self, row: dict) -> float:
        """Where a row stands."""
        return row["tokens"] / self.unit if self.by_tokens else row["step"]


def find_axis(steps: dict[str, list[dict]]) -> Axis:
    """The axis for the rows of all runs."""
    lasts = [rows[-1].get("tokens", 0) for rows in steps.values()]
    if min(lasts) <= 0:
        return Axis(False, 1, "step")
    return Axis(True, *token_unit(lasts))


def make_panels(steps: dict[str, list[dict]], axis: Axis) -> list[Panel]:
    """Panels: each metric of the steps, then each held-out measure; in each a curve per run."""
    measures: dict[str, dict[str, Curve]] = {}  # title of the panel -> run -> its curve
    for run, rows in steps.items():
        x = [axis.place(row) for row in rows]
        for name in rows[0]:
            if name not in NOT_METRICS:
                values = [math.nan if row.get(name) is None else row[name] for row in rows]
                # The rate is exact as it is; all else has noise.
                y = values if name == "lr" else smooth(values)
                measures.setdefault(name, {})[run] = Curve(x, y, run)
    for run in steps:
        evals = [row for row in rows_of(Path(run), "eval") if measured(row)]
        x = [axis.place(row) for row in evals]
        for name in measured(evals[-1]) if evals else ():
            values = [measured(row).get(name, math.nan) for row in evals]
            curve = Curve(x, values, run, {"marker": "."})
            measures.setdefault(f"held-out {name}", {})[run] = curve
    axes = {"xlabel": axis.label}
    return [Panel(title, list(curves.values()), axes) for title, curves in measures.items()]


def main(arguments: list[str] | None = None) -> None:
    c = tyro.cli(Config, description=__doc__, args=arguments)
    steps = {run: rows_of(Path(run), "step") for run in c.runs}
    for run in [run for run, rows in steps.items() if not rows]:
        print(f"left out, as it has no steps: {run}")
        del steps[run]
    if len(steps) < 2:
        raise UserError("two runs or more can be compared, each a folder with run.json and steps")
    different = differing_settings(list(steps))
    print_columns([("setting", *steps), *different] if different else [("no setting differs",)])
    c.out.parent.mkdir(parents=True, exist_ok=True)
    plot_curves(c.out, make_panels(steps, find_axis(steps)), columns=3, size=(4.2, 3))
    print(f"drawn in {c.out}")


if __name__ == "__main__":
    run_cli(main)
