"""Time and memory of a training step against transformers' Olmo2ForCausalLM, same shape, alternating, each in a fresh process.

    python tests/bench.py              # the laptop's shape
    python tests/bench.py --large      # D 384, 6 layers, vocabulary 100,352, T 512, batch 4
    python tests/bench.py --plan       # pretrain.py --plan against the published speeds

Prints, for each round, seconds per step (the median) and the process's peak memory, and at the end the ratios. Both use
fp32, AdamW with the same groups of weights, and clipping. transformers' loss has no z-loss, which favours it a little.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def measure(side: str, large: bool, steps: int) -> dict:
    import torch

    from model import SIZES, ModelConfig, OLMo2
    from pretrain import Config, keep_freed_memory, make_optimizer
    config = ModelConfig(layers=6, d_model=384, heads=6, kv_heads=6, ffn=1536) if large else SIZES["tiny"]
    rows, length = (4, 512) if large else (8, 128)
    if side == "ours":
        keep_freed_memory()
        network = OLMo2(config)
    else:
        from transformers import Olmo2Config, Olmo2ForCausalLM
        network = Olmo2ForCausalLM(Olmo2Config(
            vocab_size=config.vocab, hidden_size=config.d_model, intermediate_size=config.ffn, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, rms_norm_eps=1e-6, rope_theta=5e5,
            max_position_embeddings=4096, pad_token_id=config.pad, eos_token_id=config.eos, bos_token_id=None))
    optimizer = make_optimizer(network, Config())
    tokens = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    targets = torch.cat([tokens[:, 1:], torch.full((rows, 1), -100)], dim=1)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        if side == "ours":
            ce, z, n = network.loss(tokens, targets)
            loss = (ce + z) / n
        else:
            loss = network(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return {"side": side, "seconds": statistics.median(seconds[2:]), "loss": loss.item(),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def plan_against_published() -> None:
    """What the published speeds say of the plan's two constants, and how far off the plan is. Layouts: the recipes'."""
    import pretrain
    for size, (gpus, speed) in pretrain.PUBLISHED.items():
        c, _ = pretrain.read_flags(["--size", size, "--gpus", str(gpus)])
        p, seconds = pretrain.plan(pretrain.SIZES[size], c), c.batch * c.seq_len / gpus / speed
        print(f"{size:>4}: published {speed:,} tokens/s/GPU, a step in {seconds:.3f} s: efficiency {p['flops'] / seconds / 989e12:.3f}, at least "
              f"{sum(p['sent'].values()) / seconds / 1e9:.1f} GB/s; planned {p['tokens_per_s']:,.0f}, {p['tokens_per_s'] / speed - 1:+.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        plan_against_published()
        sys.exit()
    if options.side:
        print(json.dumps(measure(options.side, options.large, 8 if options.large else 60)))
        sys.exit()
    rounds = []
    for number in range(options.rounds):
        command = [sys.executable, __file__, *(["--large"] if options.large else []), "--side"]
        rounds.append([json.loads(subprocess.run([*command, side], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
                       for side in ("ours", "transformers")])
        print(f"round {number + 1}: " + ", ".join(f"{r['side']} {r['seconds']:.3f} s {r['peak_mb']:,.0f} MB" for r in rounds[-1]), flush=True)
    for key, words in (("seconds", "time per step"), ("peak_mb", "peak memory")):
        ratios = [ours[key] / theirs[key] for ours, theirs in rounds]
        print(f"{words}, ours / transformers: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
