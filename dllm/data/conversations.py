"""Conversations to tokens: a chat template renders them, and the tokens of the answers are marked for learning."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from dllm.errors import UserError, first_line
from dllm.files import decode_text

_MARKS_ANSWERS = re.compile(r"{%-?\s*generation\b")


class _Rendered(NamedTuple):
    text: str
    answers: list[tuple[int, int]]  # start and end, in characters
    exact: bool  # the template marks the answers itself


def set_chat_template(tokenizer, chat_template: str) -> None:
    """Set the template with which the tokenizer renders conversations, and is saved.

    Args:
        chat_template: "default", the tokenizer's own; or the path of a Jinja file.
    Raises: UserError if there is no template, it writes the mask token, the tokenizer is not a fast one, or the file
        cannot be read.
    """
    if chat_template != "default":
        try:
            text = decode_text(Path(chat_template).expanduser().read_bytes())
            tokenizer.chat_template = text.replace("\r\n", "\n")  # as Jinja does, and as a saved one comes back
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"cannot read the chat template {chat_template}: {reason}; set data.chat_template to "
                            "default, or to a Jinja file") from None
    if not tokenizer.chat_template:  # a text, or several by name, of which Transformers chooses
        raise UserError("the tokenizer has no chat template; set data.chat_template to a Jinja file that has one")
    if tokenizer.mask_token and tokenizer.mask_token in str(tokenizer.chat_template):
        raise UserError(f"the chat template writes the mask token {tokenizer.mask_token}, which would be filled in; "
                        "set model.mask_token to another token")
    if not tokenizer.is_fast:
        raise UserError("conversations need a fast tokenizer, which tells where its tokens lie in the text; give one "
                        "with a tokenizer.json")


def encode_conversation(tokenizer, messages: list[dict], **values: Any) -> tuple[list[int], list[bool]]:
    """(tokens of a rendered conversation and its end-of-text token, whether each is learnt).

    The model learns the assistant's answers, each with the added token that ends it, and all that stands after the
    last one. A template marks an answer with {% generation %}. Without that mark, an answer is the text that it adds to
    the conversation before it, rendered with the generation prompt. A special token that a message mentions is text.

    Args:
        values: what the template takes beside the messages: `tools`, `documents`, and others as `chat_template_kwargs`.
    Raises: UserError if the template fails, or renders a conversation differently once it goes on.
    """
    special, added = _match_added(tokenizer, special=True), _match_added(tokenizer)
    guard = _choose_guard([messages, values])
    messages, values = _guarded(messages, special, guard), _guarded(values, special, guard)
    values |= values.pop("chat_template_kwargs", {})
    rendered = _render(tokenizer, messages, values)
    ids, offsets = _tokenize(tokenizer, rendered.text, special, guard)
    learnt, position, first = [False] * len(ids), 0, 0
    for start, end in rendered.answers:
        while position < len(ids) and offsets[position][0] < start:
            position += 1
        first = position
        while position < len(ids) and offsets[position][0] < end:
            position += 1
        last = position
        if not rendered.exact:
            while last > first and not rendered.text[slice(*offsets[last - 1])].strip():
                last -= 1
            if last == first or not added.fullmatch(rendered.text[slice(*offsets[last - 1])]):
                last = position  # nothing but the blank ends the answer
        learnt[first:last] = [True] * (last - first)
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        learnt.append(False)
    if any(learnt) and not added.sub("", rendered.text[rendered.answers[-1][1]:]).strip():
        learnt[first:] = [True] * (len(ids) - first)
    return ids, learnt


def find_answer_ends(tokenizer) -> list[int]:
    """The tokens that end an answer: the added token that the template writes after it, if any, and end-of-text.

    Raises: UserError if the template fails.
    """
    added, answer = _match_added(tokenizer), "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    text = _apply(tokenizer, messages, {}, tokenize=False)
    after = added.match(text[text.rfind(answer) + len(answer):].lstrip()) if answer in text else None
    named = [tokenizer.convert_tokens_to_ids(after[0])] if after else []
    return list(dict.fromkeys([*named, tokenizer.eos_token_id]))


def _match_added(tokenizer, special: bool = False) -> re.Pattern:
    """Matches the text of an added token, or of a special one alone, the longest first; nothing if there is none.

    Many a published `<|im_end|>` is added and not special.
    """
    words = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special or not special}
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def _choose_guard(values: Any) -> str:
    """A private character that the values do not have."""
    used = set(json.dumps(values, ensure_ascii=False))
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)


def _guarded(value: Any, special: re.Pattern, guard: str) -> Any:
    """With a guard inside each special token that a text mentions, so that it is found as text again."""
    if isinstance(value, str):
        return special.sub(lambda found: found[0][0] + guard + found[0][1:], value)
    if isinstance(value, dict):
        return {key: part if key == "role" else _guarded(part, special, guard) for key, part in value.items()}
    return [_guarded(part, special, guard) for part in value] if isinstance(value, list) else value


def _tokenize(tokenizer, text: str, special: re.Pattern, guard: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(tokens of the text without guards, their offsets in the text). Special tokens with a guard are text."""
    if guard not in text:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    ids, offsets, place, before = [], [], 0, None
    for found in [*special.finditer(text), None]:
        start, stop = place, len(text) if found is None else found.start()
        if before is not None and added[before].rstrip:  # the token takes the blanks beside it
            start = stop - len(text[start:stop].lstrip())
        if found is not None and added[found[0]].lstrip:
            stop = start + len(text[start:stop].rstrip())
        places = [i for i in range(start, stop) if text[i] != guard] + [stop]
        encoded = tokenizer(text[start:stop].replace(guard, ""), add_special_tokens=False, split_special_tokens=True,
                            return_offsets_mapping=True, verbose=False)
        ids += encoded["input_ids"]
        offsets += [(places[first], places[last]) for first, last in encoded["offset_mapping"]]
        if found is not None:
            ids.append(tokenizer.convert_tokens_to_ids(found[0]))
            offsets.append(found.span())
            place, before = found.end(), found[0]
    return ids, offsets


def _render(tokenizer, messages: list[dict], values: dict[str, Any]) -> _Rendered:
    text = _apply(tokenizer, messages, values, tokenize=False)
    if not _MARKS_ANSWERS.search(tokenizer.get_chat_template(tools=values.get("tools"))):
        return _Rendered(text, _find_answers(tokenizer, messages, values, text), False)
    encoded = _apply(tokenizer, messages, values, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                     tokenizer_kwargs={"return_offsets_mapping": True})
    answers, before = [], False
    for (start, end), mark in zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True):
        if mark:
            answers.append((answers.pop()[0] if before else start, end))
        before = bool(mark)
    return _Rendered(text, answers, True)


def _find_answers(tokenizer, messages: list[dict], values: dict[str, Any], text: str) -> list[tuple[int, int]]:
    """Start and end of each answer in the rendered text, in characters."""
    answers = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            through = _apply(tokenizer, messages[:index + 1], values, tokenize=False)
            before = _apply(tokenizer, messages[:index], values, tokenize=False, add_generation_prompt=True) \
                if index else _find_opening(tokenizer, messages, values, through)
            if not text.startswith(through) or not through.startswith(before):
                raise UserError(f"the chat template renders the conversation up to message {index + 1} of "
                                f"{len(messages)} differently once it goes on, so its answers cannot be told; mark "
                                "them in the template with {% generation %}, and name it in data.chat_template")
            answers.append((len(before), len(through)))
    return answers


def _find_opening(tokenizer, messages: list[dict], values: dict[str, Any], through: str) -> str:
    """What stands before the answer in the rendering `through` of a conversation that begins with one: templates may
    refuse to render no messages, so it is all up to where the generation prompt ends."""
    prompt = _apply(tokenizer, messages[:1], values, tokenize=False, add_generation_prompt=True)[len(through):]
    return through[:through.find(prompt) + len(prompt)] if prompt in through else ""


def _apply(tokenizer, messages: list[dict], values: dict[str, Any], **keywords):
    try:
        return tokenizer.apply_chat_template(messages, **{**values, **keywords})
    except Exception as error:  # templates raise what they like, such as a TypeError for a content of parts
        raise UserError(f"the chat template refuses a conversation with the roles "
                        f"{', '.join(message['role'] for message in messages)}: {first_line(error)}; set another "
                        "data.chat_template, or leave the conversation out") from None
