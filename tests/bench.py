"""Time and memory of a training step, or of scoring request files, against transformers' Olmo2ForCausalLM, and of DPO and GRPO steps against trl.

The same shape, alternating, each in a fresh process:

    python tests/bench.py              # the laptop's shape
    python tests/bench.py --large      # D 384, 6 layers, vocabulary 100,352, T 512, batch 4
    python tests/bench.py --plan       # plan.py against the published speeds
    python tests/bench.py --post dpo   # or grpo: posttrain.py's steps against those of trl's trainers
    python tests/bench.py --olmes requests.jsonl.gz ... --tokenizer olmo2      # eval.py's log-likelihoods, and how far they are apart

Prints, for each round, seconds per step (the median) and the process's peak memory, and at the end the ratios. Both use
fp32, AdamW with the same groups of weights, and clipping. transformers' loss has no z-loss, which favours it a little. Request files:
the time and peak memory of all their requests, which transformers scores one by one, with the logits of the continuation alone. DPO:
32 pairs a step, both with the reference's log-probabilities computed beforehand. GRPO: a step is 16 prompts x 8 answers of at most 48 tokens (random weights
hardly ever end one; give a trained --model) and two optimizer steps; the same verifier. The laptop's shape; trl on transformers' model and generation.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def measure(side: str, large: bool, steps: int) -> dict:
    import torch

    from infra.distributed import keep_freed_memory
    from model import SIZES, ModelConfig, OLMo2
    from pretrain import Config, make_optimizer

    config = (
        ModelConfig(layers=6, d_model=384, heads=6, kv_heads=6, ffn=1536)
        if large
        else SIZES["tiny"]
    )
    rows, length = (4, 512) if large else (8, 128)
    if side == "ours":
        keep_freed_memory(True)
        network = OLMo2(config)
    else:
        from transformers import Olmo2Config, Olmo2ForCausalLM

        network = Olmo2ForCausalLM(
            Olmo2Config(
                vocab_size=config.vocab,
                hidden_size=config.d_model,
                intermediate_size=config.ffn,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                rms_norm_eps=1e-6,
                rope_theta=5e5,
                max_position_embeddings=4096,
                pad_token_id=config.pad,
                eos_token_id=config.eos,
                bos_token_id=None,
            )
        )
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
    return {
        "side": side,
        "seconds": statistics.median(seconds[2:]),
        "loss": loss.item(),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def score(side: str, paths: list[str], name: str, questions: int) -> dict:
    """Log-likelihoods of all requests of the files under random weights (D 256, 4 layers), context 2,048."""
    import torch

    from data import get_tokenizer
    from likelihood import loglikelihoods
    from model import ModelConfig, OLMo2
    from tasks.requests import Selection, read_requests

    torch.set_grad_enabled(False)
    tokenizer = get_tokenizer(name)
    network = OLMo2(
        ModelConfig(
            layers=4,
            d_model=256,
            heads=4,
            kv_heads=4,
            ffn=704,
            vocab=tokenizer.padded_vocab_size,
            context=2048,
            eos=tokenizer.eos,
            pad=tokenizer.pad,
        )
    )
    first = Selection(first=questions)
    pairs = [
        (r.context, r.continuation) for path in paths for r in read_requests(Path(path), first)
    ]
    if side == "transformers":
        from transformers import Olmo2ForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            network.save(folder)
            network = Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    began = time.perf_counter()
    if side == "ours":
        values = loglikelihoods(network, tokenizer, pairs)
    else:
        values = []
        for before, after in (
            (tokenizer.encode(context), tokenizer.encode(continuation))
            for context, continuation in pairs
        ):
            tokens, targets = (
                torch.tensor([(before + after)[:-1][-2048:]]),
                torch.tensor(after)[:, None],
            )
            logits = network(tokens, logits_to_keep=len(after)).logits[0]
            values.append(
                (logits.gather(1, targets)[:, 0] - logits.logsumexp(-1)).double().sum().item()
            )
    return {
        "side": side,
        "seconds": time.perf_counter() - began,
        "values": values,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def post(side: str, stage: str, model: str, steps: int = 12) -> dict:
    """Seconds per step of posttrain.py's dpo or grpo, or of trl's trainer, from the same weights: random ones, or a run's."""
    import os

    import torch

    import posttrain
    from data import get_tokenizer
    from model import SIZES, OLMo2
    from tasks.synthetic import rlvr_rows

    with tempfile.TemporaryDirectory() as folder:
        base, tokenizer = str(Path(model).resolve()) if model else "base", get_tokenizer("laptop")
        os.chdir(folder)
        if not model:
            OLMo2(SIZES["tiny"]).save(base)
            tokenizer.save(base)
        rows = list(rlvr_rows("ifeval", "train", 32 * steps))
        said = lambda text: [{"role": "assistant", "content": text}]
        if side == "ours":
            flags = [
                "--init",
                base,
                "--out",
                "run",
                "--steps",
                str(steps),
                "--data",
                "rows.jsonl",
                "--log-every",
                "1000",
            ]
            if stage == "dpo":
                rows = [
                    {
                        "chosen": row["messages"] + said(row["worked_answer"]),
                        "rejected": row["messages"] + said(row["short_answer"]),
                    }
                    for row in rows
                ]
            Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            posttrain.main([stage, *flags])
            seconds = [
                row["seconds"]
                for row in posttrain.read_metrics(Path("run"))
                if row["event"] == "step"
            ]
        else:
            from datasets import Dataset
            from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
            from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

            load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            common = dict(
                output_dir="out",
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_steps=1000,
                disable_tqdm=True,
                gradient_accumulation_steps=1,
            )
            if stage == "dpo":
                data = Dataset.from_list(
                    [
                        {
                            "prompt": row["messages"],
                            "chosen": said(row["worked_answer"]),
                            "rejected": said(row["short_answer"]),
                        }
                        for row in rows
                    ]
                )
                trainer = DPOTrainer(
                    load(),
                    load(),
                    DPOConfig(
                        **common,
                        max_steps=steps,
                        per_device_train_batch_size=32,
                        max_length=128,
                        loss_type=["sigmoid_norm"],
                        beta=5.0,
                        learning_rate=2e-4,
                        precompute_ref_log_probs=True,
                    ),
                    train_dataset=data,
                    processing_class=AutoTokenizer.from_pretrained(base),
                )
            else:
                data = Dataset.from_list(
                    [{"prompt": row["messages"], "label": row["ground_truth"]} for row in rows]
                )
                verify = lambda completions, label, **_: [
                    10.0 * posttrain.VERIFIERS["ifeval"](c[0]["content"], one)
                    for c, one in zip(completions, label)
                ]
                trainer = GRPOTrainer(
                    load(),
                    reward_funcs=verify,
                    train_dataset=data,
                    processing_class=AutoTokenizer.from_pretrained(base),
                    args=GRPOConfig(
                        **common,
                        max_steps=2 * steps,
                        per_device_train_batch_size=64,
                        steps_per_generation=2,
                        num_generations=8,
                        max_completion_length=48,
                        beta=0.01,
                        learning_rate=5e-4,
                    ),
                )

            class Clock(TrainerCallback):
                seconds = []

                def on_step_end(self, *_, **__):
                    self.seconds.append(time.perf_counter())

            trainer.add_callback(Clock())
            trainer.train()
            seconds = Clock.seconds[:: 2 if stage == "grpo" else 1]
        os.chdir("/")
    return {
        "side": side,
        "seconds": statistics.median(b - a for a, b in zip(seconds[2:], seconds[3:])),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def plan_against_published() -> None:
    """What the published speeds say of the plan's constants, and how far off the plan is. Layouts: the recipes'."""
    from model import SIZES
    from plan import COLLECTIVES, PUBLISHED, Plan, read_settings

    for size, (gpus, speed) in PUBLISHED.items():
        c = read_settings(["--size", size, "--gpus", str(gpus)])
        plan = Plan(SIZES[size], c)
        step, tokens = plan.step(), c.batch * c.seq_len / gpus
        seconds, planned = tokens / speed, tokens / max(plan.seconds(step))
        efficiency = step["FLOPs"] / seconds / plan.cluster.gpu.peak
        sent = sum(step[kind] for kind in COLLECTIVES) / seconds
        print(
            f"{size:>4}: published {speed:,} tokens/s/GPU, a step in {seconds:.3f} s: efficiency {efficiency:.3f}, at least "
            f"{sent / 1e9:.1f} of the planned {plan.cluster.bus(plan.layout.shard) / 1e9:.0f} GB/s; planned {planned:,.0f}, {planned / speed - 1:+.1%}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--post", choices=("dpo", "grpo"))
    parser.add_argument(
        "--model",
        default="",
        help="of --post: a Hugging Face directory made with the laptop's tokenizer, as runs/tiny/dpo/hf; none: random weights",
    )
    parser.add_argument("--olmes", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--tokenizer", default="laptop", help="of --olmes: laptop or olmo2")
    parser.add_argument(
        "--questions", type=int, default=0, help="of --olmes: the first ones of each file; 0: all"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        plan_against_published()
        sys.exit()
    if options.side:
        print(
            json.dumps(
                post(options.side, options.post, options.model)
                if options.post
                else score(options.side, options.olmes, options.tokenizer, options.questions)
                if options.olmes
                else measure(options.side, options.large, 8 if options.large else 60)
            )
        )
        sys.exit()
    rounds, peer = [], "trl" if options.post else "transformers"
    for number in range(options.rounds):
        command = [sys.executable, __file__, *sys.argv[1:], "--side"]
        rounds.append(
            [
                json.loads(
                    subprocess.run(
                        [*command, side], capture_output=True, text=True, check=True
                    ).stdout.splitlines()[-1]
                )
                for side in ("ours", peer)
            ]
        )
        if options.olmes:
            pairs = list(zip(*(r.pop("values") for r in rounds[-1])))
            print(
                f"{len(pairs):,} requests, largest difference {max(abs(ours - theirs) for ours, theirs in pairs):.1e}"
            )
        print(
            f"round {number + 1}: "
            + ", ".join(
                f"{r['side']} {r['seconds']:.3f} s {r['peak_mb']:,.0f} MB" for r in rounds[-1]
            ),
            flush=True,
        )
    for key, words in (
        ("seconds", "time" if options.olmes else "time per step"),
        ("peak_mb", "peak memory"),
    ):
        ratios = [ours[key] / theirs[key] for ours, theirs in rounds]
        print(
            f"{words}, ours / {peer}: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
