"""GPUs by name: how fast they compute, what they hold, how fast they reach their neighbours."""

from dataclasses import dataclass

from infra.files import UserError, did_you_mean


@dataclass(frozen=True)
class GPU:
    """What one GPU can do at most."""

    peak: float  # dense bf16, FLOP/s
    memory: float  # GiB
    link: float  # bytes/s that it sends to the other GPUs of its node


# Peak and link: the vendors' data sheets. These give the sum of both directions of a link (900 GB/s
# of NVLink for the H100, 64 GB/s of PCIe for the L40S), so half of it stands here. Without NVLink
# it is PCIe; bridges between two cards do not count, since a group of ranks is as fast as its
# slowest link. Memory: what torch reports ("total capacity" in its errors), a little less than the
# sheets say; the sheets' own, in GiB, for L4, A10, H100 NVL, GH200 and MI250X (a half of one).
GPUS = {
    "H100": GPU(peak=989e12, memory=79.2, link=450e9),
    "H100 PCIe": GPU(peak=756e12, memory=79.2, link=64e9),
    "H100 NVL": GPU(peak=835e12, memory=87.5, link=64e9),
    "H200": GPU(peak=989e12, memory=139.8, link=450e9),
    "GH200": GPU(peak=989e12, memory=89.4, link=450e9),
    "B200": GPU(peak=2250e12, memory=178.3, link=900e9),
    "A100": GPU(peak=312e12, memory=79.2, link=300e9),
    "A100 40GB": GPU(peak=312e12, memory=39.4, link=300e9),
    "L40S": GPU(peak=362e12, memory=44.5, link=32e9),
    "L4": GPU(peak=121e12, memory=22.4, link=32e9),
    "A10": GPU(peak=125e12, memory=22.4, link=32e9),
    "RTX 4090": GPU(peak=165e12, memory=23.5, link=32e9),
    "RTX 3090": GPU(peak=71e12, memory=23.6, link=32e9),
    "MI300X": GPU(peak=1307e12, memory=191.7, link=448e9),
    "MI250X": GPU(peak=191.5e12, memory=64.0, link=200e9),
}


def find_gpu(device_name: str) -> GPU | None:
    """The GPU of a name that the driver gives; the longest name of ours in it wins.

    >>> find_gpu("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    True
    >>> find_gpu("NVIDIA A100-SXM4-40GB") is GPUS["A100 40GB"]
    True
    """
    words = set(device_name.replace("-", " ").split())
    known = [name for name in GPUS if words.issuperset(name.split())]
    longest = max(known, key=len, default="")
    return GPUS.get(longest)


def named_gpu(name: str) -> GPU:
    """The GPU that --gpu names. Raises UserError."""
    for known, gpu in GPUS.items():
        if known.upper() == name.upper():
            return gpu
    hint = did_you_mean(name.upper(), GPUS)
    known = ", ".join(GPUS)
    raise UserError(f"--gpu {name} is not known{hint}: name one of {known} (infra/gpus.py)")
