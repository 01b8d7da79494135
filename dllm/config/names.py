"""Values of settings that several places share. Nothing here imports torch."""

from typing import Literal

Schedules = Literal["linear", "cosine", "polynomial", "square", "cube"]  # of diffusion/corruption.py
LayersBackend = Literal["auto", "torch", "liger"]  # of `Transformer.layers_backend`
