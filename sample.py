"""Talk to a model: any run, checkpoint or Hugging Face directory, of any stage.

    python sample.py runs/tiny/pretrain "Return the number of"
    python sample.py                             # the laptop's pretraining run; type a text, end with an empty line
"""
import codecs
import sys
from dataclasses import dataclass

import tyro

from data import Tokenizer, get_tokenizer
from model import OLMo2, UserError, best_device, run_cli


@dataclass(frozen=True)
class Config:
    model: tyro.conf.Positional[str] = "runs/tiny/pretrain"  # a run, one of its checkpoints, or a Hugging Face directory
    prompt: tyro.conf.Positional[str] = ""  # the text to continue; none: ask for texts, one after the other
    max_new_tokens: int = 200  # at most so many
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0: all
    top_p: float = 0.95  # draw from the fewest tokens that have this much probability together
    seed: int = 0  # of the draws; another seed, another text
    device: str = "auto"  # auto, cpu, mps, cuda


def continue_text(model: OLMo2, tokenizer: Tokenizer, prompt: str, config: Config, echo: str = "") -> None:
    """Print `echo` and the continuation as it is made. A character of several tokens appears when it is whole."""
    # Models learn that a document follows an EOS: with no text to continue, that is what they get.
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    steps = model.stream([prompt_ids], config.max_new_tokens, config.temperature, config.top_k, config.top_p,
                         tokenizer.eos, config.seed)
    for _, (token,), _ in steps:
        print(echo, end="")
        echo = ""
        if token != tokenizer.eos:
            print(decoder.decode(tokenizer.token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    model = OLMo2.load(config.model, device=best_device(config.device))
    tokenizer = get_tokenizer(config.model)
    if config.prompt:
        return continue_text(model, tokenizer, config.prompt, config, echo=config.prompt)
    print(f"{config.model}: type the beginning of a text; an empty line ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        if not prompt:
            break
        try:
            continue_text(model, tokenizer, prompt, config)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
