"""Exact-match line infilling: a line of a held-out function is masked, at its true length, and must come back exactly.

Lines are those on which a statement of a Python function begins (docstrings apart); a document that is not Python gives
its lines that are not blank. One line per function, each in as much of its surroundings as the window holds.
"""

import ast
import bisect
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from dllm.data import Document
from dllm.errors import UserError
from dllm.evaluators.estimates import wilson_interval
from dllm.evaluators.held_out import decode, encode
from dllm.evaluators.perplexity import batches_of_similar_length
from dllm.model import DiffusionLM
from dllm.sampler import MDMGenerationConfig, denoise, find_mask_token


@dataclass(frozen=True, kw_only=True, slots=True)
class InfillingSettings:
    """How many lines, in how much context, decoded how."""

    lines: int = 100
    max_seq_len: int = 512  # tokens of the window around the line
    max_line_tokens: int = 64  # longer lines are not drawn
    generation: MDMGenerationConfig = MDMGenerationConfig(alg="maskgit_plus", steps=64)  # its seed gives way to ours
    batch_tokens: int = 16384  # positions of one forward pass; changes nothing but speed and memory
    seed: int = 0

    def __post_init__(self):
        for name in ("lines", "max_line_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_seq_len <= self.max_line_tokens:
            raise UserError(f"max_seq_len {self.max_seq_len} leaves no room around lines of up to "
                            f"{self.max_line_tokens} tokens; raise it, or lower max_line_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class InfillingExample:
    source: str  # the document's
    prefix: str  # the function, as far as the model saw it, before the masked tokens; "…" where it saw no more
    suffix: str  # and after them
    truth: str
    infilled: str
    tokens: int  # masked
    exact: bool  # equal but for surrounding blanks


@dataclass(frozen=True, kw_only=True, slots=True)
class InfillingResult:
    exact_match: float  # share of the lines
    low: float  # 95% confidence interval (Wilson)
    high: float
    lines: int
    tokens_per_forward: float  # masked positions / forward passes, each line's counted for itself
    examples: tuple[InfillingExample, ...]  # every line

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Gap:
    """A window of a document in which tokens are to be filled in."""

    tokens: Tensor  # [L] int64, the truth
    start: int  # the positions start..end are masked
    end: int
    function: range  # the positions of the function around them, as far as they are in the window
    whole: bool  # whether that is all of it
    source: str
    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True)
class Block:
    """A function of a document, or the whole document where it is not Python."""

    document: int
    start: int  # characters
    end: int
    lines: tuple[tuple[int, int], ...]  # characters, without the blanks around


def line_infilling(model: DiffusionLM, tokenizer, documents: Sequence[Document],
                   settings: InfillingSettings | None = None) -> InfillingResult:
    """Mask a line of each of `settings.lines` held-out functions, drawn by the seed, denoise, compare with the truth.

    The masked tokens are those of the undisturbed text that touch the line, so both sides keep the tokens they have in
    training. Fewer lines are scored where the documents have fewer functions.
    Raises: UserError if no line fits, or windows are longer than the model's positions.
    """
    settings = settings or InfillingSettings()
    config = replace(settings.generation, seed=settings.seed, num_return_sequences=1)
    mask_token_id = find_mask_token(model, config)
    gaps = draw_gaps(tokenizer, documents, settings)
    filled: list[Tensor | None] = [None] * len(gaps)
    row_forwards = 0.0
    for batch in batches_of_similar_length([len(gap.tokens) for gap in gaps], settings.batch_tokens):
        canvas = torch.full((len(batch), max(len(gaps[i].tokens) for i in batch)), 0)
        real = torch.zeros(canvas.shape, dtype=torch.bool)
        for row, i in enumerate(batch):
            length = len(gaps[i].tokens)
            canvas[row, :length], real[row, :length] = gaps[i].tokens, True
            canvas[row, gaps[i].start:gaps[i].end] = mask_token_id
        out = denoise(model, canvas, config, real)
        masked = sum(gaps[i].end - gaps[i].start for i in batch)
        row_forwards += masked / out.tokens_per_forward
        for row, i in enumerate(batch):
            filled[i] = out.sequences[row, gaps[i].start:gaps[i].end].cpu()
    examples = tuple(_judge(tokenizer, gap, tokens) for gap, tokens in zip(gaps, filled, strict=True))
    low, high = wilson_interval(sum(example.exact for example in examples), len(examples))
    return InfillingResult(exact_match=sum(example.exact for example in examples) / len(examples), low=low, high=high,
                           lines=len(examples), tokens_per_forward=sum(e.tokens for e in examples) / row_forwards,
                           examples=examples)


def _judge(tokenizer, gap: Gap, tokens: Tensor) -> InfillingExample:
    truth, infilled = decode(tokenizer, gap.tokens[gap.start:gap.end]), decode(tokenizer, tokens)
    return InfillingExample(source=gap.source, prefix=gap.prefix, suffix=gap.suffix, truth=truth, infilled=infilled,
                            tokens=gap.end - gap.start, exact=infilled.strip() == truth.strip())


def draw_gaps(tokenizer, documents: Sequence[Document], settings: InfillingSettings,
              lines_per_gap: int = 1) -> list[Gap]:
    """One gap of so many consecutive statements in each of up to `settings.lines` functions, drawn by the seed.

    Raises: UserError if there is none.
    """
    blocks = [block for index, document in enumerate(documents) for block in find_blocks(document.text, index)]
    generator = torch.Generator().manual_seed(settings.seed)
    encoded: dict[int, tuple[Tensor, list[int]]] = {}
    gaps: list[Gap] = []
    for number in torch.randperm(len(blocks), generator=generator).tolist():
        block = blocks[number]
        choices = len(block.lines) - lines_per_gap + 1
        if choices < 1:
            continue
        first = int(torch.randint(choices, (), generator=generator))
        if block.document not in encoded:
            encoded[block.document] = encode(tokenizer, documents[block.document].text)
        gap = _cut_gap(tokenizer, documents[block.document], *encoded[block.document], block,
                       block.lines[first][0], block.lines[first + lines_per_gap - 1][1], settings)
        if gap is not None:
            gaps.append(gap)
        if len(gaps) == settings.lines:
            break
    if not gaps:
        raise UserError(f"nothing to infill: the {len(documents)} held-out documents have no line of at most "
                        f"{settings.max_line_tokens} tokens; give more data or raise max_line_tokens")
    return gaps


def _cut_gap(tokenizer, document: Document, tokens: Tensor, offsets: list[int], block: Block, line_start: int,
             line_end: int, settings: InfillingSettings) -> Gap | None:
    """The window around characters line_start..line_end: the function in its middle if it fits, else the line."""
    start, end = _tokens_touching(offsets, line_start, line_end)
    if end - start > settings.max_line_tokens or start == 0:  # models with right shift cannot predict the first token
        return None
    shown = _tokens_touching(offsets, block.start, block.end)
    around = shown if shown[1] - shown[0] <= settings.max_seq_len else (start, end)
    low = around[0] - (settings.max_seq_len - (around[1] - around[0])) // 2
    low = max(0, min(low, len(tokens) - settings.max_seq_len))
    high = min(low + settings.max_seq_len, len(tokens))
    prefix = decode(tokenizer, tokens[max(low, shown[0]):start]).lstrip("\r\n")
    suffix = decode(tokenizer, tokens[end:min(high, shown[1])])
    if low > shown[0] and "\n" in prefix:  # cut in the middle of a line: show whole ones
        prefix = "…" + prefix[prefix.index("\n"):]
    if high < shown[1] and "\n" in suffix:
        suffix = suffix[:suffix.rindex("\n") + 1] + "…"
    function = range(max(low, shown[0]) - low, min(high, shown[1]) - low)
    return Gap(tokens[low:high], start - low, end - low, function, len(function) == shown[1] - shown[0],
               document.source, prefix, suffix)


def _tokens_touching(offsets: list[int], start: int, end: int) -> tuple[int, int]:
    """The tokens that characters start..end lie in, as a range; several can begin at one character of many bytes."""
    first = bisect.bisect_right(offsets, start) - 1
    return bisect.bisect_left(offsets, offsets[first]), min(bisect.bisect_left(offsets, end), len(offsets) - 1)


def find_blocks(text: str, document: int) -> list[Block]:
    """The functions of a Python text that have a statement; of any other text, itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes in the text, which are not ours to report
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    begins, bounds = [0], []  # of every line: its first character; the characters between its blanks
    for line in text.split("\n"):
        bounds.append((begins[-1] + len(line) - len(line.lstrip()), begins[-1] + len(line.rstrip())))
        begins.append(begins[-1] + len(line) + 1)
    if tree is None:
        lines = tuple((start, end) for start, end in bounds if start < end)
        return [Block(document, 0, len(text), lines)] if lines else []
    blocks = []
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
            begun = {node.lineno for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function
                     and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))}
            lines = tuple(bounds[n - 1] for n in sorted(begun) if bounds[n - 1][0] < bounds[n - 1][1])
            if lines:
                blocks.append(Block(document, begins[first - 1], bounds[function.end_lineno - 1][1], lines))
    return blocks
