"""Weights and training states on the disk: safetensors, whole or in shards, never a pickle.

A training state is a folder, step<N>-tokens<T>, of

    model/, optim/    the tensors, each rank's shards in files of its own
    state.json        step, tokens, and what else a run needs to go on
    manifest.json     size and sha256 of every other file
    config.json and the tokenizer's files, so that it opens as a model

It is written under a temporary name. The rename at the end commits it, so a crash at any moment
leaves the states before it untouched. `newest_state` believes a state only after it has compared
all its files with the manifest.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from infra.distributed import (
    all_gather_objects,
    make_patient_group,
    on_rank_zero,
    rank_and_world,
    run_on_all_ranks,
)
from infra.files import (
    UserError,
    join_problems,
    make_folder,
    read_json,
    replace_folder,
    sha256,
    sync,
    write_json,
)
from infra.hub import fetch_model, fetch_small_files, files_of_index, is_hub_name

Tensors = dict[str, Tensor]

# ------------------------------------------------------------------------------------------
# Weights: a folder of safetensors files, as the Hub has them


def find_weights(path: str | Path) -> tuple[Path, Path]:
    """(folder of config.json, folder of the weights) of a model.

    path: a run, a checkpoint, a Hugging Face directory, or a name on the Hub, whose files are
    downloaded if they are not in the cache. Raises UserError.
    """
    if is_hub_name(str(path)):
        path = fetch_model(str(path))
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: train a model first (python pretrain.py), or name a run, "
            "a checkpoint of one, a Hugging Face directory, or a model on the Hub (owner/name)"
        )
    for folder in (path, path / "hf", *list_states(path)):
        if (folder / "config.json").exists():
            in_shards = folder / "model"
            return folder, in_shards if in_shards.is_dir() else folder
    hint = ""
    if (path / "config.yaml").exists():
        hint = f"; if it is a published training state: python released.py {path}"
    raise UserError(f"{path} holds no model: expected config.json in it, or hf/ as in a run{hint}")


def find_config(path: str | Path) -> Path:
    """The folder of a model's config.json; of a model on the Hub without its weights."""
    return fetch_small_files(str(path)) if is_hub_name(str(path)) else find_weights(path)[0]


def write_weights(
    path: Path,
    tensors: Tensors,
    shard_bytes: int = 5 * 10**9,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write weights as safetensors: one file or, beyond `shard_bytes`, several with an index.

    With `read`, each value comes from read(name), one tensor at a time, and `tensors` gives shapes
    and dtypes only. The ranks share the files. So no process ever holds a model that is larger than
    its memory.
    """
    rank, world = rank_and_world()
    path.mkdir(parents=True, exist_ok=True)
    files = assign_to_files(tensors, shard_bytes)
    for file, names in list(files.items())[rank::world]:
        tmp = path / f"{file}.tmp"
        write_safetensors(tmp, {name: tensors[name] for name in names}, read or tensors.get)
        os.replace(tmp, path / file)
    if rank == 0:
        write_index(path, tensors, files)


def assign_to_files(tensors: Tensors, shard_bytes: int) -> dict[str, list[str]]:
    """{file name: names of its tensors}, in order, each file of at most `shard_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    last = len(shards)
    return {f"model-{i:05d}-of-{last:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def write_index(path: Path, tensors: Tensors, files: dict[str, list[str]]) -> None:
    """Write the index of several files, and remove files that an earlier save has left."""
    index = path / "model.safetensors.index.json"
    if len(files) > 1:
        weight_map = {}
        for file, names in files.items():
            weight_map |= dict.fromkeys(names, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
    for stale in path.glob("model*.safetensors"):
        if stale.name not in files:
            stale.unlink()


def write_safetensors(path: Path, tensors: Tensors, read: Callable[[str], Tensor]) -> None:
    """Write one safetensors file: length of the header, header, values.

    The library's own writer would need all tensors in memory at once.
    """
    codes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            # As one expression: a name would hold the tensor while the next one is read.
            file.write(read(name).cpu().contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


class StoredWeights:
    """The tensors in a folder of safetensors files, whole or in shards, read one at a time.

    shapes: name -> tensor without values (on meta). Raises UserError for damaged files.
    """

    def __init__(self, folder: Path):
        from safetensors import safe_open

        stored = read_headers(folder)
        self.shapes: Tensors = {}
        self.places: dict[str, list[tuple[tuple[int, ...], str]]] = {}
        for name, entry in stored.state_dict_metadata.items():
            self.shapes[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            self.places[name] = []
        for index, info in stored.storage_data.items():
            self.places[index.fqn].append((tuple(index.offset), info.relative_path))
        dtypes = [tensor.dtype for tensor in self.shapes.values()]
        self.dtype = dtypes[0] if dtypes else torch.float32
        # Maps the file: what is read takes no memory of this process.
        self.open = functools.cache(functools.partial(safe_open, framework="pt"))

    def pieces(self, name: str) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """(where it belongs in the whole, values), first rows first, some 4M values at a time."""
        for (start, *others), path in sorted(self.places[name]):
            part = self.open(path).get_tensor(name)
            n_rows = 2**22 * len(part) // max(1, part.numel())  # a rank's piece may be empty
            columns = [slice(o, o + n) for o, n in zip(others, part.shape[1:])]
            for rows in part.split(max(1, n_rows)):
                end = start + len(rows)
                yield (slice(start, end), *columns), rows
                start = end

    def whole(self, name: str) -> Tensor:
        """One tensor, put together from its pieces."""
        tensor = torch.empty_like(self.shapes[name], device="cpu")
        for where, part in self.pieces(name):
            tensor[where] = part
        return tensor


def load_tensors(folder: Path, tensors: Tensors, leave_out: tuple[str, ...] = ()) -> None:
    """Fill `tensors` in place from the safetensors files in `folder`, converting the dtype.

    leave_out: names in the files that are not wanted. Raises UserError as `check_tensors` does:
    torch's reader slices and reshards, but checks little.
    """
    on_rank_zero(check_tensors, folder, tensors, leave_out)
    try:
        with one_process_is_fine():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.api.CheckpointException as error:
        raise UserError(f"the weights in {folder} cannot be read: {last_line(error)}") from None


@contextlib.contextmanager
def one_process_is_fine() -> Iterator[None]:
    """Silence torch's warning that a single process reads or writes: ours often does."""
    with warnings.catch_warnings():
        text = "torch.distributed is disabled, unavailable or uninitialized"
        warnings.filterwarnings("ignore", text)
        yield


def read_headers(folder: Path):
    """What the safetensors files in `folder` hold (torch's `Metadata`). Raises UserError."""
    try:
        return dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
    except Exception as error:  # safetensors has one type of exception for every kind of damage
        raise UserError(f"a weights file in {folder} is damaged: {error}") from None


def last_line(error: BaseException) -> str:
    """The last line of an error's text: the cause, where torch wraps it."""
    return str(error).strip().splitlines()[-1]


def check_tensors(folder: Path, tensors: Tensors, leave_out: tuple[str, ...] = ()) -> None:
    """Raise UserError unless the files in `folder` hold exactly `tensors`; it names the faults."""
    check_files(folder)
    stored = read_headers(folder).state_dict_metadata
    problems = [f"{name} is missing" for name in tensors if name not in stored]
    unknown = stored.keys() - tensors.keys() - set(leave_out)
    problems += [f"{name} is not in this model" for name in stored if name in unknown]
    for name, tensor in tensors.items():
        if name not in stored:
            continue
        size = stored[name].size
        dtype = stored[name].properties.dtype
        if size != tensor.shape:
            problems.append(f"{name} is {list(size)}, not {list(tensor.shape)}")
        elif not dtype.is_floating_point:
            problems.append(f"{name} holds {dtype}, no weights")
        elif sum(math.prod(chunk.sizes) for chunk in stored[name].chunks) != tensor.numel():
            problems.append(f"{name} has pieces missing")
    if problems:
        raise UserError(f"the weights in {folder} do not fit: {join_problems(problems)}")


def check_files(folder: Path) -> None:
    """Raise UserError unless a folder holds the safetensors files that its index names."""
    files = {path.name for path in folder.glob("*.safetensors")}
    if not files:
        raise UserError(f"{folder} holds no .safetensors file")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    expected = files_of_index(index)
    if missing := sorted(expected - files):
        raise UserError(f"{folder} lacks {', '.join(missing)}, named by its index")
    if extra := sorted(files - expected):
        raise UserError(
            f"{folder} holds {', '.join(extra)} beside the files of its index: which weights are "
            "meant? remove one set"
        )


# ------------------------------------------------------------------------------------------
# Training states


@dataclass(frozen=True)
class Trained:
    """What a run saves and loads."""

    tensors: dict[str, Tensors]  # "model", "optim" and so on -> name -> this rank's shard
    config: dict  # what stands in config.json: a state of another model is refused
    describe: Callable[[Path], None]  # writes config.json and the tokenizer's files into a folder


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
    """model: name -> weight. optim: Adam's moments and step of each weight, as <kind>.<name>."""
    weights, moments = {}, {}
    for name, parameter in model.named_parameters():
        weights[name] = parameter.detach()
        for kind, value in optimizer.state[parameter].items():
            moments[f"{kind}.{name}"] = value
    return {"model": weights, "optim": moments}


def state_bytes(parts: dict[str, Tensors]) -> int:
    """Bytes of a training state of these tensors, the shards of all ranks together, without hf/."""
    total = 0
    for tensors in parts.values():
        total += sum(tensor.nbytes for tensor in tensors.values())
    return total


def states_kept(steps: int, save_every: int, keep: int) -> int:
    """How many states so many steps leave; keep: of the newest, 0 for all.

    >>> states_kept(2500, 1000, 0), states_kept(2500, 1000, 1)
    (3, 1)
    """
    saved = math.ceil(steps / save_every)
    return min(saved, keep or saved)


def count_name(tokens: int) -> str:
    """Tokens in the name of a state: rounded up, with a unit.

    >>> count_name(2_621_440), count_name(4_000_022_593_536), count_name(2048)
    ('3M', '4001B', '3K')
    """
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if tokens >= size:
            return f"{-(-tokens // size)}{unit}"
    return f"{-(-tokens // 1000)}K"


def list_states(run: Path) -> list[Path]:
    """The committed training states of a run, newest first; copies by other names are none."""
    steps = {}
    for path in run.glob("step*-tokens*"):
        name = re.fullmatch(r"step(\d+)-tokens\d+[KMB]", path.name)
        if name and path.is_dir():
            steps[path] = int(name[1])
    return sorted(steps, key=steps.get, reverse=True)


def save_state(run: Path, state: dict, trained: Trained, keep: int = 0, group=None) -> Path:
    """Write run/step<N>-tokens<T> atomically, whichever process dies when; then renew run/hf.

    All ranks call it. state: {"step", "tokens", …} for state.json. keep: newest states to keep, 0
    for all. group: a connection of its own, so that a thread can do this while training goes on.
    Raises UserError.
    """
    final = run / f"step{state['step']}-tokens{count_name(state['tokens'])}"
    tmp = run / f".saving-{final.name}"
    try:
        write_state(tmp, state, trained, group)
        on_rank_zero(commit_state, tmp, final, group=group)
    except (UserError, dcp.api.CheckpointException) as error:  # torch's wrapper is no Exception
        on_rank_zero(shutil.rmtree, tmp, True, group=group)
        raise UserError(
            f"could not save {final}: {last_line(error)}. The states before it are untouched; "
            "make room, and the same command goes on from the newest",
            everywhere=True,
        ) from None
    try:
        export(run, final, trained, group)
    except UserError as error:
        raise UserError(
            f"could not write {run / 'hf'}: {error}. The training state {final.name} is safe",
            everywhere=True,
        ) from None
    if keep:
        on_rank_zero(remove_states, list_states(run)[keep:], group=group)
    return final


def write_state(tmp: Path, state: dict, trained: Trained, group=None) -> None:
    """Write all files of a state into `tmp`; each rank writes its shards."""
    on_rank_zero(make_folder, tmp, group=group)
    for part, tensors in trained.tensors.items():
        # Given anything but tensors, torch's writer would quietly make a pickle of it.
        writer = dcp.HuggingFaceStorageWriter(str(tmp / part), save_distributed=True)
        with one_process_is_fine():
            dcp.save(tensors, storage_writer=writer, process_group=group)
        on_rank_zero(check_tensors, tmp / part, tensors, group=group)  # reads what was written
    on_rank_zero(trained.describe, tmp, group=group)
    on_rank_zero(write_json, tmp / "state.json", state, group=group)
    write_manifest(tmp, group)


def write_manifest(folder: Path, group=None) -> None:
    """Write manifest.json: {file: {bytes, sha256}} of a folder's files, which the ranks share."""
    hashes = run_on_all_ranks(hash_files, folder, group=group)
    manifest = dict(ChainMap(*all_gather_objects(hashes, group)))
    on_rank_zero(write_json, folder / "manifest.json", manifest, group=group)


def hash_files(folder: Path) -> dict[str, dict]:
    """{file: {bytes, sha256}} of this rank's share of the files, once they are on the disk."""
    rank, world = rank_and_world()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for path in files[rank::world]:
        sync(path)
        entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        entries[str(path.relative_to(folder))] = entry
    return entries


def commit_state(tmp: Path, final: Path) -> None:
    """Give a complete state its name. Until the rename, the state does not exist."""
    sync(tmp / "manifest.json")
    for folder in (*(path for path in tmp.iterdir() if path.is_dir()), tmp):
        sync(folder)
    if final.exists():  # a damaged state of the same step, which was not resumed from
        shutil.rmtree(final)
    tmp.rename(final)
    sync(final.parent)


def remove_states(states: list[Path]) -> None:
    for state in states:
        shutil.rmtree(state)


def export(run: Path, state: Path, trained: Trained, group=None) -> None:
    """Make run/hf from a state's files; a reader finds the old folder or the new one."""
    tmp = run / ".saving-hf"
    stored = state / "model"
    on_rank_zero(make_folder, tmp, group=group)
    run_on_all_ranks(export_weights, tmp, trained.tensors["model"], stored, group=group)
    on_rank_zero(trained.describe, tmp, group=group)
    write_manifest(tmp, group)
    on_rank_zero(replace_folder, tmp, run / "hf", group=group)


def export_weights(path: Path, tensors: Tensors, stored: Path) -> None:
    """Write the weights of a state as a Hugging Face directory has them."""
    open_once = functools.cache(StoredWeights)  # a rank without a file need not read all headers

    def read(name: str) -> Tensor:
        return open_once(stored).whole(name)

    write_weights(path, tensors, read=read)


class Saver:
    """Saves training states, at once or in a thread while training goes on."""

    def __init__(self, run: Path, keep: int, in_background: bool):
        self.run = run
        self.keep = keep
        self.in_background = in_background
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.group = None
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            # A connection of the thread's own, whose messages do not mix with those of the loop;
            # and one with patience, as a state of a large model takes a slow disk many minutes.
            self.group = make_patient_group()
        if not in_background:
            return
        # The cache is pinned memory.
        self.stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())

    def save(self, state: dict, trained: Trained, wait: bool) -> None:
        """Raises UserError: of this state, or of the one before, which is waited for."""
        self.wait()
        if self.in_background:  # a copy in CPU memory: training goes on with the original
            trained = Trained(self.stager.stage(trained.tensors), trained.config, trained.describe)
        arguments = (self.run, state, trained, self.keep, self.group)
        self.pending = self.thread.submit(save_state, *arguments)
        if wait or not self.in_background:
            self.wait()

    @property
    def failed(self) -> bool:
        """Has the save in the background failed?"""
        return bool(self.pending and self.pending.done() and self.pending.exception())

    def wait(self) -> None:
        pending = self.pending
        self.pending = None
        if pending:
            pending.result()


def verify_state(folder: Path) -> str | None:
    """What is wrong with a training state, or None. Each rank reads its share of the files."""
    return next(filter(None, all_gather_objects(find_damage(folder))), None)


def find_damage(folder: Path) -> str | None:
    """What this rank's share of a state's files says against the manifest, or None."""
    rank, world = rank_and_world()
    try:
        manifest = read_json(folder / "manifest.json")
        files = (path for path in folder.rglob("*") if path.is_file())
        present = {str(path.relative_to(folder)) for path in files} - {"manifest.json"}
        for name in sorted(manifest.keys() | present)[rank::world]:
            if name not in present:
                return f"{name} is missing"
            if name not in manifest:
                return f"{name} is not in the manifest"
            if differs(folder / name, manifest[name]):
                return f"{name} has changed since it was written"
    except (UserError, OSError, TypeError, KeyError, AttributeError) as error:
        return f"the manifest cannot be used: {error}"
    return None


def differs(path: Path, entry: dict) -> bool:
    """Has a file another size, or other contents, than its entry in the manifest?"""
    return path.stat().st_size != entry.get("bytes") or sha256(path) != entry.get("sha256")


def check_unchanged(folder: Path, weights: Path) -> None:
    """Raise UserError if weights or vocabulary differ from the manifest beside them.

    So every stage that starts from an hf/ of ours knows that no bit of it has flipped. folder,
    weights: as from `find_weights`; without a manifest, as in a download, there is nothing to
    compare. Each rank reads its share of the files.
    """
    if not (folder / "manifest.json").exists():
        return
    rank, world = rank_and_world()
    manifest = read_json(folder / "manifest.json")
    files = [*sorted(weights.glob("*.safetensors")), folder / "tokenizer.json"]
    for path in files[rank::world]:
        entry = manifest.get(str(path.relative_to(folder)))
        if isinstance(entry, dict) and differs(path, entry):
            raise UserError(
                f"{path} has changed since it was written, as {folder}/manifest.json says: name "
                "another model or state, or remove the manifest if it was you who changed it"
            )


def read_steadily(folder: Path, read: Callable):
    """read(), once more if a living run has replaced the folder meanwhile, as it does with its hf/.

    Else it might have put together what belongs to two folders. It gives up after half a minute.
    """
    deadline = time.monotonic() + 30
    while True:
        before = identity(folder)
        try:
            value = read()
        except (UserError, OSError):
            if identity(folder) == before or time.monotonic() > deadline:
                raise
            continue
        if identity(folder) == before or time.monotonic() > deadline:
            return value


def identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that takes its place; None if there is none."""
    try:
        stat = folder.stat()
        return stat.st_ino, stat.st_mtime_ns
    except OSError:
        return None


def newest_state(run: Path) -> Path | None:
    """The newest state that verifies; each damaged one before it is named on standard error."""
    rank, _ = rank_and_world()
    for folder in all_gather_objects(list_states(run))[0]:
        damage = verify_state(folder)
        if not damage:
            return folder
        if rank == 0:
            print(f"{folder} is damaged ({damage}): trying the one before", file=sys.stderr)
    return None


def load_state(folder: Path, trained: Trained) -> dict:
    """Fill the tensors from a verified training state; returns its state.json.

    Raises UserError for a state of a model of another shape.
    """
    stored = read_json(folder / "config.json")
    expected = trained.config
    different = [
        f"{key} {stored.get(key)}, not {expected.get(key)}"
        for key in expected | stored  # an ablation has keys that others lack
        if stored.get(key) != expected.get(key)
    ]
    if different:
        raise UserError(
            f"{folder} holds another model ({'; '.join(different)}): choose another folder with "
            "--out"
        )
    for part, tensors in trained.tensors.items():
        load_tensors(folder / part, tensors)
    return read_json(folder / "state.json")
