"""Exact-match infilling: a line (or a word) of a held-out function is masked, at its true length, and must come back.

Candidates are the lines on which a statement of a Python function begins, except docstrings; in a document that is not
Python, all lines that are not blank. One line per function is drawn, with as much context as the window holds.
"""

import ast
import bisect
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm.data import Document
from dllm.errors import UserError
from dllm.evaluators.estimates import wilson_interval
from dllm.evaluators.held_out import decode, encode_with_offsets
from dllm.evaluators.likelihood import batches_of_similar_length
from dllm.evaluators.settings import InfillingSettings
from dllm.generation.infilling import Gap, fill
from dllm.model.transformer import Transformer

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True, slots=True)
class InfillingExample:
    source: str  # name of the document
    prefix: str  # the visible part of the function before the masked tokens; "…" where the window cuts it
    suffix: str  # the same after them
    truth: str
    infilled: str
    tokens: int  # masked
    exact: bool  # equal, ignoring surrounding blanks


@dataclass(frozen=True, kw_only=True, slots=True)
class InfillingResult:
    exact_match: float  # share of the lines
    low: float  # 95% confidence interval (Wilson)
    high: float
    lines: int
    tokens_per_forward: float  # masked positions / forward passes, counted for each line separately
    examples: tuple[InfillingExample, ...]  # every line


@dataclass(frozen=True, slots=True)
class HiddenLines:
    """A window of a document with hidden lines for the model to fill in."""

    tokens: Tensor  # [L] int64, the truth
    start: int  # the positions start..end are masked
    end: int
    function: range  # positions of the function around them, cut at the window's edges
    whole: bool  # whether the window holds the whole function
    source: str
    prefix: str  # the function as in `InfillingExample`
    suffix: str

    @property
    def truth(self) -> Tensor:
        return self.tokens[self.start:self.end]

    @property
    def gap(self) -> Gap:
        return Gap(self.tokens[:self.start], self.tokens[self.end:], self.end - self.start)


@dataclass(frozen=True, slots=True)
class FunctionLines:
    """A function of a document and its statements, in characters; a whole document that is not Python."""

    document: int  # its index
    start: int
    end: int
    lines: tuple[tuple[int, int], ...]  # without surrounding blanks


def line_infilling(model: Transformer, tokenizer, documents: Sequence[Document],
                   settings: InfillingSettings | None = None) -> InfillingResult:
    """Mask a line of each of `settings.lines` held-out functions, drawn by the seed, denoise, compare with the truth.

    The masked tokens are those of the undisturbed text that touch the line, so both sides keep the tokens they have in
    training. Fewer lines are scored where the documents have fewer functions.
    Raises: UserError if no line fits, or windows are longer than the model's positions.
    """
    settings = settings or InfillingSettings()
    config = replace(settings.generation, seed=settings.seed, num_return_sequences=1)
    hidden = hide_lines(tokenizer, documents, settings)
    answers: list[Tensor | None] = [None] * len(hidden)
    row_forwards = 0.0
    for batch in batches_of_similar_length([len(part.tokens) for part in hidden], settings.batch_tokens):
        filled = fill(model, [hidden[i].gap for i in batch], config, sequence=torch.tensor(batch))
        row_forwards += sum(gap.length for gap in filled.gaps) / filled.output.tokens_per_forward
        for i, answer in zip(batch, filled.answers, strict=True):
            answers[i] = answer
    examples = tuple(_judge(tokenizer, part, tokens) for part, tokens in zip(hidden, answers, strict=True))
    exact, lines = sum(example.exact for example in examples), len(examples)
    low, high = wilson_interval(exact, lines)
    return InfillingResult(exact_match=exact / lines, low=low, high=high, lines=lines,
                           tokens_per_forward=sum(e.tokens for e in examples) / row_forwards, examples=examples)


def _judge(tokenizer, hidden: HiddenLines, answer: Tensor) -> InfillingExample:
    truth, infilled = decode(tokenizer, hidden.truth), decode(tokenizer, answer)
    return InfillingExample(source=hidden.source, prefix=hidden.prefix, suffix=hidden.suffix, truth=truth,
                            infilled=infilled, tokens=len(hidden.truth), exact=infilled.strip() == truth.strip())


def hide_lines(tokenizer, documents: Sequence[Document], settings: InfillingSettings,
               count: int = 1) -> list[HiddenLines]:
    """Hide `count` consecutive statements, or words of statements, in each of up to `settings.lines` functions, drawn
    by the seed.

    Raises: UserError if no function has `count` of them that fit.
    """
    functions = [function for index, document in enumerate(documents)
                 for function in find_functions(document.text, index)]
    generator = torch.Generator().manual_seed(settings.seed)
    encoded: dict[int, tuple[Tensor, list[int]]] = {}
    hidden: list[HiddenLines] = []
    for number in torch.randperm(len(functions), generator=generator).tolist():
        function = functions[number]
        document = documents[function.document]
        spans = function.lines if settings.hide == "line" else find_words(document.text, function.lines)
        choices = len(spans) - count + 1
        if choices < 1:
            continue
        first = int(torch.randint(choices, (), generator=generator))
        if function.document not in encoded:
            encoded[function.document] = encode_with_offsets(tokenizer, document.text)
        span = spans[first][0], spans[first + count - 1][1]
        cut = _cut_window(tokenizer, document, *encoded[function.document], function, span, settings)
        if cut is not None:
            hidden.append(cut)
        if len(hidden) == settings.lines:
            break
    if not hidden:
        raise UserError(f"nothing to infill: the {len(documents)} held-out documents have no line of at most "
                        f"{settings.max_line_tokens} tokens; give more data or raise max_line_tokens")
    return hidden


def _cut_window(tokenizer, document: Document, tokens: Tensor, offsets: list[int], function: FunctionLines,
                span: tuple[int, int], settings: InfillingSettings) -> HiddenLines | None:
    """The window around the characters `span`, centred on the function, or on the span where the function does not fit.
    None if the span has too many tokens."""
    start, end = _tokens_touching(offsets, *span)
    if end - start > settings.max_line_tokens or start == 0:  # models with right shift cannot predict the first token
        return None
    shown = _tokens_touching(offsets, function.start, function.end)
    around = shown if shown[1] - shown[0] <= settings.max_seq_len else (start, end)
    low = around[0] - (settings.max_seq_len - (around[1] - around[0])) // 2
    low = max(0, min(low, len(tokens) - settings.max_seq_len))
    high = min(low + settings.max_seq_len, len(tokens))
    prefix = decode(tokenizer, tokens[max(low, shown[0]):start]).lstrip("\r\n")
    suffix = decode(tokenizer, tokens[end:min(high, shown[1])])
    if low > shown[0] and "\n" in prefix:  # cut in the middle of a line: show whole lines
        prefix = "…" + prefix[prefix.index("\n"):]
    if high < shown[1] and "\n" in suffix:
        suffix = suffix[:suffix.rindex("\n") + 1] + "…"
    inside = range(max(low, shown[0]) - low, min(high, shown[1]) - low)
    return HiddenLines(tokens[low:high], start - low, end - low, inside, len(inside) == shown[1] - shown[0],
                       document.source, prefix, suffix)


def _tokens_touching(offsets: list[int], start: int, end: int) -> tuple[int, int]:
    """The range of tokens that hold the characters start..end; several can begin at one character of many bytes."""
    first = bisect.bisect_right(offsets, start) - 1
    return bisect.bisect_left(offsets, offsets[first]), min(bisect.bisect_left(offsets, end), len(offsets) - 1)


def find_words(text: str, lines: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Names, keywords and numbers of these lines, in characters."""
    return [word.span() for line in lines for word in _WORD.finditer(text, *line)]


def find_functions(text: str, document: int) -> list[FunctionLines]:
    """The functions of a Python text that have a statement; any other text counts as one function."""
    begins, bounds = [0], []  # for each line: its first character; its span without surrounding blanks
    for line in text.split("\n"):
        bounds.append((begins[-1] + len(line) - len(line.lstrip()), begins[-1] + len(line.rstrip())))
        begins.append(begins[-1] + len(line) + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the text, such as invalid escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        lines = tuple((start, end) for start, end in bounds if start < end)
        return [FunctionLines(document, 0, len(text), lines)] if lines else []
    functions = []
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
            begun = {node.lineno for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function
                     and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))}
            lines = tuple(bounds[n - 1] for n in sorted(begun) if bounds[n - 1][0] < bounds[n - 1][1])
            if lines:
                functions.append(FunctionLines(document, begins[first - 1], bounds[function.end_lineno - 1][1], lines))
    return functions
