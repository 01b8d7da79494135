"""The settings of evaluations; flags of `dllm eval` derive from them. Nothing here imports torch."""

from dataclasses import dataclass, replace
from typing import Literal

from dllm.config.fields import check, require, setting
from dllm.errors import UserError
from dllm.evaluators.code.presets import PRESETS, Preset
from dllm.generation.config import DEFAULT_STEPS, MDMGenerationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutSettings:
    """The held-out windows that are scored, and the number of their corruptions."""

    max_seq_len: int = setting(512, "tokens of a window; the windows of a document do not see each other", at_least=2)
    windows: int | None = setting(256, "windows scored at most, drawn evenly from all", at_least=1, none="all")
    samples: int = setting(4, "corrupted copies of each window", at_least=1)
    shares: tuple[float, ...] = setting((0.15, 0.5), "corrupted shares of a window, separated by commas", above=0,
                                        at_most=1)
    batch_tokens: int = setting(16384, "positions of one forward pass; only speed and memory depend on it", at_least=1)
    seed: int = setting(0, "seed of windows and corruption")

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class InfillingSettings:
    """Lines or words to fill in, their context, and their decoding."""

    hide: Literal["line", "word"] = setting("line", "what is hidden of a function: a line, or a word of one")
    lines: int = setting(100, "lines or words to fill in", at_least=1)
    max_seq_len: int = setting(512, "tokens of the window around the line", at_least=2)
    max_line_tokens: int = setting(64, "tokens of a line at most; longer ones are not drawn", at_least=1)
    # One position a step, the surest first. A schedule of steps would fill the last two of a block together. `seed`
    # replaces its own.
    generation: MDMGenerationConfig = MDMGenerationConfig(alg="maskgit_plus", threshold=1.0)
    batch_tokens: int = setting(16384, "positions of one forward pass; only speed and memory depend on it", at_least=1)
    seed: int = setting(0, "seed of the lines drawn")

    def __post_init__(self):
        check(self)
        require("max_seq_len", self.max_seq_len, self.max_seq_len > self.max_line_tokens,
                f"above max_line_tokens {self.max_line_tokens}, to leave room around a line")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """A run of a code benchmark. A field that is None takes the preset's value."""

    preset: Literal["open_dllm", "llada", "dream", "dreamon", "mask_dfm", "diffusion_gemma"] = setting(
        "open_dllm", "the published system whose settings hold where no flag says otherwise")
    samples: int | None = setting(None, "samples of each task", at_least=1, none="the preset's")
    batch_size: int = setting(16, "texts denoised together", at_least=1)
    limit: int | None = setting(None, "only the first N tasks", at_least=1, none="all")
    length: int | str | None = None  # length of a gap, see `Preset`
    generation: dict | None = None  # fields of MDMGenerationConfig, over the preset's
    seed: int = 0  # seed of the generation

    def __post_init__(self):
        check(self)
        fixed = isinstance(self.length, int) and self.length >= 1
        require("length", self.length, fixed or self.length in (None, "oracle", "average", "auto"),
                "a number of tokens, oracle, average or auto")

    def resolve(self, infills: bool) -> tuple[Preset, MDMGenerationConfig]:
        """The preset with these settings over it, and how it generates."""
        preset = PRESETS[self.preset]["infill" if infills else "completion"]
        if not infills and self.length is not None:
            raise UserError("length is for tasks with a gap; give max_new_tokens")
        length = preset.length if self.length is None else self.length
        preset = replace(preset, samples=self.samples or preset.samples, length=length if infills else None)
        given = self.generation or {}
        config = MDMGenerationConfig(**{**preset.generation, **given, "seed": self.seed})
        if "steps" not in given and config.block_length is not None:  # the preset's steps may not fit these blocks
            blocks = -(-config.max_new_tokens // config.block_length)
            config = replace(config, steps=DEFAULT_STEPS if infills else -(-config.steps // blocks) * blocks)
        return preset, config
