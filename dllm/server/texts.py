"""Translate the fields of a request into tokens and settings, and the tokens of a gap into text."""

import functools
import inspect
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dllm.config.fields import check_kind, settings_of
from dllm.constraints import Regex, json_schema
from dllm.errors import UserError, first_line
from dllm.generation.checks import find_mask_token
from dllm.generation.config import MDMGenerationConfig
from dllm.model.tokenizer import (
    anchor,
    begin_text,
    decode_after,
    encode,
    encode_rendered,
    end_token_ids,
    frame,
    protect,
)
from dllm.model.transformer import Transformer
from dllm.server.scheduler import Progress, give_way

# Settings that a request may choose under `diffusion`. The server chooses the others, or OpenAI has a field for them.
CHOICES = tuple(name for name, its in settings_of(MDMGenerationConfig).items() if its.per_request)
ANY_JSON = {"type": "object"}
MAX_PATTERN = 20_000  # characters of a regular expression or schema


class Texts:
    """Tokenises and constrains for one model."""

    def __init__(self, model: Transformer, tokenizer, defaults: MDMGenerationConfig):
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        self.constraint = functools.lru_cache(maxsize=16)(self._constraint)

    def encode(self, text: str, *, after: bool = False) -> torch.Tensor:
        return encode(self.tokenizer, text, after=after) if text else torch.empty(0, dtype=torch.long)

    def begin(self, prefix: torch.Tensor) -> torch.Tensor:
        return begin_text(self.tokenizer, prefix)

    def anchor(self, prefix: torch.Tensor) -> torch.Tensor:
        return anchor(self.tokenizer, prefix)

    def frame(self, before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return frame(self.tokenizer, before, after)

    def render(self, messages: Sequence[dict], documents: list[dict] | None = None,
               variables: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Tokens of a conversation, up to where the answer begins.

        variables: of the template, such as Qwen3's enable_thinking.

        Raises: UserError if the checkpoint has no chat template, or its template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise UserError("this model has no chat template, so it was not trained on conversations; use "
                            "/v1/completions")
        values = protect(self.tokenizer, {"documents": documents, **(variables or {})})
        arguments = inspect.signature(self.tokenizer.apply_chat_template).parameters
        if other := sorted(arguments.keys() & (variables or {}).keys()):  # among them a template, which is a program
            raise UserError(f"chat_template_kwargs sets variables of the template, and {other[0]} is none")
        try:
            text = self.tokenizer.apply_chat_template(protect(self.tokenizer, messages), tokenize=False,
                                                      add_generation_prompt=True, **values)
        except Exception as error:  # templates raise what they like
            raise UserError(f"the model's chat template refuses the messages: {first_line(error)}") from None
        return encode_rendered(self.tokenizer, text)

    def config(self, *, max_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None,
               copies: int, pattern: tuple[str, str] | None, choices: dict[str, Any],
               edits: bool = False) -> MDMGenerationConfig:
        """The server's settings, overridden by the request's.

        pattern: ("regex" or "schema", its text), which the new text must match.
        edits: by the model's edits, whatever the server's method.
        Raises: UserError naming the field.
        """
        unknown = sorted(set(choices) - set(CHOICES))
        if unknown:
            raise UserError(f"diffusion has no field {unknown[0]}; there are {', '.join(CHOICES)}, length and seed")
        wanted = settings_of(MDMGenerationConfig)
        choices = {name: value for name, value in choices.items() if value is not None or wanted[name].optional}
        for name, value in choices.items():
            check_kind(f"diffusion.{name}", value, wanted[name])
        given = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        given = {name: value for name, value in given.items() if value is not None}
        config = replace(
            self.defaults.for_edits() if edits else self.defaults, **given, **choices,
            seed=secrets.randbelow(2**31) if seed is None else seed, num_return_sequences=copies, output_history=False,
            constraint=None if pattern is None else self.constraint(*pattern))
        return replace(config, stop_at_eos=bool(self.model.end_token_ids) and not config.edits)

    def _constraint(self, kind: str, text: str) -> Regex:
        if len(text) > MAX_PATTERN:
            raise UserError(f"the {kind} has {len(text)} characters, at most {MAX_PATTERN} are allowed")
        make = Regex if kind == "regex" else json_schema
        # The automaton is built by the scheduler, between the steps of others.
        return make(text, self.tokenizer, self.model.config.vocab_size, ends=sorted(self.ends), pause=give_way)

    def decode(self, before: torch.Tensor, tokens: Sequence[int]) -> str:
        """The text of tokens that follow the tokens `before`."""
        # Four tokens are enough, because a character has at most four bytes and a token at least one.
        return decode_after(self.tokenizer, before[-4:], torch.tensor(tokens, dtype=torch.long))

    @property
    def mask_token_id(self) -> int:
        return find_mask_token(self.model, self.defaults)

    def tokens_of(self, stops: Sequence[str]) -> set[int]:
        """The special tokens that stop strings name, which no decoded text shows."""
        special = {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()}
        return {special[stop] for stop in stops if stop in special}

    @functools.cached_property
    def ends(self) -> set[int]:
        return {*self.model.end_token_ids, *end_token_ids(self.tokenizer)}


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """The index at which the first stop string begins; None without one."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return min(places, default=None)


class Answer:
    """A text as it grows: the part that is certain, and at the end the reason why it stopped.

    fills: the text is whole, because it fills a gap or matches a pattern; otherwise its length may cut it.
    rewrites: committed tokens may change, so nothing is certain before the end.
    """

    def __init__(self, texts: Texts, before: torch.Tensor, stops: Sequence[str], limit: int, fills: bool,
                 rewrites: bool):
        self.texts, self.before, self.stops, self.limit, self.fills = texts, before, stops, limit, fills
        self.rewrites = rewrites
        self.text, self.finish_reason = "", None
        self.tokens = 0
        self.progress: Progress | None = None
        self.stop_tokens = texts.tokens_of(stops)
        self.ends = texts.ends | self.stop_tokens

    def update(self, progress: Progress) -> str:
        """Take in a step. Returns the text that has become certain since the last one."""
        self.progress = progress
        if self.rewrites and not progress.done:
            return ""
        tokens = progress.tokens[:self.limit]
        whole = self._until_mask(tokens)
        ended = next((place for place, token in enumerate(whole) if token in self.ends), None)
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
            cut = len(progress.tokens) >= self.limit and not self.fills and ended is None and stop is None
            self.finish_reason = "length" if cut else "stop"
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
            elif token in self.ends:
                break
            else:
                slots.append((self.texts.decode(self.before[:0], [token]),
                              round(confidence, 4) if confidence > float("-inf") else None))
        return slots

    def complete(self, tokens: list[int]) -> bool:
        """Whether these first tokens of a text already hold a stop string, or a token that one names."""
        tokens = tokens[:self.limit]
        return not self.rewrites and (not self.stop_tokens.isdisjoint(tokens)
                                      or find_stop(self.texts.decode(self.before, tokens), self.stops) is not None)

    def _until_mask(self, tokens: list[int]) -> list[int]:
        mask = self.texts.mask_token_id
        return tokens[:tokens.index(mask)] if mask in tokens and not self.progress.done else \
            [token for token in tokens if token != mask]
