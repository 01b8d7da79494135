"""DiffusionLM: the Transformer, and what users do with it: generate, infill, bound the likelihood of a text."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dllm.errors import UserError
from dllm.evaluators.edit_likelihood import EditLikelihood, bound_edits
from dllm.evaluators.likelihood import Likelihood, bound_likelihood
from dllm.generation import infilling, sampler
from dllm.generation.canvas import fit_folder_settings
from dllm.generation.config import MDMGenerationConfig, published_settings
from dllm.generation.inputs import read_mask, read_prompts
from dllm.generation.output import GenerationOutput
from dllm.generation.renoising import Renoising
from dllm.generation.sampler import Denoising
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.loading import is_diffusion_gemma
from dllm.model.transformer import ModelOutput, Transformer
from dllm.model.weights import find_model


class _Uses:
    """What users do with a model of either kind.

    Prompts are token ids as tensors, arrays, lists or a tokenizer's output. Settings are a `generation_config`, keyword
    arguments that override it, or both; without a generation_config, the folder's generation_config.json gives what the
    arguments do not, its max_new_tokens cut to what fits after the prompt. A TypeError names a setting that there is
    not.
    """

    def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> ModelOutput:
        """Logits [B, L, V] of token ids in any form of a prompt; see `Transformer.forward`.

        Tensors on a GPU are taken as they are, because to check them would wait for it. token_type_ids, which some
        tokenizers give, change nothing.
        """
        if not (isinstance(input_ids, Tensor) and input_ids.is_cuda):
            input_ids, attention_mask = read_prompts(self, input_ids, attention_mask, name="input_ids")
        return super().forward(input_ids, attention_mask)

    def diffusion_generate(self, inputs: Any = None, attention_mask: Any = None,
                           generation_config: MDMGenerationConfig | None = None, **settings) -> GenerationOutput:
        """Append `max_new_tokens` masked positions to each prompt and denoise them; see `sampler.generate`."""
        return sampler.generate(self, *read_call(self, inputs, attention_mask, generation_config, settings))

    def diffusion_steps(self, inputs: Any = None, attention_mask: Any = None,
                        generation_config: MDMGenerationConfig | None = None, **settings) -> Denoising | Renoising:
        """`diffusion_generate` one denoising step at a time: `for step in model.diffusion_steps(ids)`."""
        return sampler.start(self, *read_call(self, inputs, attention_mask, generation_config, settings))

    def infill(self, prefix_ids: Any, suffix_ids: Any, *, length: int | str,
               generation_config: MDMGenerationConfig | None = None, **settings) -> GenerationOutput:
        """Denoise `length` masked positions between a prefix and a suffix; see `generation.infilling.infill`."""
        return infilling.infill(self, prefix_ids, suffix_ids, length=length,
                                generation_config=read_settings(self, generation_config, settings))

    def edit(self, input_ids: Any, attention_mask: Any = None, *, editable: Any = None,
             generation_config: MDMGenerationConfig | None = None, **settings) -> GenerationOutput:
        """Edit texts: insert, delete and substitute tokens by a model with heads for edits (Edit Flows).

        Args:
            input_ids, attention_mask: [B, L] or [L]; see `inputs.read_prompts`.
            editable: [B, L], one where a token may change and others be inserted after it; None: all but each row's
                first. max_new_tokens is how many tokens a text may grow by.
        Returns: sequences [B, L'], padded on the right; attention_mask says where each row ends.
        Raises: UserError if the model has no such heads, or there is nothing to edit.
        """
        ids, mask = read_prompts(self, input_ids, attention_mask, name="input_ids")
        config = read_settings(self, generation_config, {"alg": "edit", **settings})
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        may = real & (real.cumsum(1) > 1) if editable is None else read_mask(
            editable, ids, "input_ids", "editable", "where a token may change and zero elsewhere").to(ids.device)
        if not may.any(1).all():
            raise UserError("there is nothing to edit: a text has no token that may change after its first; to write "
                            "one, use diffusion_generate")
        return sampler.finish(Denoising(self, ids, config, mask, editable=may))

    def perplexity_bound(self, input_ids: Any, attention_mask: Any = None, **settings) -> Likelihood:
        """Bound the negative log-likelihood of sequences; see `evaluators.likelihood.bound_likelihood`."""
        return bound_likelihood(self, *read_prompts(self, input_ids, attention_mask, name="input_ids"), **settings)

    def edit_bound(self, input_ids: Any, attention_mask: Any = None, **settings) -> EditLikelihood:
        """Bound the likelihood of texts written by insertions, up to a cut; see `evaluators.edit_likelihood`."""
        return bound_edits(self, input_ids, attention_mask, **settings)

    def _mdm_sample(self, x: Tensor, attention_mask: Tensor | None = None,
                    generation_config: MDMGenerationConfig | None = None) -> GenerationOutput:
        """Fill the masked positions of x; Open-dLLM's evaluation of infilling calls it by this name."""
        x, attention_mask = read_prompts(self, x, attention_mask, name="x")
        return sampler.denoise(self, x, read_settings(self, generation_config, {}), attention_mask)


class DiffusionLM(_Uses, Transformer):
    """A masked diffusion language model. `from_pretrained` loads a published or a trained one."""

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, *args, **arguments):
        """`Transformer.from_pretrained`, with the same arguments; a folder of DiffusionGemma gives a `GemmaLM`."""
        folder = find_model(path_or_hub_id)
        if is_diffusion_gemma(folder):
            return GemmaLM.from_pretrained(folder, *args, **arguments)
        return super().from_pretrained(folder, *args, **arguments)


class GemmaLM(_Uses, DiffusionGemma):
    """DiffusionGemma, which writes canvas after canvas from random words; see `DiffusionGemma.from_pretrained`."""


def read_call(model: Transformer, inputs: Any, attention_mask: Any, config: Any, settings: dict[str, Any]):
    """Inputs, attention mask and settings of a call in any of its published forms.

    Open-dLLM's and Dream's second argument is the config; input_ids is Transformers' name for inputs.
    """
    if isinstance(attention_mask, MDMGenerationConfig) and config is None:
        attention_mask, config = None, attention_mask
    if "input_ids" in settings and inputs is None:  # **tokenizer(...)
        inputs = settings.pop("input_ids")
        settings.pop("token_type_ids", None)
    chosen = read_settings(model, config, settings)
    if model.generation_defaults and not isinstance(config, MDMGenerationConfig):
        inputs, attention_mask = read_prompts(model, inputs, attention_mask)
        chosen = fit_folder_settings(model, chosen, {**(config or {}), **settings}, inputs.shape[1])
    return inputs, attention_mask, chosen


def read_settings(model: Transformer, config: Any, settings: Mapping[str, Any]) -> MDMGenerationConfig:
    if isinstance(config, Mapping):
        config, settings = None, {**config, **settings}
    if not isinstance(config, MDMGenerationConfig | None):
        raise UserError(f"generation_config must be an MDMGenerationConfig, not {type(config).__name__}")
    if config is None:
        greedy = {"do_sample": False} if settings.get("do_sample") is False else {}
        settings = {**published_settings({**(model.generation_defaults or {}), **greedy}), **settings}
        config = MDMGenerationConfig()
    return config.changed(settings)
