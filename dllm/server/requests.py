"""The bodies of requests, their checks, and the plan of denoising that follows from one."""

import asyncio
import json
import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from dllm.errors import UserError
from dllm.generation.canvas import block_of_gap, block_of_text, fit_new_tokens, positions_of, round_up
from dllm.generation.checks import check_prompts, check_renoising
from dllm.generation.config import DEFAULT_STEPS, MDMGenerationConfig
from dllm.model.transformer import Transformer
from dllm.server.guard import RequestError
from dllm.server.limits import ServerLimits
from dllm.server.texts import ANY_JSON, Texts

# Fields of OpenAI's and of other servers that ask for what we lack, or say in another place what we have.
LACKING = ("frequency_penalty", "presence_penalty", "logit_bias", "functions", "top_logprobs", "prompt_logprobs",
           "min_p", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "allowed_token_ids",
           "logits_processors", "use_beam_search", "audio", "chat_template", "continue_final_message",
           "include_stop_str_in_output", "truncate_prompt_tokens")
NEUTRAL = {"repetition_penalty": 1, "add_generation_prompt": True, "skip_special_tokens": True}  # only these values
ELSEWHERE = {"top_k": "diffusion.top_k", **dict.fromkeys(
    ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "json_schema", "regex",
     "grammar"), "response_format"), "messages": "prompt, or ask /v1/chat/completions",
    **dict.fromkeys(("prompt", "suffix"), "messages, or ask /v1/completions"), "echo": "echo of /v1/completions"}


class Common(BaseModel, extra="allow"):
    """Fields that all requests share. Others that ask for nothing we lack are accepted and ignored; null is as good as
    left out."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    model: str = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the newer name; it goes first
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-2**63, lt=2**63)] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    diffusing: bool = False
    diffusion: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class Message(BaseModel, extra="allow"):  # tool_call_id, name and others, for the chat template
    role: Annotated[str, Field(max_length=32)]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            parts = [part.get("text") if part.get("type") == "text" else None for part in self.content]
            if not all(isinstance(part, str) for part in parts):
                raise RequestError(400, "messages hold text alone here", param="messages")
            return "".join(parts)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """The message as conversations are trained on: with all its fields that are not null, and a null content beside
        them; arguments of tool calls as objects."""
        others = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        if self.tool_calls:
            others["tool_calls"] = [read_arguments(call) for call in self.tool_calls]
        return {"role": self.role, "content": None if others and self.content is None else self.text, **others}


def read_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool, whose arguments OpenAI writes as the text of a JSON object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        raise RequestError(400, "the arguments of a tool call are no JSON", param="messages") from None
    return {**call, "function": {**function, "arguments": arguments}}


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Any] | None = None
    documents: list[dict[str, Any]] | None = None  # these two are for the chat template, as in training
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None


class CompletionRequest(Common):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None


class EditRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)]


Length = int | Literal["auto"]
MAX_STEPS = 1_000_000  # their times are kept, four bytes each


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The texts around the gap of a request, and what its endpoint says of the gap."""

    prefixes: list[Tensor]  # [P] int64 each, one a prompt
    suffix: Tensor  # [S] int64
    fills: bool = False  # the answer fills the whole gap, instead of ending at an end of text
    length: Length | None = None  # positions of the gap; None: as max_tokens needs
    edits: bool = False  # by the model's edits, whatever the server's method
    text: Tensor | None = None  # [N] int64, the tokens in the gap, which are edited; None: masks
    max_tokens: int | None = None
    echo: list[str] | None = None  # the text before each answer, one a prefix


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A checked request: what to denoise, and how."""

    body: Common
    prompt: Prompt
    config: MDMGenerationConfig
    gap: Length  # positions
    limit: int  # tokens of an answer at most
    stops: list[str]


def read_completion(body: CompletionRequest, texts: Texts) -> Prompt:
    if body.logprobs is not None or body.best_of not in (None, 1, body.n):
        raise RequestError(400, "logprobs and best_of are not supported; with diffusing, chunks have confidences",
                           param="logprobs")
    one = isinstance(body.prompt, str) or body.prompt and isinstance(body.prompt[0], int)
    prompts = [body.prompt] if one else body.prompt
    if not 1 <= len(prompts) <= 64:
        raise RequestError(400, "prompt takes 1 to 64 texts", param="prompt")
    vocab_size = texts.model.config.vocab_size
    if not all(0 <= token < vocab_size for ids in prompts if not isinstance(ids, str) for token in ids):
        raise RequestError(400, f"prompt has tokens outside the vocabulary of {vocab_size}", param="prompt")
    prefixes = [texts.begin(texts.encode(ids)) if isinstance(ids, str) else torch.tensor(ids, dtype=torch.long)
                for ids in prompts]
    suffix = texts.encode(body.suffix or "", after=True)
    check_no_mask(prefixes, texts)
    echo = None
    if body.echo:
        echo = [text if isinstance(text, str) else texts.decode(suffix[:0], text) for text in prompts]
    return Prompt(prefixes=prefixes, suffix=suffix, fills=bool(body.suffix), length="auto" if body.suffix else None,
                  max_tokens=body.most_tokens, echo=echo)


def read_chat(body: ChatRequest, texts: Texts) -> Prompt:
    if body.tools or body.logprobs:
        raise RequestError(400, "tools and logprobs are not supported; response_format is",
                           param="tools" if body.tools else "logprobs")
    prefix = texts.render([message.for_template() for message in body.messages], body.documents,
                          body.chat_template_kwargs or {})
    return Prompt(prefixes=[prefix], suffix=prefix[:0], max_tokens=body.most_tokens)


def read_edit(body: EditRequest, texts: Texts) -> Prompt:
    before, old, after = split_edit(body.messages[0].text)
    prefix, suffix, text = texts.encode(before), *(texts.encode(part, after=True) for part in (after, old))
    if texts.model.config.edit_heads == "all":
        prefix, suffix = texts.frame(prefix, suffix)
        there = {"text": text} if len(text) else {"length": "auto"}
        return Prompt(prefixes=[prefix], suffix=suffix, fills=True, max_tokens=body.most_tokens, edits=True, **there)
    length = max(len(text), 1)
    if body.most_tokens is not None:
        length = min(length, body.most_tokens)
    return Prompt(prefixes=[prefix], suffix=suffix, fills=True, length=length, max_tokens=body.most_tokens)


def split_edit(text: str) -> tuple[str, str, str]:
    """Split Mercury's edit prompt: what is before the code to edit, the code, what is after it in the file."""
    found = re.search(r"<\|code_to_edit\|>\n?(.*?)\n?<\|/code_to_edit\|>", text, re.DOTALL)
    if found is None:
        raise RequestError(400, "the message needs <|code_to_edit|> and <|/code_to_edit|> around the code to edit",
                           param="messages")
    file = re.search(r"<\|current_file_content\|>\n?(.*?)(?:<\|/current_file_content\|>|$)", text, re.DOTALL)
    if file is not None and file.start(1) <= found.start() and found.end() <= file.end(1):
        # The rest of the prompt comes first, so that the file stands on both sides of the gap.
        before = text[:file.start()] + text[file.end():] + text[file.start(1):found.start()]
        after = text[found.end():file.end(1)]
    else:
        before, after = text[:found.start()], text[found.end():]
    before, after = re.sub(r"<\|/?[a-z_]+\|>\n?", "", before), re.sub(r"<\|/?[a-z_]+\|>", "", after)
    return before, found.group(1).replace("<|cursor|>", ""), after


def check_no_mask(parts: list[Tensor], texts: Texts) -> None:
    if any((part == texts.mask_token_id).any() for part in parts):
        raise RequestError(400, "the prompt contains the mask token; take it out, and say what to fill in by suffix",
                           param="prompt")


async def make_plan(body: Common, prompt: Prompt, texts: Texts, limits: ServerLimits) -> Plan:
    """Check the settings of a request, and that it fits into the model's positions.

    Raises: RequestError or UserError naming the field.
    """
    refuse_unsupported(body)
    if prompt.max_tokens is not None and prompt.max_tokens > limits.max_tokens:
        raise RequestError(400, f"max_tokens is {prompt.max_tokens}, at most {limits.max_tokens} are allowed",
                           param="max_tokens")
    choices = dict(body.diffusion or {})
    length, seed = choices.pop("length", None), choices.pop("seed", None)
    if prompt.text is not None and length is not None:
        raise RequestError(400, "diffusion.length is of a gap, and the code to edit is none; leave it out",
                           param="diffusion.length")
    length = check_length(prompt.length if length is None else length, prompt, limits)
    seed = check_seed(body.seed if seed is None else seed)
    stops = read_stops(body.stop)
    pattern = read_pattern(body.response_format)
    given = {"max_tokens": prompt.max_tokens, "temperature": body.temperature, "top_p": body.top_p, "seed": seed,
             "copies": body.n, "pattern": pattern, "choices": choices, "edits": prompt.edits}
    # Reading a vocabulary for the first pattern takes a second.
    config = texts.config(**given) if pattern is None else await asyncio.to_thread(texts.config, **given)
    if config.steps > MAX_STEPS:
        raise RequestError(400, f"diffusion.steps must be at most {MAX_STEPS}", param="diffusion.steps")
    if config.edits:
        prompt = replace(prompt, prefixes=[texts.anchor(prefix) for prefix in prompt.prefixes])
    elif prompt.edits:
        raise RequestError(400, f"this model edits by alg edit, not {config.method}; leave that out",
                           param="diffusion.alg")
    if prompt.text is not None:
        return plan_edits(body, prompt, config, stops, texts, limits)
    if prompt.max_tokens is None:
        taken = max(map(len, prompt.prefixes)) + len(prompt.suffix)
        config = fit_new_tokens(texts.model, config, taken, limits.max_tokens)
    gap = length
    if length is None:  # whole blocks are cut to max_tokens, but not a text that must match
        gap = positions_of(texts.model, config) if pattern is None else config.max_new_tokens
    config = fit_gap(config, gap, texts.model, choices)
    check_positions(prompt, min(config.infill_lengths) if gap == "auto" else gap, texts)
    if texts.model.config.canvas_length is not None:
        check_continues(prompt, config, texts)
    limit = config.max_new_tokens if length in (None, "auto") else gap
    return Plan(body=body, prompt=prompt, config=config, gap=gap, limit=limit, stops=stops)


def plan_edits(body: Common, prompt: Prompt, config: MDMGenerationConfig, stops: list[str], texts: Texts,
               limits: ServerLimits) -> Plan:
    """The plan of editing a text, which may grow to max_tokens."""
    length, most = len(prompt.text), limits.max_tokens if prompt.max_tokens is None else prompt.max_tokens
    if length >= most:
        raise RequestError(400, f"the code to edit has {length} tokens, so max_tokens must be more than that, not "
                           f"{most}; edit a shorter part" + " or raise it" * (most < limits.max_tokens),
                           param="max_tokens")
    check_positions(prompt, length, texts)
    given = length + max(map(len, prompt.prefixes)) + len(prompt.suffix)
    config = fit_new_tokens(texts.model, config, given, most - length) if prompt.max_tokens is None else replace(
        config, max_new_tokens=most - length)
    return Plan(body=body, prompt=prompt, config=config, gap=length, limit=length + config.max_new_tokens, stops=stops)


def check_continues(prompt: Prompt, config: MDMGenerationConfig, texts: Texts) -> None:
    """Refuse what a model that renoises cannot do, before it joins others."""
    if prompt.fills or len(prompt.suffix):
        raise RequestError(400, "this model (DiffusionGemma) continues texts alone, so suffix, fim and edit are not "
                           "supported; ask /v1/completions without a suffix, or /v1/chat/completions", param="suffix")
    check_renoising(texts.model, config)
    for prefix in prompt.prefixes:
        check_prompts(texts.model, prefix.unsqueeze(0), torch.ones(1, len(prefix), dtype=torch.bool))


def fit_gap(config: MDMGenerationConfig, gap: Length, model: Transformer,
            choices: dict[str, Any]) -> MDMGenerationConfig:
    """Fit what the server chose to the gap of a request, which knows nothing of it: lengths, blocks and steps.

    choices: the settings that the request itself chose; they stay.
    """
    if config.edits:
        if gap == "auto":
            config = replace(config, max_infill_length=config.max_new_tokens)
        if config.edit_source == "empty" or "edit_source_length" in choices:
            return config
        longest = config.max_new_tokens if gap == "auto" else gap
        return replace(config, edit_source_length=min(config.edit_source_length, longest))
    block, most = block_of_gap(model, config), config.max_new_tokens
    if block is not None and gap == "auto":
        block = min(block, most)
    elif block is not None and gap % block and "block_length" not in choices:
        block = gap
    if block is not None:
        config = replace(config, block_length=block)
    longest = gap
    if gap == "auto":
        lengths = tuple(n for n in config.infill_lengths if n <= most and n % (block or 1) == 0)
        lengths = lengths or (most // (block or 1) * (block or 1),)
        config = replace(config, infill_lengths=lengths, max_infill_length=min(config.max_infill_length, most))
        longest = max(lengths)
    if config.steps == DEFAULT_STEPS or "steps" in choices:
        return config
    if block is not None:
        return config if gap == "auto" else replace(config, steps=round_up(config.steps, gap // block))
    if counted := block_of_text(model, config):  # a gap touches at most so many, and the last one may be completed
        return replace(config, steps=max(config.steps, -(-(longest - 1) // counted) + 2))
    return config


def refuse_unsupported(body: Common) -> None:
    asked = [name for name in LACKING if getattr(body, name, None)]
    asked += [name for name, value in NEUTRAL.items() if getattr(body, name, None) not in (None, value)]
    if asked:
        raise RequestError(400, f"{asked[0]} is not supported; leave it out", param=asked[0])
    for name, place in ELSEWHERE.items():
        if (value := body.model_extra.get(name)) and value != -1:  # a top_k of -1 is all
            raise RequestError(400, f"{name} is not read here; say it by {place}", param=name)


def check_length(length: Any, prompt: Prompt, limits: ServerLimits) -> Length | None:
    most = limits.max_tokens if prompt.max_tokens is None else prompt.max_tokens
    whole = isinstance(length, int) and not isinstance(length, bool)
    if length not in ("auto", None) and not (whole and 1 <= length <= most):
        raise RequestError(400, f"diffusion.length must be auto or from 1 to {most}, the tokens of an answer at most",
                           param="diffusion.length")
    return length


def check_seed(seed: Any) -> int | None:
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    if seed is not None and not (whole and -2**63 <= seed < 2**63):
        raise RequestError(400, "diffusion.seed must be a whole number of 64 bits", param="diffusion.seed")
    return seed


def read_stops(stop: str | list[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > 16 or not all(0 < len(stop) <= 256 for stop in stops):
        raise RequestError(400, "stop takes up to 16 texts of 1 to 256 characters", param="stop")
    return stops


def check_positions(prompt: Prompt, gap: int, texts: Texts) -> None:
    most = texts.model.config.max_position_embeddings
    longest = max(map(len, prompt.prefixes)) + len(prompt.suffix) + gap
    if longest > most:
        raise RequestError(400, f"the request needs {longest} positions, the model has {most}; shorten the prompt "
                                "or lower max_tokens", code="context_length_exceeded")


def read_pattern(wanted: dict[str, Any] | None) -> tuple[str, str] | None:
    """The pattern that `response_format` demands: "schema" or "regex", and its text."""
    kind = "text" if wanted is None else wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        if wanted.get("schema") is not None:  # as some servers have it
            raise UserError("response_format of type json_object takes no schema; give it as json_schema.schema, with "
                            "the type json_schema")
        return "schema", json.dumps(ANY_JSON)
    if kind == "json_schema":
        schema = wanted.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise UserError("response_format of type json_schema needs json_schema.schema, an object")
        return "schema", json.dumps(schema["schema"])
    if kind == "regex" and isinstance(wanted.get("regex"), str):
        return "regex", wanted["regex"]
    raise UserError("response_format.type is text, json_object, json_schema, or regex with the field regex")
