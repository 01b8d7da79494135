"""From the fields of a request to a gap between two texts, and from the tokens in the gap to text."""

import functools
import re
import secrets
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from dllm.constraints import Regex, json_schema
from dllm.errors import UserError
from dllm.model import DiffusionLM
from dllm.sampler import MDMGenerationConfig
from dllm.server.scheduler import Progress
from dllm.tokenizer import decode_after, encode

# Of `MDMGenerationConfig`, what a request may choose under `diffusion`; the rest is the server's, or has a field of
# OpenAI's.
CHOICES = ("steps", "alg", "alg_temp", "top_k", "block_length", "remasking", "schedule", "threshold", "factor",
           "editing_threshold", "max_post_steps", "remask_rate", "cfg_scale", "cache", "expand_token_id")
ANY_JSON = {"type": "object"}
MAX_PATTERN = 2_000  # characters of a regular expression or schema: an automaton grows faster than its text


class Texts:
    """Tokenises and constrains for one model."""

    def __init__(self, model: DiffusionLM, tokenizer, defaults: MDMGenerationConfig):
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        self.constraint = functools.lru_cache(maxsize=32)(self._constraint)

    def encode(self, text: str) -> torch.Tensor:
        return encode(self.tokenizer, text) if text else torch.empty(0, dtype=torch.long)

    def render(self, messages: Sequence[dict]) -> torch.Tensor:
        """The tokens of a conversation, up to where the answer begins.

        Raises: UserError if the checkpoint has no chat template, or its template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise UserError("this model has no chat template, so it was not trained on conversations; use "
                            "/v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise UserError(f"the model's chat template refuses the messages: {str(error).splitlines()[0]}") from None
        return self.encode(text)

    def config(self, *, max_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None,
               copies: int, pattern: tuple[str, str] | None, choices: dict[str, Any]) -> MDMGenerationConfig:
        """The server's settings with the request's.

        pattern: ("regex" or "schema", its text), what the new text must be.
        Raises: UserError naming the field.
        """
        unknown = sorted(set(choices) - set(CHOICES))
        if unknown:
            raise UserError(f"diffusion has no field {unknown[0]}; there are {', '.join(CHOICES)}, length and seed")
        wanted = {field.name: field.type for field in fields(MDMGenerationConfig)}
        for name, value in choices.items():
            kind = str if "str" in str(wanted[name]) else (int, float)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise UserError(f"diffusion.{name} must be {'text' if kind is str else 'a number'}, not {value!r}")
            if isinstance(value, float) and "float" not in str(wanted[name]):
                raise UserError(f"diffusion.{name} must be a whole number, not {value!r}")
        given = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        return replace(
            self.defaults, **{name: value for name, value in given.items() if value is not None}, **choices,
            seed=secrets.randbelow(2**31) if seed is None else seed, num_return_sequences=copies, output_history=False,
            stop_at_eos=self.model.config.eos_token_id is not None,
            constraint=None if pattern is None else self.constraint(*pattern))

    def _constraint(self, kind: str, text: str) -> Regex:
        if len(text) > MAX_PATTERN:
            raise UserError(f"the {kind} has {len(text)} characters, at most {MAX_PATTERN} are allowed")
        if kind == "regex" and re.search(r"\{\d{4,}|\}\s*\)?\s*[{*+]", text):
            raise UserError("the regex repeats a repetition, or more than 999 times; write a smaller one")
        make = Regex if kind == "regex" else json_schema
        return make(text, self.tokenizer, self.model.config.vocab_size)

    def gap(self, config: MDMGenerationConfig) -> int:
        """Masked positions for `max_new_tokens` tokens: whole blocks, if they are counted from the first one on."""
        block = config.block_length
        causal = self.model.config.block_causal if config.block_causal is None else config.block_causal
        if block is None or causal or config.blocks_from == "text":
            return config.max_new_tokens
        return -(-config.max_new_tokens // block) * block

    def decode(self, before: torch.Tensor, tokens: Sequence[int]) -> str:
        """The text of tokens as it reads after others."""
        # Four are enough: a character is of at most four bytes, one a token.
        return decode_after(self.tokenizer, before[-4:], torch.tensor(tokens, dtype=torch.long))

    @property
    def mask_token_id(self) -> int:
        return self.defaults.mask_token_id if self.defaults.mask_token_id is not None else self.model.mask_token_id

    @functools.cached_property
    def ends(self) -> set[int]:
        named = self.model.config.eos_token_id
        named = named if isinstance(named, list) else [named]
        return {number for number in (*named, self.tokenizer.eos_token_id) if number is not None}


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return min(places, default=None)


class Answer:
    """One text as it grows: what of it is certain, and in the end why it stopped.

    fills: whether it stands in a gap, which is filled whole, or may end where the model or a stop string says.
    rewrites: whether committed tokens may change: then nothing is certain before the end.
    """

    def __init__(self, texts: Texts, before: torch.Tensor, stops: Sequence[str], limit: int, fills: bool,
                 rewrites: bool):
        self.texts, self.before, self.stops, self.limit, self.fills = texts, before, stops, limit, fills
        self.rewrites = rewrites
        self.text, self.finish_reason = "", None
        self.tokens = 0
        self.progress: Progress | None = None

    def update(self, progress: Progress) -> str:
        """Take in a step; what can be told since the last one."""
        self.progress = progress
        if self.rewrites and not progress.done:
            return ""
        tokens = progress.tokens[:self.limit]
        whole = self._until_mask(tokens)
        ended = next((place for place, token in enumerate(whole) if token in self.texts.ends), None)
        ready = whole if ended is None else whole[:ended]
        text = self.texts.decode(self.before, ready)
        stop = find_stop(text, self.stops)
        if stop is not None:
            text = text[:stop]
        complete = progress.done or ended is not None or stop is not None
        if not complete:  # the last character may be incomplete, and a stop string may have begun
            text = text.rstrip("\ufffd")
            held = max((len(stop) for stop in self.stops), default=1) - 1
            text = text[:len(text) - held]
        if progress.done:
            self.tokens = len(ready)
            self.finish_reason = "stop" if self.fills or ended is not None or stop is not None else "length"
        new = text[len(self.text):] if text.startswith(self.text) else ""
        self.text += new
        return new

    def draft(self) -> list[tuple[str | None, float | None]]:
        """The canvas token by token: text and confidence; None where it is masked."""
        shown, confidences = self.progress.tokens[:self.limit], self.progress.confidence
        slots = []
        for token, confidence in zip(shown, confidences, strict=False):
            if token == self.texts.mask_token_id:
                slots.append((None, None))
            elif token in self.texts.ends:
                break
            else:
                slots.append((self.texts.decode(self.before[:0], [token]),
                              round(confidence, 4) if confidence > float("-inf") else None))
        return slots

    def complete(self, tokens: list[int]) -> bool:
        """Whether a text that begins so is complete by a stop string."""
        return not self.rewrites and find_stop(self.texts.decode(self.before, tokens[:self.limit]),
                                               self.stops) is not None

    def _until_mask(self, tokens: list[int]) -> list[int]:
        mask = self.texts.mask_token_id
        return tokens[:tokens.index(mask)] if mask in tokens and not self.progress.done else \
            [token for token in tokens if token != mask]
