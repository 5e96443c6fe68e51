"""The shape of a model: the sizes of OLMo 2, and config.json, where the Hub keeps a shape.

    SIZES["7B"]                     # a shape by name; write a line of your own into the table
    read_config(Path("some/hf"))    # the shape of a model in a folder
    hf_config(SIZES["7B"], torch.bfloat16)  # the content of its config.json

The transformer of such a shape is in model.py.
"""

import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from infra.files import UserError, did_you_mean, read_json, write_json
from infra.hub import MODEL_TYPES

# ------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. The second half are the paper's ablations: change one, train again."""

    layers: int
    d_model: int  # D
    heads: int  # H; each is D / H wide
    kv_heads: int  # G: keys and values serve H / G queries each (GQA; only the 32B has G < H)
    ffn: int  # hidden width of the MLP
    vocab: int = 100_352  # V: the tokenizer's 100,278 entries, padded to a multiple of 128
    context: int = 4096  # longest sequence that the model is trained on, tokens
    eos: int = 100_257  # id of <|endoftext|>
    pad: int = 100_277  # id of <|pad|>
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    head: Literal["lm", "score"] = "lm"  # score: one column, not V (reward, value)
    # The ablations of section 3. The released models have the first value of each.
    norm_position: Literal["reordered", "pre"] = "reordered"  # pre: as in GPT-2 and Llama
    qk_norm: bool = True
    norm: Literal["rms", "layernorm"] = "rms"  # layernorm: without parameters, as in OLMo-0424
    init: Literal["olmo2", "olmo0424"] = "olmo2"  # olmo0424: scaled by width and depth
    embed_std: float = 0.02  # std of the input embedding under init=olmo2

    def __post_init__(self):
        names = ("layers", "d_model", "heads", "kv_heads", "ffn", "vocab", "context")
        wrong = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) <= 0]
        if wrong:
            raise UserError(f"{', '.join(wrong)} must be positive")
        if self.d_model % (2 * self.heads):
            raise UserError(
                f"d_model {self.d_model} must be an even multiple of heads {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise UserError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def parameters(self) -> dict[str, int]:
        """Exact counts: `total`, and of it `embed`, the input embedding, which costs no FLOPs."""
        qk_width = (self.heads + self.kv_heads) * self.head_dim
        attention = 2 * self.d_model * qk_width  # q and o are [D, H K], k and v [D, G K]
        mlp = 3 * self.d_model * self.ffn
        embed = self.vocab * self.d_model
        head = embed if self.head == "lm" else self.d_model
        total = embed + self.layers * (attention + mlp) + head
        if self.norm == "rms":  # two a block, two of QK-norm, and the last
            total += self.layers * (2 * self.d_model + self.qk_norm * qk_width) + self.d_model
        return {"total": total, "embed": embed}

    @property
    def matrices(self) -> int:
        """Parameters without the input embedding: those that compute, and that name the sizes."""
        return self.parameters["total"] - self.parameters["embed"]

    def cache_bytes(self, tokens: int, bytes_per_value: int) -> int:
        """Memory of the keys and values of one sequence of so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * bytes_per_value

    def sampling_bytes(self, length: int) -> int:
        """Memory that sampling with all weights takes at least: in bf16, and one row of `length`.

        Three times its keys and values, since a cache may take a third of what is free.
        """
        return 2 * self.parameters["total"] + 3 * self.cache_bytes(length, 2)

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs per token: 6 * (N - embed) + 12 * layers * D * seq_len, N parameters.

        6 = 2 (multiply, add) x 3 (forward, and two products backward). The second term is
        attention, counted in full as most published MFU figures do; a causal kernel does half.
        """
        return 6 * self.matrices + 12 * self.layers * self.d_model * seq_len


# One line per size: the formatter would spread the first one over eleven.
# fmt: off
SIZES: dict[str, ModelConfig] = {
    # Ours, for the laptop.
    "tiny": ModelConfig(layers=4, d_model=96, heads=4, kv_heads=4, ffn=256,
                        vocab=1024, context=128, eos=1000, pad=1001),
    # The ladder: OLMo-core nn/transformer/config.py, olmo2_*. Its names leave out the embedding.
    "14M": ModelConfig(layers=4, d_model=128, heads=8, kv_heads=8, ffn=512),
    "30M": ModelConfig(layers=4, d_model=256, heads=8, kv_heads=8, ffn=768),
    "60M": ModelConfig(layers=8, d_model=384, heads=8, kv_heads=8, ffn=1536),
    "190M": ModelConfig(layers=12, d_model=768, heads=12, kv_heads=12, ffn=3072),
    "370M": ModelConfig(layers=16, d_model=1024, heads=16, kv_heads=16, ffn=4096),
    "760M": ModelConfig(layers=16, d_model=1536, heads=16, kv_heads=16, ffn=6144),
    # Released: paper Table 3 and the official configs.
    "1B": ModelConfig(layers=16, d_model=2048, heads=16, kv_heads=16, ffn=8192),
    "7B": ModelConfig(layers=32, d_model=4096, heads=32, kv_heads=32, ffn=11_008),
    "13B": ModelConfig(layers=40, d_model=5120, heads=40, kv_heads=40, ffn=13_824),
    "32B": ModelConfig(layers=64, d_model=5120, heads=40, kv_heads=8, ffn=27_648),
}
# fmt: on


def nearest_size(shape: ModelConfig) -> str:
    """The size of this shape or, of any other shape, the one that comes nearest in parameters."""

    def distance(name: str) -> float:
        return abs(math.log(SIZES[name].matrices / shape.matrices))

    return min(SIZES, key=distance)


def check_size(size: str, where: str = "") -> str:
    """The size, if there is such a one. Raises UserError; `where` it stood begins the message."""
    if size not in SIZES:
        raise UserError(
            f"{where}unknown size {size!r}{did_you_mean(size, SIZES, cutoff=0.3)} "
            f"(sizes are {', '.join(SIZES)})"
        )
    return size


# ------------------------------------------------------------------------------------------
# config.json

HF_KEYS = {
    "num_hidden_layers": "layers",
    "hidden_size": "d_model",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "ffn",
    "vocab_size": "vocab",
    "max_position_embeddings": "context",
    "eos_token_id": "eos",
    "pad_token_id": "pad",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
}
# What the architecture fixes: with another value it is another model.
FIXED_KEYS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
ABSENT_KEYS = {"rope_type": "default", "quantization_config": None, "sliding_window": None}
ABLATIONS = ("norm_position", "qk_norm", "norm")  # those that change the forward pass


def write_config(path: Path, c: ModelConfig, dtype: torch.dtype) -> None:
    """Write the two config files of a Hugging Face directory."""
    write_json(path / "config.json", hf_config(c, dtype))
    ids = {"bos_token_id": None, "eos_token_id": c.eos, "pad_token_id": c.pad}
    write_json(path / "generation_config.json", {"_from_model_config": True, **ids})


def hf_config(c: ModelConfig, dtype: torch.dtype) -> dict:
    """The content of config.json. An ablated model, which is no Olmo2, gets a type of its own."""
    kind = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    if c.head == "score":  # transformers names its labels
        kind["architectures"] = ["Olmo2ForSequenceClassification"]
        kind |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    ablations = {}
    for key in ABLATIONS:
        value = getattr(c, key)
        if value != getattr(ModelConfig, key):
            ablations[key] = value
    if ablations:
        kind |= {"architectures": ["OLMo2Ablation"], "model_type": "olmo2-ablation"}
    return {
        **kind,
        **{theirs: getattr(c, ours) for theirs, ours in HF_KEYS.items()},
        **FIXED_KEYS,
        "rope_scaling": None,
        **ablations,
        "bos_token_id": None,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_config(folder: Path) -> ModelConfig:
    """Read the config.json of a release, of transformers 4 or 5, or of ours.

    Raises UserError where it describes another model than an OLMo 2.
    """
    path = folder / "config.json"
    hf = read_json(path)
    for key in ("rope_parameters", "rope_scaling"):  # where transformers 5, and 4, keep these
        within = hf.pop(key, None) or {}
        if not isinstance(within, dict):
            raise UserError(f"{path}: expected an object under {key}, got {within!r}")
        hf = within | hf
    if hf.get("model_type") not in MODEL_TYPES:
        raise UserError(f"{path} has model_type {hf.get('model_type')!r}, not 'olmo2'")
    for key, value in (FIXED_KEYS | ABSENT_KEYS).items():
        if hf.get(key, value) != value:
            raise UserError(f"{path} has {key} = {hf[key]!r}; OLMo 2 has {value!r}")
    shape = {ours: hf.get(theirs) for theirs, ours in HF_KEYS.items()}
    if shape["kv_heads"] is None:  # as in transformers: as many as there are heads
        shape["kv_heads"] = shape["heads"]
    for name in ("eos", "pad"):  # none, or several: the tokenizer knows them
        ids = shape[name] if isinstance(shape[name], list) else [shape[name]]
        shape[name] = getattr(ModelConfig, name) if ids in ([], [None]) else ids[0]
    shape |= {key: hf[key] for key in ABLATIONS if key in hf}
    check_shape(path, shape)
    head = "score" if isinstance(hf.get("id2label"), dict) and len(hf["id2label"]) == 1 else "lm"
    return ModelConfig(**shape, head=head)


def check_shape(path: Path, shape: dict, keys: dict[str, str] = HF_KEYS) -> None:
    """Raise UserError that names every value that no model can have, before any is made.

    keys: name in the file -> field of ModelConfig.
    """
    theirs = {ours: name for name, ours in keys.items()}
    problems = []
    for name, kind in typing.get_type_hints(ModelConfig).items():
        if name not in shape:
            continue
        value = shape[name]
        least = 0 if name in ("eos", "pad") else 1
        if value is None:
            problems.append(f"lacks {theirs[name]}")
        elif not is_possible(value, kind, least):
            problems.append(f"has {theirs.get(name, name)} = {value!r}")
    if problems:
        raise UserError(f"{path} {', '.join(problems)}")


def is_possible(value, kind: type, least: int) -> bool:
    """Is a value of the kind that a field of ModelConfig has? least: of whole numbers."""
    if kind is bool:
        return type(value) is bool
    if kind is int:
        return type(value) is int and least <= value < 2**31
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value) and value > 0
    return value in typing.get_args(kind)
