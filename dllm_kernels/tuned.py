"""Tiles of the Triton kernels that have been measured to be faster on an architecture than those in their modules.

Data: nothing is tried out when a kernel runs. `python -m benchmarks.tune` measures on the GPU at hand and rewrites it.
"""

import torch

# (architecture, operation, shape class, kernel) -> settings, and where they were measured. Shape classes: bytes per
# number and, of attention, the head size.
TILES: dict[tuple, tuple[dict[str, int], str]] = {
}


def architecture() -> str | None:
    """That of the current GPU, as "sm_90" or "gfx942"; None without one."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def apply(operation: str, tiles: dict) -> dict:
    """`tiles`, shape class -> kernel -> settings, with what was measured on this architecture."""
    here = architecture()
    for (where, name, shape, kernel), (settings, _) in TILES.items():
        if (where, name) == (here, operation):
            tiles[shape] = tiles[shape] | {kernel: tiles[shape][kernel] | settings}
    return tiles
