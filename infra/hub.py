"""Models by their names on the Hugging Face Hub: owner/name, or owner/name@revision.

    fetch_model("allenai/OLMo-2-0425-1B@stage1-step10000-tokens21B")  # a folder in the Hub's cache
    list_revisions("allenai/OLMo-2-0425-1B")                          # with the tokens seen

`huggingface_hub` does the work, so its cache, resumed downloads, tokens (HF_TOKEN), mirrors
(HF_ENDPOINT) and offline mode (HF_HUB_OFFLINE) are as everywhere. Only files that are read here are
fetched. OLMo 2 was released with its weights at every thousand steps, each a revision.
"""

import contextlib
import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.files import UserError, check_room, first_line, read_json

# What is read of a model before its weights, so that it is checked before.
SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
MODEL_TYPES = ("olmo2", "olmo2-ablation")

# ------------------------------------------------------------------------------------------
# Names


def split_name(name: str) -> tuple[str, str | None]:
    """(repository, revision or None) of a name.

    >>> split_name("allenai/OLMo-2-0425-1B@stage1-step300-tokens1B")
    ('allenai/OLMo-2-0425-1B', 'stage1-step300-tokens1B')
    """
    repository, _, revision = name.partition("@")
    return repository, revision or None


def is_hub_name(name: str) -> bool:
    """Does it name a model on the Hub, and nothing that is here?

    A path whose first folder is here is a path that someone got wrong.

    >>> is_hub_name("allenai/OLMo-2-0425-1B"), is_hub_name("runs/tiny/pretrain"), is_hub_name("x")
    (True, False, False)
    """
    match = re.fullmatch(r"([\w-][\w.-]*)/[\w-][\w.-]*(@[\w./-]+)?", name)
    return bool(match) and not Path(name).exists() and not Path(match[1]).exists()


# ------------------------------------------------------------------------------------------
# Downloads


@functools.cache
def fetch_model(name: str) -> Path:
    """The folder of a model on the Hub, in the cache; what is not there yet is downloaded.

    Raises UserError, before any weight is downloaded, for a model that is no OLMo 2 or does not fit
    on the disk.
    """
    folder = fetch_small_files(name)
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{name} is a model of type {kind!r}, not an OLMo 2 ('olmo2')")
    weights = weight_files(folder)
    check_weights_fit(name, weights)
    return download(name, (*SMALL_FILES, *weights))


def weight_files(folder: Path) -> set[str]:
    """The files of a model's weights: those of its index, or the only one."""
    index = folder / "model.safetensors.index.json"
    return files_of_index(index) if index.exists() else {"model.safetensors"}


def files_of_index(index: Path) -> set[str]:
    """The files that a model.safetensors.index.json names. Raises UserError."""
    weight_map = read_json(index).get("weight_map")
    files = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {""}
    if not all(re.fullmatch(r"[\w.-]+\.safetensors", file) for file in files):
        raise UserError(f"{index}: expected file names under weight_map, by tensor")
    return files


@functools.cache
def fetch_small_files(name: str) -> Path:
    """The folder of a model's shape and tokenizer, without its weights. Raises UserError."""
    folder = download(name, SMALL_FILES)
    if not (folder / "config.json").exists():
        raise UserError(f"{name} holds no config.json: it is no model that opens here")
    return folder


def download(name: str, patterns: tuple[str, ...]) -> Path:
    """The folder of a snapshot that has the files of these patterns. Raises UserError."""
    from huggingface_hub import snapshot_download

    repository, revision = split_name(name)
    with errors_in_one_line(name):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


def check_weights_fit(name: str, weights: set[str]) -> None:
    """Raise UserError if the weights that are still to come do not fit on the disk.

    Where the Hub cannot be asked, the cache must have them.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    repository, revision = split_name(name)
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception:  # no network: `download` will say what is missing
        return
    missing = 0
    for file in info.siblings or ():
        known = try_to_load_from_cache(repository, file.rfilename, revision=info.sha)
        if file.rfilename in weights and not known:
            missing += file.size or 0
    check_room(Path(constants.HF_HUB_CACHE), missing, name, "put the cache elsewhere (HF_HOME)")


@contextlib.contextmanager
def errors_in_one_line(name: str) -> Iterator[None]:
    """Turn what the Hub and the network say into a UserError."""
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except (errors.HfHubHTTPError, OSError, httpx.TransportError) as error:
        raise UserError(explain(name, error)) from None


def explain(name: str, error: Exception) -> str:
    """What a person can do about an error of the Hub or the network."""
    from huggingface_hub import constants, errors

    repository, revision = split_name(name)
    said = first_line(error)
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        return f"{repository} is gated: accept its terms at {page}, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repository} is neither a path here nor a model on the Hub that you may see: check "
            "the name (a private one needs HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        names = [one.name for one in list_revisions(repository)]
        near = ", ".join(difflib.get_close_matches(revision, names, 3, 0.3)) or "none"
        return (
            f"{repository} has no revision {revision!r}, the nearest are {near}: "
            f"python eval.py {repository} --list prints all"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return f"{name}: {said}"
    cache = constants.HF_HUB_CACHE
    return (
        f"{name} is neither a path here nor in the cache ({cache}), and the Hub cannot be reached "
        f"({said[:80]}): see HF_HUB_OFFLINE and HF_ENDPOINT, or download it elsewhere (hf download "
        "NAME) and name the folder"
    )


# ------------------------------------------------------------------------------------------
# Revisions


@dataclass(frozen=True)
class Revision:
    """A branch or a tag of a model."""

    name: str
    stage: str  # as in stage1, stage2-ingredient3; "" where the name does not say it
    step: int | None
    tokens: int | None  # seen in its stage, rounded up to billions

    @property
    def place(self) -> tuple:
        """Where it stands in the order of training; what says nothing comes last."""
        return (self.tokens is None, self.stage, self.step or 0, self.name)


def parse_revision(name: str) -> Revision:
    """What the name of a released checkpoint says.

    >>> parse_revision("stage1-step10000-tokens21B")
    Revision(name='stage1-step10000-tokens21B', stage='stage1', step=10000, tokens=21000000000)
    >>> parse_revision("main").tokens
    """
    found = re.fullmatch(r"(?:(.+)-)?step(\d+)-tokens(\d+)B", name)
    if not found:
        return Revision(name, "", None, None)
    return Revision(name, found[1] or "", int(found[2]), int(found[3]) * 10**9)


def list_revisions(repository: str) -> list[Revision]:
    """All branches and tags of a model on the Hub, in the order of training. Raises UserError."""
    from huggingface_hub import HfApi

    with errors_in_one_line(repository):
        refs = HfApi().list_repo_refs(repository)
    names = {ref.name for ref in (*refs.branches, *refs.tags)}
    return sorted(map(parse_revision, names), key=lambda revision: revision.place)


def forget(name: str) -> None:
    """Remove the weights of one revision from the cache, but for what others share with it."""
    from huggingface_hub import scan_cache_dir

    folder = fetch_model(name)
    fetch_model.cache_clear()
    fetch_small_files.cache_clear()
    scan_cache_dir().delete_revisions(folder.name).execute()
