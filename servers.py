"""vLLM servers that sample in the place of a training process, for models that fill its GPUs.

    VLLM_SERVER_DEV_MODE=1 vllm serve runs/32B/dpo/hf --enable-scale-out \
        --logprobs-mode processed_logprobs --host 127.0.0.1
    python posttrain.py grpo --size 32B --rollouts http://127.0.0.1:8000

What this teaches: how a policy in training and an engine that samples stay one model. The weights
go to the servers through a folder that both see: written by all ranks, renamed when it is whole,
read by each server, which forgets the keys and values of the old weights. They carry a version, and
each answer says of which version each of its tokens is: what is of another one is asked again.

A server gets ids and gives ids, so no text goes through a tokenizer on the way. Its
log-probabilities are those of `OLMo2.generate`, softmax(logits / temperature). Its random numbers
are its own: with the same seed it draws the same answer again, and another one than this process.

Made for vLLM 0.32: its routes /inference/v1/generate, /collective_rpc, /reset_prefix_cache and
/update_weight_version. Whoever reaches these last three can change the weights, with no key asked:
they belong on loopback, or on a closed network.
"""

import hashlib
import itertools
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from decode import check_prompts, check_sampling
from infra.checkpoint import assign_to_files, find_weights, write_weights
from infra.distributed import (
    checksum,
    on_rank_zero,
    patient_group,
    rank_and_world,
    run_on_all_ranks,
    weights_dtype,
)
from infra.files import UserError, first_line
from likelihood import say_once
from shape import write_config

IN_FLIGHT = 64  # requests at a time of a process to each server
ATTEMPTS = 3  # to get an answer of the right weights from a server
PAUSES = (0.1, 0.5, 1, 2, 5, 10)  # seconds before another try; the last one again and again
BUSY = (429, 502, 503, 504)  # of a server that starts, or has too much to do


class ServerGone(UserError):
    """A server does not answer, and the patience is over."""


class StaleWeights(Exception):
    """An answer of other weights than those that were sent: the server has started anew."""


@dataclass(frozen=True)
class Policy:
    """The weights that all servers must have."""

    folder: Path
    version: str


class Servers:
    """Some vLLM servers with the same weights. All ranks have one, with the same urls."""

    def __init__(self, urls: tuple[str, ...], name: str = "", patience: float = 1800):
        """urls: as http://node1:8000. name: of the model on the servers; none: the only one.

        patience: seconds until a server that does not answer counts as gone. A key is taken from
        VLLM_API_KEY.
        """
        import httpx

        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.name = name
        self.patience = patience
        self.policy: Policy | None = None
        self.folder: Path | None = None  # of `update`: for weights alone, seen by the servers, too
        self.loading = {url: threading.Lock() for url in self.urls}
        self.context = 0  # tokens of a row that all servers take
        key = os.environ.get("VLLM_API_KEY")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=patience,
            limits=limits,
            trust_env=False,
        )

    # ---- what they are

    def check(self, longest: int = 0) -> str:
        """Wait for all servers, and return a line on them. Raises UserError for one that won't do.

        longest: tokens of a row that they must take.
        """
        lines = []
        for url in self.urls:
            version = self.ask(url, "GET", "/version").get("version", "unknown")
            cards = self.ask(url, "GET", "/v1/models").get("data", [])
            models = {card["id"]: card for card in cards}
            name = self.name or next(iter(models), "")
            if name not in models or (not self.name and len(models) > 1):
                raise UserError(
                    f"{url} serves {', '.join(models)}: name one of them with --rollouts-model"
                )
            context = models[name].get("max_model_len") or longest
            if context < longest:
                raise UserError(
                    f"{url} takes {context:,} tokens at most, and {longest:,} are asked for: start "
                    f"it with --max-model-len {longest}"
                )
            self.context = min(self.context or context, context)
            lines.append(f"{url} (vLLM {version}, {name})")
        return ", ".join(lines)

    # ---- their weights

    def update(self, model: nn.Module) -> None:
        """Send a model's weights to all servers, unless they have them. All ranks call it."""
        version = checksum(dict(model.named_parameters()))
        if self.policy and self.policy.version == version:
            return
        write_policy(self.folder / version, model)
        self.go_to(Policy(self.folder / version, version))
        on_rank_zero(remove_others, self.policy.folder)

    def go_to(self, policy: Policy) -> None:
        """Let all servers load a policy; rank 0 asks them, and the others wait."""

        def load_all() -> None:
            with ThreadPoolExecutor(len(self.urls)) as threads:
                list(threads.map(lambda url: self.load(url, policy), self.urls))

        on_rank_zero(load_all, group=patient_group())
        self.policy = policy

    def load(self, url: str, policy: Policy) -> None:
        """Let one server load a policy. Raises UserError."""
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(policy.folder)}}
        try:
            self.ask(url, "POST", "/collective_rpc", reload)
        except ServerGone:
            raise
        except UserError as error:
            raise UserError(
                f"{url} did not take the weights: it must run with VLLM_SERVER_DEV_MODE=1, find "
                f"the folder {policy.folder}, and serve a model of this shape; {error}"
            ) from None
        # Keys and values of the old weights; requests that run would keep theirs.
        reset = "/reset_prefix_cache?reset_running_requests=true"
        if not self.ask(url, "POST", reset).get("success"):
            raise UserError(f"{url} keeps keys and values of old weights: start it anew")
        self.ask(url, "POST", "/update_weight_version", {"new_version": policy.version})

    def load_again(self, url: str) -> None:
        """`load` for a server that has started anew, which several requests notice."""
        with self.loading[url]:
            if self.ask(url, "GET", "/weight_info").get("weight_version") != self.policy.version:
                self.load(url, self.policy)

    # ---- answers

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos: int | None = None,
        seed: int | list[int] = 0,
        stops: tuple[str, ...] = (),
    ) -> tuple[list[list[int]], list[list[float]]]:
        """What `OLMo2.generate` returns, sampled by the servers; row by row, in any order.

        A row also ends with the token that completes one of the texts `stops`. Raises UserError.
        """
        check_prompts(prompts, self.context)
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        if max_new_tokens == 0:
            return [[] for _ in prompts], [[] for _ in prompts]
        seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
        common = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "stop_token_ids": [] if eos is None else [eos],
            "ignore_eos": True,  # nothing else ends a row
            "stop": list(stops),
            "detokenize": bool(stops),
            "logprobs": 0,  # that of the token itself
        }
        requests = []
        for prompt, row_seed in zip(prompts, seeds):
            room = min(max_new_tokens, self.context - len(prompt))
            params = {**common, "seed": row_seed, "max_tokens": room}
            requests.append({"token_ids": prompt, "sampling_params": params})
        written = self.answer_all(requests)
        return [tokens for tokens, _ in written], [log_probs for _, log_probs in written]

    def answer_all(self, requests: list[dict]) -> list[tuple[list[int], list[float]]]:
        """All rows, in order, shared out over the servers; the first error ends it."""
        rank, _ = rank_and_world()
        urls = itertools.islice(itertools.cycle(self.urls), rank, None)
        with ThreadPoolExecutor(IN_FLIGHT * len(self.urls)) as threads:
            made = [threads.submit(self.answer, *pair) for pair in zip(urls, requests)]
            try:
                return [future.result() for future in made]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def answer(self, url: str, request: dict) -> tuple[list[int], list[float]]:
        """One row, of the right weights."""
        for _ in range(ATTEMPTS):
            reply = self.ask(url, "POST", "/inference/v1/generate", request)
            try:
                return self.read(url, reply, request["sampling_params"])
            except StaleWeights:
                self.load_again(url)
        raise UserError(f"{url} answers with other weights than those that were sent to it")

    def read(self, url: str, reply: dict, params: dict) -> tuple[list[int], list[float]]:
        """(ids, log-probabilities) of a reply. Raises UserError, or StaleWeights."""
        try:
            (choice,) = reply["choices"]
            tokens = choice["token_ids"]
            log_probs = [token["logprob"] for token in choice["logprobs"]["content"]]
            versions = {span["version"] for span in choice["weight_versions"] or ()}
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{url} answers in another way than vLLM 0.32: {first_line(str(reply))[:200]}"
            ) from None
        if self.policy and versions != {self.policy.version}:
            raise StaleWeights
        ended = tokens[-1:] == params["stop_token_ids"] or choice["finish_reason"] == "stop"
        whole = len(tokens) == params["max_tokens"] or (ended and tokens)
        if len(tokens) != len(log_probs) or not whole:
            raise UserError(
                f"{url} gave {len(tokens)} tokens with {len(log_probs)} log-probabilities, of "
                f"{params['max_tokens']} ({choice['finish_reason']})"
            )
        return tokens, log_probs

    # ---- HTTP

    def ask(self, url: str, method: str, path: str, body: dict | None = None) -> dict:
        """The JSON that a server answers. Raises UserError that names it and what it said.

        A server that is not there, or busy, is asked again until the patience is over.
        """
        import httpx

        give_up = time.monotonic() + self.patience
        for pause in itertools.chain(PAUSES, itertools.repeat(PAUSES[-1])):
            try:
                if body is not None and path.startswith("/inference") and self.name:
                    body = {**body, "model": self.name}
                reply = self.client.request(method, url + path, json=body)
                if reply.status_code not in BUSY:
                    return self.parse(url, path, reply)
                problem = f"status {reply.status_code}"
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem = first_line(error) or type(error).__name__
                if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
                    raise UserError(f"--rollouts {url}: {problem}") from None
            if time.monotonic() + pause > give_up:
                raise ServerGone(
                    f"no answer from the vLLM server at {url} for {self.patience:g} s ({problem}): "
                    "start it, or name another with --rollouts"
                )
            if pause > 1 and rank_and_world()[0] == 0:
                say_once(
                    f"waiting for the vLLM server at {url}, {self.patience:g} s at most: {problem}"
                )
            time.sleep(pause)

    def parse(self, url: str, path: str, reply) -> dict:
        """The content of a reply, {} for none. Raises UserError."""
        if reply.status_code == 401:
            raise UserError(f"{url} wants a key: set VLLM_API_KEY to the one it was started with")
        if not reply.is_success:
            raise UserError(f"{url}{path}: status {reply.status_code}, {reply.text[:300]!r}")
        try:
            return reply.json() if reply.content else {}
        except ValueError:
            raise UserError(f"{url}{path} answers with no JSON: is it a vLLM server?") from None


def serve_model(urls: tuple[str, ...], path: str, name: str = "") -> Servers:
    """Servers that are told to load the model at `path`, whose folder they must see.

    Raises UserError, also for a training state: its weights are in shards that vLLM cannot read.
    """
    _, weights = find_weights(path)
    files = sorted(weights.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path} is a training state, which vLLM cannot read: name its run")
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    version = hashlib.sha256(repr((str(weights.resolve()), stats)).encode()).hexdigest()[:12]
    Servers(urls, name, patience=10).check()  # who waits at a terminal hears of it soon
    servers = Servers(urls, name)
    where = servers.check()
    servers.go_to(Policy(weights.resolve(), version))
    print(f"{path} samples on {where}, which keeps its weights", file=sys.stderr)
    return servers


# ------------------------------------------------------------------------------------------
# The folder


def write_policy(folder: Path, model: nn.Module) -> None:
    """Write a model's weights in the dtype that it computes in. All ranks call it.

    Each tensor is gathered from all ranks, one at a time, and kept in CPU memory by the rank that
    writes it; then all write at once. The folder gets its name when it is whole.
    """
    rank, world = rank_and_world()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    dtype = weights_dtype("auto", next(model.parameters()).device)
    meta = {}
    for name, tensor in weights.items():
        meta[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
    shard_bytes = sum(tensor.nbytes for tensor in meta.values()) // world + 1
    files = assign_to_files(meta, shard_bytes)
    mine = set(itertools.chain(*list(files.values())[rank::world]))
    kept = {}
    for name, tensor in weights.items():
        whole = tensor.to(dtype)
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if name in mine:
            kept[name] = whole.cpu()
    tmp = folder.with_name(f"{folder.name}.tmp")
    on_rank_zero(shutil.rmtree, tmp, True)
    run_on_all_ranks(write_weights, tmp, meta, shard_bytes, kept.get, group=patient_group())
    on_rank_zero(finish_folder, tmp, folder, model, dtype)


def finish_folder(tmp: Path, folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
    """Give a written folder its name."""
    write_config(tmp, model.config, dtype)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(tmp, folder)


def remove_folder(folder: Path) -> None:
    """Remove the folder of the weights, with all that is in it; rank 0 does."""
    if rank_and_world()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)


def remove_others(folder: Path) -> None:
    """Remove what earlier versions have left beside a folder."""
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
