"""Conversations to tokens: rendered by a chat template, with the answers' tokens marked as the ones to learn."""

import re
from pathlib import Path

from dllm.errors import UserError

_MARKS_ANSWERS = re.compile(r"{%-?\s*generation\b")


def set_chat_template(tokenizer, chat_template: str) -> None:
    """Give the tokenizer the template it renders conversations with, and is saved with.

    Args:
        chat_template: "default", the tokenizer's own; or the path of a Jinja file.
    Raises: UserError if the tokenizer has none, is not a fast one, or the file cannot be read.
    """
    if chat_template != "default":
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"cannot read the chat template {chat_template}: {reason}; set data.chat_template to "
                            "default, or to a Jinja file") from None
    if not isinstance(tokenizer.chat_template, str):
        raise UserError("the tokenizer has no chat template; set data.chat_template to a Jinja file that has one")
    if not tokenizer.is_fast:
        raise UserError("conversations need a fast tokenizer, which tells where its tokens lie in the text; give one "
                        "with a tokenizer.json")


def encode_conversation(tokenizer, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """The tokens of a rendered conversation and the end-of-text token, and which of them are to be learnt.

    Those are the assistant's answers, each with the special token that ends it, and the end of text after an answer. A
    template says what belongs to an answer with {% generation %}; of any other, an answer is what rendering the
    conversation up to it adds to rendering the conversation before it with the generation prompt.

    Raises: UserError if the template fails, or renders a conversation differently once it goes on.
    """
    if _MARKS_ANSWERS.search(tokenizer.chat_template):
        encoded = _apply(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, learnt = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    else:
        text = _apply(tokenizer, messages, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, learnt = encoded["input_ids"], [False] * len(encoded["input_ids"])
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        offsets, position = encoded["offset_mapping"], 0
        for start, end in _find_answers(tokenizer, messages, text):
            while position < len(ids) and offsets[position][0] < start:
                position += 1
            first = position
            while position < len(ids) and offsets[position][0] < end:
                position += 1
            last = position
            while last > first and not text[slice(*offsets[last - 1])].strip() and ids[last - 1] not in special:
                last -= 1
            if last == first or ids[last - 1] not in special:  # the blank is all that ends the answer
                last = position
            learnt[first:last] = [True] * (last - first)
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        learnt.append(bool(messages) and messages[-1]["role"] == "assistant" and any(learnt))
    return ids, learnt


def _find_answers(tokenizer, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
    """Where the answers lie in the rendered text, in characters."""
    answers = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _apply(tokenizer, messages[:index], tokenize=False, add_generation_prompt=True) if index else ""
            through = _apply(tokenizer, messages[:index + 1], tokenize=False)
            if not text.startswith(through) or not through.startswith(before):
                raise UserError(f"the chat template renders the conversation up to message {index + 1} of "
                                f"{len(messages)} differently once it goes on, so its answers cannot be told; mark "
                                "them in the template with {% generation %}, and name it in data.chat_template")
            answers.append((len(before), len(through)))
    return answers


def _apply(tokenizer, messages: list[dict[str, str]], **keywords):
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **keywords)
    except TemplateError as error:
        raise UserError(f"the chat template refuses a conversation with the roles "
                        f"{', '.join(message['role'] for message in messages)}: {error}; set another "
                        "data.chat_template") from None
