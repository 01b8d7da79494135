"""Tiles of the Triton kernels that measured faster on an architecture than those in their modules.

Data: no kernel is tuned when it runs. `python -m benchmarks.tune` measures on the GPU at hand and rewrites this file.
"""

import torch

# (architecture, operation, shape class, kernel) -> settings, and the machine that measured them. A shape class is the
# bytes per number and, for attention, the head size.
TILES: dict[tuple, tuple[dict[str, int], str]] = {
}


def architecture() -> str | None:
    """The current GPU's, such as "sm_90" or "gfx942"; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def apply(operation: str, tiles: dict) -> dict:
    """`tiles`, shape class -> kernel -> settings, updated by the measurements on this architecture."""
    here = architecture()
    for (where, name, shape, kernel), (settings, _) in TILES.items():
        if (where, name) == (here, operation) and shape in tiles:
            tiles[shape] = tiles[shape] | {kernel: tiles[shape][kernel] | settings}
    return tiles
