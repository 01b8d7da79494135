"""Names that settings of training and of generation share. Nothing here imports torch."""

from typing import Literal

# Of diffusion/corruption.py: how the share of masked tokens depends on time.
Schedules = Literal["linear", "cosine", "polynomial", "square", "cube"]
