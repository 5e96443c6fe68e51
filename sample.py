"""Talk to a model: any run, checkpoint or Hugging Face directory, of any stage.

    python sample.py runs/tiny/pretrain "Return the number of"
    python sample.py                             # the laptop's pretraining run; each line that you type is a text, an empty one ends
    python sample.py some/OLMo-2-Instruct        # a conversation, in the model's chat template; --system "Be brief."

A base model continues what it is given. An instruct model is asked: each text is the user's turn, and it sees all turns so
far. Which of the two a model is, its tokenizer_config.json says; --chat yes and --chat no overrule it.
"""
import codecs
import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from infra.files import UserError
from data import Tokenizer, get_tokenizer
from model import OLMo2, best_device, run_cli


@dataclass(frozen=True)
class Config:
    model: tyro.conf.Positional[str] = "runs/tiny/pretrain"  # a run, one of its checkpoints, or a Hugging Face directory
    prompt: tyro.conf.Positional[str] = ""  # the text to continue, or the question; none: ask for texts, one after the other
    chat: Literal["auto", "yes", "no"] = "auto"  # a conversation, or the continuation of a text; auto: as the model was made
    system: str = ""  # the system's turn, with which a conversation begins; implies --chat yes
    max_new_tokens: int = 200  # at most so many
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0: all
    top_p: float = 0.95  # draw from the fewest tokens that have this much probability together
    seed: int = 0  # of the draws; another seed, another text
    device: str = "auto"  # auto, cpu, mps, cuda


def continue_ids(model: OLMo2, tokenizer: Tokenizer, prompt: list[int], config: Config, echo: str = "") -> str:
    """Print `echo` and the continuation as it is made, and return it. A character of several tokens appears when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    steps = model.stream([prompt], config.max_new_tokens, config.temperature, config.top_k, config.top_p, tokenizer.eos, config.seed)
    made = b""
    for _, (token,), _ in steps:
        print(echo, end="")
        echo = ""
        if token != tokenizer.eos:
            made += tokenizer.token_bytes(token)
            print(decoder.decode(tokenizer.token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return made.decode("utf-8", errors="replace")


def answer(model: OLMo2, tokenizer: Tokenizer, messages: list[dict[str, str]], config: Config) -> None:
    """Print the assistant's next turn and add it to `messages`, whose oldest turns are forgotten where the context has no room."""
    while True:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        first = int(messages[0]["role"] == "system")
        room = model.config.context - min(config.max_new_tokens, model.config.context // 2)
        if len(prompt) <= room or len(messages) <= first + 1:
            break
        del messages[first : first + 2]  # a question and its answer
        print("(the conversation exceeds the model's context: its first turn is forgotten)", file=sys.stderr)
    messages.append({"role": "assistant", "content": continue_ids(model, tokenizer, prompt, config)})


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    model = OLMo2.load(config.model, device=best_device(config.device))
    tokenizer = get_tokenizer(config.model)
    chat = tokenizer.instruct or bool(config.system) if config.chat == "auto" else config.chat == "yes"
    messages = [{"role": "system", "content": config.system}] if config.system else []

    def respond(text: str, echo: str) -> None:
        if chat:
            messages.append({"role": "user", "content": text})
            answer(model, tokenizer, messages, config)
        else:  # models learn that a document follows an EOS: with no text to continue, that is what they get
            continue_ids(model, tokenizer, tokenizer.encode(text) or [tokenizer.eos], config, echo)

    if config.prompt:
        return respond(config.prompt, echo=config.prompt)
    print(f"{config.model}: type {'your turn' if chat else 'the beginning of a text'}; an empty line ends.", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        if not text:
            break
        try:
            respond(text, echo="")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            if chat:
                messages.pop()  # the turn that could not be answered


if __name__ == "__main__":
    run_cli(main)
