"""A run while it lives: its folder, its steps, its sums over ranks, its signals, its saving.

    with open_run("pretrain", settings, origin) as run:  # the lock, the ranks, the device
        run.enter(data)                   # run.json: a new run, or the same settings as before
        state = run.resume(trained)       # the newest good state, or {}
        for step in run.steps(total):     # from where the run stands; ends early after a signal
            ...
            run.add(loss=loss)            # sums of this rank, over micro-batches
            sums = run.all_sum()          # of all ranks
            run.log(tokens, skipped=False, **sums)
            if run.save_due():
                run.save()
            if run.evaluation_due():
                ...

A run is a folder with run.json (every setting and where it came from), metrics.jsonl, curves.png,
training states and hf/. All ranks call all methods; rank 0 writes.
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from infra.checkpoint import (
    Saver,
    Trained,
    export,
    list_states,
    load_state,
    newest_state,
    state_bytes,
    states_kept,
)
from infra.distributed import (
    all_gather_objects,
    all_sum,
    be_deterministic,
    exit_if_peer_lost,
    init_process,
    on_rank_zero,
    peak_flops,
    rank_and_world,
)
from infra.files import UserError, lock_file, read_json, write_json
from infra.metrics import MetricsFile, Progress, check_loggers, rows_of
from infra.settings import RunSettings
from infra.sharding import make_mesh

PATIENCE = 60  # seconds until a shared disk must have seen what another node has written
MOST_SKIPPED = 20  # so many skipped steps in a row end a run
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM))


@contextlib.contextmanager
def open_run(stage: str, settings: RunSettings, origin: dict[str, str]) -> Iterator["Run"]:
    """The run in the folder --out, of which this process group is the only writer.

    stage: as in `pretrain`, `dpo`. origin: where each setting came from. Raises UserError.
    """
    with run_lock(Path(settings.out)), exit_if_peer_lost():
        run = Run(stage, settings, origin)
        try:
            yield run
        finally:
            run.close()


class Run:
    """See the top of this file."""

    def __init__(self, stage: str, settings: RunSettings, origin: dict[str, str]):
        self.stage = stage
        self.settings = settings
        self.origin = origin
        self.folder = Path(settings.out)
        check_loggers(settings)
        if settings.deterministic:
            be_deterministic()
        self.device = init_process(settings.device, settings.threads, settings.timeout)
        self.mesh = make_mesh(settings.shard, self.device)
        self.rank, self.world = rank_and_world()
        self.step = 0  # steps done
        self.tokens = 0
        self.stop = False  # a signal has come to some rank, and all know it
        self.signals: list[int] = []  # that came to this rank
        self.old_handlers: dict[int, object] = {}
        self.under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.sums: dict[str, Tensor] = {}
        self.skipped_in_a_row = 0
        self.saved = False  # there is a state
        self.saved_step = 0  # steps that the newest one has
        self.name_batch: Callable[[int], str] = lambda step: ""  # for the error of skipped steps
        self.metrics: MetricsFile | None = None
        self.saver: Saver | None = None
        self.trained: Trained | None = None  # None: a stage that saves no states
        self.on_close: list[Callable[[], None]] = []  # what else this rank does at the end

    # ---- enter, resume

    def enter(self, data: dict, start: str | None = None) -> None:
        """Write run.json, or check that the run there has the same settings. Raises UserError.

        data: what is trained on; its "hash" must stay the same. start: a fingerprint of what is in
        --init.
        """
        on_rank_zero(create_or_resume_run, self.stage, self.settings, self.origin, data, start)
        if not all(all_gather_objects(appears(self.folder / "run.json"))):
            text = f"not all nodes see {self.folder}: --out must lie on a disk that they share"
            raise UserError(text, everywhere=True)

    def resume(self, trained: Trained) -> dict:
        """Load the newest good state into `trained`; returns its state.json, or {}."""
        self.trained = trained
        self.resumed_from = newest_state(self.folder)
        self.saved = self.resumed_from is not None
        state = load_state(self.resumed_from, trained) if self.saved else {}
        self.saved_by = state.get("world", 1) if state else self.world  # processes
        self.begin(state.get("step", 0), state.get("tokens", 0))
        self.saved_step = self.step
        lost = state.get("rows", 0) - self.metrics.n_before_state
        if lost > 0 and self.rank == 0:
            print(f"{self.folder}/metrics.jsonl has lost {lost:,} rows", file=sys.stderr)
        return state

    def title(self) -> str:
        """The run in one line: its folder, and where it goes on from."""
        if not self.resumed_from:
            return str(self.folder)
        title = f"{self.folder}, going on from {self.resumed_from.name}"
        if self.saved_by == self.world:
            return title
        return f"{title} of {self.saved_by} processes (from here, it is not bit-identical)"

    def begin(self, step: int, tokens: int = 0) -> None:
        """Open the records after `step` steps, and take signals as a wish to stop after a step."""
        self.step = step
        self.tokens = tokens
        c = self.settings
        last_step = step if step else -1
        self.metrics = MetricsFile(self.folder, self.rank, last_step, c)
        self.saver = Saver(self.folder, c.keep, c.async_save)
        for number in STOP_SIGNALS:
            self.old_handlers[number] = signal.signal(number, self.stop_soon)

    def stop_soon(self, number: int, _) -> None:
        """Note a signal. A second one ends the process at once.

        Not so under torchrun, which passes on what the terminal has already sent to all processes.
        """
        self.signals.append(number)
        if not self.under_torchrun:
            signal.signal(number, signal.SIG_DFL)
        if self.rank == 0:
            once_more = "" if self.under_torchrun else " (once more: ends at once)"
            text = f"{signal.Signals(number).name}: this step is finished and saved{once_more}\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())  # a print may be under way, and cannot begin another

    # ---- the loop

    def steps(self, total: int, flops_per_token: float = 0) -> Iterator[int]:
        """The steps that are to be done, from 0; ends early when a signal has stopped the run.

        The body must call `log` once. flops_per_token: for MFU.
        """
        self.total = total
        self.announce_states()
        peak = (peak_flops(self.device) or 0) * self.world
        self.progress = Progress(self.step, total, flops_per_token, peak)
        while self.step < total and not self.stop:
            step = self.step
            yield step
            assert self.step == step + 1, "a step was not logged"
            self.progress.resume_clock()

    def announce_states(self) -> None:
        """Say how much of the disk the states of this run will take, if that is much."""
        if not self.trained:
            return
        size = state_bytes(self.trained.tensors)
        c = self.settings
        kept = states_kept(self.total - self.step, c.save_every, c.keep)
        free = shutil.disk_usage(self.folder).free
        if kept * size < min(10**10, free / 2):
            return
        text = f"states    {kept:,} of {size / 1e9:,.1f} GB each will be kept"
        print(f"{text} in {self.folder}, where {free / 1e9:,.1f} GB are free", end="")
        print("; warning: they do not fit, see --keep" if kept * size > free else "")

    def add(self, **values: Tensor) -> None:
        """Add scalars to this rank's sums of the step."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def all_sum(self, divide_by: Tensor | float = 1) -> dict[str, float]:
        """The step's sums over all ranks, each rank's divided by `divide_by` before.

        With them goes what one rank knows and all must know at the same step: a signal has come
        (`stop` is set), or the last state could not be written (raises UserError).
        """
        values = [value / divide_by for value in self.sums.values()]
        news = (len(self.signals), self.saver.failed)
        values += torch.tensor(news, dtype=torch.float32, device=self.device)
        *sums, n_signals, failed = all_sum(torch.stack(values)).tolist()
        self.stop |= n_signals > 0
        if failed:
            self.saver.wait()
        named = dict(zip(self.sums, sums))
        self.sums = {}
        return named

    def log(self, tokens: float, *, skipped: bool, **values: float) -> None:
        """End a step: count it, record its metrics, print a line. Raises UserError."""
        self.step += 1
        self.tokens += int(tokens)
        self.record("step", **values, skipped=skipped, **self.progress.count_step(tokens))
        is_first = self.step == self.progress.first_step + 1  # says early how long it will take
        if self.due(self.settings.log_every) or skipped or is_first:
            mark = "  SKIPPED" if skipped else ""
            print(self.progress.line(self.step, values) + mark, flush=True)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == MOST_SKIPPED:
            self.give_up(values)

    def give_up(self, values: dict[str, float]) -> None:
        """Raise the UserError of a run whose steps are all skipped."""
        states = [state.name for state in list_states(self.folder)]
        raise UserError(
            f"{MOST_SKIPPED} steps in a row were skipped, up to step {self.step} "
            f"(loss {values['loss']}, grad_norm {values['grad_norm']}"
            f"{self.name_batch(self.step - 1)}): lower --lr, lengthen --warmup, or look at "
            f"the data; the newest state is {states[0] if states else 'none'}",
            everywhere=True,
        )

    def record(self, event: str, **values) -> None:
        """Write a row of metrics.jsonl."""
        self.metrics.write({"event": event, "step": self.step, "tokens": self.tokens, **values})

    def due(self, every: int) -> bool:
        """Is it time, after this step, for what is done every so many steps and after the last?"""
        return self.step % every == 0 or self.step == self.total

    def save_due(self) -> bool:
        """Is it time to save? Also after a signal, and before the first evaluation, if it fails."""
        first_evaluation = self.due(self.settings.eval_every) and not self.saved
        return self.due(self.settings.save_every) or self.stop or first_evaluation

    def evaluation_due(self) -> bool:
        """Is it time to evaluate? Not after a signal: a run is saved then, and ends."""
        return self.due(self.settings.eval_every) and not self.stop

    def evaluation_owed(self, total: int) -> bool:
        """Was an evaluation due after the step where the run stands, and has not been made?

        So it is at the beginning, and where a process ended between a step and its evaluation.
        """
        done = [row["step"] for row in rows_of(self.folder, "eval")]
        was_due = self.step % self.settings.eval_every == 0 or self.step == total
        return was_due and not all_gather_objects(self.step in done)[0]

    def save(self, **state) -> None:
        """Save a training state, with what else `state` holds, and renew hf/. Raises UserError."""
        self.metrics.sync()
        self.saved = True
        self.saved_step = self.step
        wait = self.stop or self.step == self.total
        counts = {"step": self.step, "tokens": self.tokens, "world": self.world}
        counts["rows"] = self.metrics.n_rows  # nothing else can tell that some are lost
        self.saver.save({**counts, **state}, self.trained, wait)

    def save_what_is_done(self) -> None:
        """Save the steps that are done, before an error that all ranks have met ends the run."""
        if self.trained and self.step > self.saved_step:
            self.stop = True  # wait for the end of the save
            self.save()
            print(f"saved at step {self.step}: the same command goes on from there", flush=True)

    # ---- the end

    def exit_if_stopped(self) -> None:
        """End the process, if a signal has stopped the run."""
        if not self.stop:
            return
        number = next(numbers[0] for numbers in all_gather_objects(self.signals) if numbers)
        if self.rank == 0:
            text = (
                f"stopped by {signal.Signals(number).name} at step {self.step}, saved; "
                "the same command goes on from there"
            )
            path = self.folder / "run.json"
            write_json(path, {**read_json(path), "stopped": text})
            print(text, file=sys.stderr)
        # torchrun takes any status but 0 for a failure, and would start all over.
        sys.exit(0 if self.under_torchrun else 128 + number)

    def renew_weights(self) -> None:
        """Make hf/ again from the newest state, if someone has removed its weights."""
        if not list((self.folder / "hf").glob("*.safetensors")):
            export(self.folder, newest_state(self.folder), self.trained)

    def close(self) -> None:
        """Close what is open; also after an error."""
        for work in self.on_close:
            work()
        if self.saver:
            self.saver.thread.shutdown()
        if self.metrics:
            self.metrics.close()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------
# The folder


def create_or_resume_run(
    stage: str, settings: RunSettings, origin: dict[str, str], data: dict, start: str | None
) -> None:
    """Make a run's folder and run.json, or check that a run there is the same one."""
    run = Path(settings.out)
    check_writable(run)
    if (run / "run.json").exists():
        for left in [*run.glob(".saving-step*"), run / ".saving-hf", run / ".old-hf"]:
            shutil.rmtree(left, ignore_errors=True)  # of a process that died in a save
    config = {}
    for name, value in as_json(settings).items():
        config[name] = {"value": value, "from": origin[name]}
    record = {"stage": stage, "config": config, "start": start, "data": data}
    if list_states(run) and not (run / "run.json").exists():
        raise UserError(
            f"{run} has training states, but its run.json is gone, and so are its settings: put it "
            "back, or choose another folder with --out"
        )
    if has_begun(run):
        check_same_run(run, record, settings)
    write_json(run / "run.json", record | describe_machine())


def has_begun(run: Path) -> bool:
    """Has the run in a folder done something that must go on with the same settings?"""
    metrics = run / "metrics.jsonl"
    has_rows = metrics.is_file() and metrics.stat().st_size > 0
    return (run / "run.json").exists() and (has_rows or bool(list_states(run)))


def as_json(settings: RunSettings) -> dict:
    """{setting: value} as they stand in run.json: tuples are lists."""
    return json.loads(json.dumps(asdict(settings)))


def check_writable(run: Path) -> None:
    """Make a run's folder. Raises UserError where it cannot be written."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {run}: {error.strerror}; choose another folder with --out"
        ) from None


def check_same_run(run: Path, record: dict, settings: RunSettings) -> None:
    """Raise UserError if the run there is of another stage or began with other settings.

    record: what is to stand in run.json now.
    """
    before = read_record(run)
    there = stage_of(before)
    if there != record["stage"]:
        raise UserError(
            f"{run} is a run of {there}, not of {record['stage']}: choose another folder with --out"
        )
    changed = []
    # A setting that did not exist yet when the run began: it did what the default does.
    defaults = as_json(type(settings)())
    for name, entry in record["config"].items():
        old = before["config"].get(name, {"value": defaults[name]})["value"]
        if name not in settings.MAY_CHANGE and old != entry["value"]:
            changed.append(f"{name} {old} -> {entry['value']}")
    if before["data"]["hash"] != record["data"]["hash"]:
        changed.append(f"data {name_of(before['data'])} -> {name_of(record['data'])}")
    if before.get("start") != record["start"]:
        changed.append(f"what is in {record['config']['init']['value']}, which has been made anew")
    if changed:
        raise UserError(
            f"{run} was started with other settings ({', '.join(changed)}): go on with the old "
            "ones, or choose another folder with --out"
        )


def name_of(data: dict) -> str:
    """What a run is trained on: its hash, and the first of its files."""
    files = data.get("files")
    first = f" ({files[0]})" if isinstance(files, list) and files else ""
    return f"{data['hash']}{first}"


def read_record(run: Path) -> dict:
    """The run.json of a run. Raises UserError for what is none: settings must not be guessed."""
    path = run / "run.json"
    record = read_json(path)
    config, data = record.get("config"), record.get("data")
    entries = config.values() if isinstance(config, dict) else [None]
    whole = all(isinstance(entry, dict) and "value" in entry for entry in entries)
    if not (whole and isinstance(data, dict) and "hash" in data):
        raise UserError(f"{path} is no run.json: expected the settings under config, and data")
    return record


def stage_of(record: dict) -> str:
    """The stage of a run.json; older ones have it elsewhere or not at all."""
    stage = record.get("stage") or record["data"].get("stage")
    return stage or ("anneal" if "ingredient" in record["config"] else "pretrain")


def settings_of_run(run: Path) -> dict:
    """{setting: value} of a run's run.json, lists as the tuples that they were."""
    settings = {}
    for name, entry in read_record(run)["config"].items():
        value = entry["value"]
        if name == "compile" and isinstance(value, bool):  # it could not be auto once
            value = "yes" if value else "no"
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def describe_machine() -> dict:
    """What a run's numbers may depend on: command, code, versions, hardware."""
    git = None
    if shutil.which("git"):
        here = Path(__file__).parent
        command = ["git", "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, cwd=here)
        git = answer.stdout.strip() or None
    hardware = {
        "processes": rank_and_world()[1],
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"command": sys.argv, "git": git, "versions": versions, "hardware": hardware}


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Refuse a run that a living process writes to, on rank 0. Raises UserError.

    Workers, for one, outlive a torchrun that was killed by SIGKILL.
    """
    if int(os.environ.get("RANK", 0)):
        yield
        return
    with contextlib.suppress(OSError):  # `check_writable` will say it
        run.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            if run.is_dir():
                take_lock(stack, run)
            yield
    finally:
        with contextlib.suppress(OSError):  # remove the folder, if it is still empty
            run.rmdir()


def appears(path: Path) -> bool:
    """Is a file there, that another node has just made? A shared disk may take a while to see it.

    One that has looked before remembers for a time that nothing was there.
    """
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes it look again
    return True


def take_lock(stack: contextlib.ExitStack, run: Path) -> None:
    """Lock a run's folder until the stack is left. Raises UserError."""
    try:
        if not stack.enter_context(lock_file(run / ".lock")):
            print(f"{run} lies on a disk without locks: two runs in it would not be noticed")
    except BlockingIOError:
        script = Path(sys.argv[0]).name
        raise UserError(
            f"another process is writing to {run}: wait for it, stop it (pgrep -f {script}), "
            "or choose another --out"
        ) from None
    except OSError:  # `check_writable` will say it
        pass
