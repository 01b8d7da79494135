"""python -m benchmarks.attention_choices [--device cuda]: time every backend of attention that runs on this machine.

Prints the times of each kind of call, and a line for dllm_kernels/attention/choices.py. Heads of Qwen2.5-0.5B and 7B;
bf16 on a GPU, fp32 on one thread on a CPU; forward and backward, except for decoding, which has no backward. Packed
documents have many lengths. Backends run in turns; the fastest call of each counts.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator

import cpuinfo
import torch

from benchmarks.device import mixed_ends
from dllm_kernels import bidirectional_attention, bidirectional_attention_varlen, block_diffusion_attention
from dllm_kernels.attention import BACKENDS

HEADS = [(14, 2, 64), (28, 4, 128)]  # Hq, Hkv, E


def cases(device: str, B: int, L: int, dtype: torch.dtype) -> Iterator[tuple[str, str, Callable, list]]:
    """Yields kind, operation, a call of it that takes (q, k, v, backend=), and [q, k, v]."""
    for Hq, Hkv, E in HEADS:
        def heads(*shape, Hq=Hq, Hkv=Hkv, E=E):
            return [torch.randn(*shape, H, E, device=device, dtype=dtype) for H in (Hq, Hkv, Hkv)]

        q, k, v = heads(B, L)
        padded = torch.arange(L, device=device) < torch.linspace(L // 2, L, B, device=device).unsqueeze(1)
        ends = mixed_ends(B * L, L // 4, device)

        def mask(q, k, v, backend, padded=padded):
            return bidirectional_attention(q, k, v, key_mask=padded, backend=backend)

        def pack(q, k, v, backend, ends=ends, longest=L // 4):
            return bidirectional_attention_varlen(q, k, v, ends, longest, backend=backend)

        def diffuse(q, k, v, backend):
            return block_diffusion_attention(q, k, v, 32, backend=backend)

        yield "dense", "bidirectional_attention", bidirectional_attention, [q, k, v]
        yield "dense", "bidirectional_attention", mask, [q, k, v]
        yield "decoding", "bidirectional_attention", bidirectional_attention, [q[:, :32], k, v]
        yield "packed", "bidirectional_attention_varlen", pack, [x.flatten(0, 1) for x in (q, k, v)]
        yield "block_diffusion", "block_diffusion_attention", diffuse, heads(B, 2 * L)


def step(attend: Callable, heads: list, name: str, backward: bool) -> Callable[[], None]:
    def call():
        out = attend(*heads, backend=name)
        if backward:
            torch.autograd.grad(out, heads, out.detach())

    return call


def fastest(calls: dict[str, Callable], rounds: int, finish: Callable[[], None]) -> dict[str, float]:
    """Seconds of the fastest call of each; the calls run in turns."""
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds + 1):  # the first round compiles
        for name, call in calls.items():
            finish()
            start = time.perf_counter()
            call()
            finish()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, help="B; 8 on a GPU, 1 on a CPU")
    parser.add_argument("--length", type=int, help="positions of a row; 4,096 on a GPU, 1,024 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    gpu = options.device == "cuda"
    finish, dtype = (torch.cuda.synchronize, torch.bfloat16) if gpu else (lambda: None, torch.float32)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = "sm_{}{}".format(*torch.cuda.get_device_capability()) if gpu else "cpu"
    name = torch.cuda.get_device_name() if gpu else cpuinfo.get_cpu_info()["brand_raw"]
    logarithms: dict[str, dict[str, float]] = {}
    for kind, op, attend, heads in cases(options.device, options.rows or (8 if gpu else 1),
                                         options.length or (4096 if gpu else 1024), dtype):
        heads = [x.detach().requires_grad_(kind != "decoding") for x in heads]
        calls = {backend.name: step(attend, heads, backend.name, kind != "decoding") for backend in BACKENDS[op]
                 if backend.missing() is None and backend.refuses(heads[0]) is None
                 and not (gpu and backend.name == "reference")}  # the reference's scores do not fit into the memory
        times = fastest(calls, options.rounds, finish)
        print(f"# {kind}, heads {heads[0].shape[-2]}, {heads[1].shape[-2]} of {heads[0].shape[-1]}: "
              + ", ".join(f"{backend} {1e3 * seconds:.3f} ms" for backend, seconds in times.items()), flush=True)
        for backend, seconds in times.items():
            ratios = logarithms.setdefault(kind, {})
            ratios[backend] = ratios.get(backend, 0.0) + math.log(seconds / min(times.values()))
    for kind, ratios in logarithms.items():
        order = tuple(sorted(ratios, key=ratios.get))
        print(f'    ("{machine}", "{kind}"): Choice({order!r}, "{name}, torch {torch.__version__}"),')


if __name__ == "__main__":
    main()
