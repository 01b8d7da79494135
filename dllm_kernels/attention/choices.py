"""The order in which backends of attention are tried, by machine and kind of call: data, with their measurements.

Kinds: "dense" (bidirectional_attention, masked or not), "decoding" (the same, at most 64 queries and more keys),
"packed" (bidirectional_attention_varlen), "block_diffusion". `python -m benchmarks.attention_choices` measures the
backends that run on a machine and prints lines for this file.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..dispatch import Backend


class Choice(NamedTuple):
    order: tuple[str, ...]  # backends; those that are not named come last
    source: str  # machine, versions, measurement


ON_CPU = ("python -m benchmarks.attention_choices, AMD EPYC with AVX-512 (family 26), one thread, torch 2.13.0+cpu: "
          "in fp32 sdpa is 1.4 to 23 times as fast as reference")
UNMEASURED = "not measured: PyTorch's own first"
PACKED_UNMEASURED = ("not measured: PyTorch's own first, above all its FlashAttention, one launch; sdpa waits for the "
                     "lengths and launches once for each")
BLOCK_DIFFUSION_UNMEASURED = ("not measured but counted: for 4,096 positions in blocks of 32, sdpa takes some 700 "
                              "launches forward, and waits for the lengths of packed documents; triton takes one")
DECODING_COUNTED = ("not measured but counted: ours read a key once for the query heads that share it, sdpa once for "
                    "each, and a new length costs sdpa's cuDNN a new graph")
CHOICES = {  # by machine ("cpu", "sm_90" and so on, or any "cuda") and kind
    **{("cpu", kind): Choice(("sdpa", "reference"), ON_CPU)
       for kind in ("dense", "decoding", "packed", "block_diffusion")},
    ("cuda", "dense"): Choice(("sdpa", "triton", "reference"), UNMEASURED),
    ("cuda", "decoding"): Choice(("sdpa", "triton", "cuda", "reference"), UNMEASURED),
    ("sm_90", "decoding"): Choice(("cuda", "triton", "sdpa", "reference"), DECODING_COUNTED),
    ("cuda", "packed"): Choice(("torch_varlen", "sdpa", "triton", "flash_attn", "reference"), PACKED_UNMEASURED),
    ("cuda", "block_diffusion"): Choice(("triton", "sdpa", "reference"), BLOCK_DIFFUSION_UNMEASURED),
}


def preferred(kind: str, device: torch.device) -> Callable[[Backend], int]:
    """A key to sort backends by: their place in the machine's own line, else in that of its type."""
    machines = [device.type]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        machines.insert(0, f"sm_{major}{minor}")
    order = next((CHOICES[machine, kind].order for machine in machines if (machine, kind) in CHOICES), ())
    return lambda backend: order.index(backend.name) if backend.name in order else len(order)
