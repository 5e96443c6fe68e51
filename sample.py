"""Talk to a model: any run, checkpoint, Hugging Face directory or model on the Hub.

    python sample.py runs/tiny/pretrain "Return the number of"
    python sample.py                         # the laptop's pretraining run; type a text a line
    python sample.py allenai/OLMo-2-0425-1B-Instruct    # a conversation, from the Hub

Without a text on the command line, each line that you type is one, and an empty line ends. A base
model continues each text. An instruct model is asked: each text is the user's turn, in the model's
chat template, and it sees all turns so far. Which of the two a model is, its tokenizer_config.json
says; --chat yes and --chat no overrule it.
"""

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import tyro

from data import Tokenizer, get_tokenizer
from decode import decode_steps
from infra.distributed import best_device, run_cli, set_threads, weights_dtype
from infra.files import UserError
from infra.settings import (
    Count,
    NotNegative,
    PositiveShare,
    Threads,
    WeightsDtype,
    check_ranges,
)
from model import OLMo2
from servers import Servers, serve_model


@dataclass(frozen=True)
class Config:
    # a run, one of its checkpoints, a Hugging Face directory, or a model on the Hub (owner/name,
    # owner/name@revision)
    model: tyro.conf.Positional[str] = "runs/tiny/pretrain"

    # the text to continue, or the question; none: ask for texts, one after the other
    prompt: tyro.conf.Positional[str] = ""

    # a conversation, or the continuation of a text; auto: as the model was made
    chat: Literal["auto", "yes", "no"] = "auto"

    # the system's turn, with which a conversation begins; implies --chat yes
    system: str = ""

    # at most so many
    max_new_tokens: Count = 200

    # 0: always the likeliest token
    temperature: NotNegative = 0.8

    # draw from the k likeliest tokens; 0: all
    top_k: Count = 0

    # draw from the fewest tokens that have this much probability together
    top_p: PositiveShare = 0.95

    # of the draws; another seed, another text
    seed: Count = 0

    # auto, cpu, mps, cuda
    device: str = "auto"

    # of the weights; auto: bfloat16 on CUDA, else float32
    dtype: WeightsDtype = "auto"

    # CPU threads; 0: torch's choice
    threads: Threads = 0

    # vLLM servers that sample, as http://node1:8000, and load the model for it; none: this process
    rollouts: tuple[str, ...] = ()

    # name of the model on the servers; none: the only one
    rollouts_model: str = ""


def new_tokens(
    model: OLMo2 | Servers, prompt: list[int], config: Config, eos: int
) -> Iterator[int]:
    """What follows the prompt, token by token; of servers, when all of it is there."""
    top = (config.top_k, config.top_p)
    settings = (config.max_new_tokens, config.temperature, *top, eos, config.seed)
    if isinstance(model, Servers):
        (tokens,), _ = model.generate([prompt], *settings)
        yield from tokens
        return
    for _, (token,), _ in decode_steps(model, [prompt], *settings):
        yield token


def continue_ids(
    model: OLMo2 | Servers, tokenizer: Tokenizer, prompt: list[int], config: Config, echo: str = ""
) -> str:
    """Print `echo` and what follows the prompt, token by token, and return what follows.

    A character of several tokens appears when its last one is there.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    made = []
    for token in new_tokens(model, prompt, config, tokenizer.eos):
        print(echo, end="")  # not earlier: the model may refuse the prompt
        echo = ""
        if token != tokenizer.eos:
            made.append(token)
            print(decoder.decode(tokenizer.token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return tokenizer.decode(made)


def answer(
    model: OLMo2 | Servers, tokenizer: Tokenizer, messages: list[dict[str, str]], config: Config
) -> None:
    """Print the assistant's next turn, and add it to `messages`.

    Where the model's context has no room for all turns, the oldest question and its answer are
    removed; the system's turn and the last question always stay.
    """
    context = model.context if isinstance(model, Servers) else model.config.context
    room = context - min(config.max_new_tokens, context // 2)
    first = int(messages[0]["role"] == "system")
    while True:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        if len(prompt) <= room or len(messages) <= first + 1:
            break
        del messages[first : first + 2]
        print("(the model's context is full: the first turn is forgotten)", file=sys.stderr)
    reply = continue_ids(model, tokenizer, prompt, config)
    messages.append({"role": "assistant", "content": reply})


def read_line() -> str:
    """A line as it is typed; "" at the end of the input, and at Ctrl-C."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return ""


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    check_ranges(config)
    set_threads(config.threads)
    device = best_device(config.device)
    if config.rollouts:
        model = serve_model(config.rollouts, config.model, config.rollouts_model)
    else:
        model = OLMo2.load(config.model, weights_dtype(config.dtype, device), device)
    tokenizer = get_tokenizer(config.model)
    chat = config.chat == "yes"
    if config.chat == "auto":
        chat = tokenizer.instruct or config.system != ""
    messages = [{"role": "system", "content": config.system}] if config.system else []
    texts = [config.prompt]
    if not config.prompt:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # what is typed may be no UTF-8
        wanted = "your turn" if chat else "the beginning of a text"
        print(f"{config.model}: type {wanted}; an empty line ends.", file=sys.stderr)
        texts = iter(read_line, "")  # until it returns an empty line

    for text in texts:
        try:
            if chat:
                messages.append({"role": "user", "content": text})
                answer(model, tokenizer, messages, config)
            else:
                continue_ids(model, tokenizer, tokenizer.encode(text), config, config.prompt)
        except UserError as error:
            if config.prompt:
                raise
            print(f"error: {error}", file=sys.stderr)
            if chat:
                messages.pop()  # the turn that could not be answered


if __name__ == "__main__":
    run_cli(main)
