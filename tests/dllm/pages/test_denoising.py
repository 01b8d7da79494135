"""Displays of denoising show the actual steps: in a terminal, in a pipe and as an animation."""

import io
import json
import re

import pytest
import torch
from rich.console import Console

from dllm.diffusion_lm import DiffusionLM
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import CanvasStep, Denoising, denoise, finish
from dllm.generation.steps import Update
from dllm.pages.base import DELETED, INSERTED, RAMP
from dllm.pages.demo import write_sample
from dllm.pages.denoising import (
    MASK_GLYPH,
    Trace,
    animation,
    color_text,
    confidence_level,
    record,
    trace_rows,
    watch,
)


@pytest.fixture
def canvas(model, tokenizer):
    ids = tokenizer("def f(</script>): <!-- & \n    return", add_special_tokens=False)["input_ids"]
    return torch.tensor([*ids, *[model.mask_token_id] * 9, *ids[:3]])


@pytest.mark.parametrize("alg", ["entropy", "maskgit_plus", "topk_margin", "p2", "origin"])
def test_replaying_the_animation_gives_the_denoised_text(model, tokenizer, canvas, alg):
    config = MDMGenerationConfig(alg=alg, steps=6, temperature=1.0, seed=3)
    data = animation(record(model, canvas, config), tokenizer)
    pieces = list(data["start"])
    assert [text is None for text in pieces] == (canvas == model.mask_token_id).tolist()
    for changes in data["steps"]:
        assert changes
        for position, text, level, fresh in changes:
            pieces[position] = text
            assert (text is None and level is None) or (0 <= level < len(RAMP) and fresh)
            assert canvas[position] == model.mask_token_id
    final = denoise(model, canvas.unsqueeze(0), config).sequences[0].tolist()
    assert pieces == [None if token == model.mask_token_id else tokenizer.decode([token]) for token in final]


def test_the_animation_can_show_a_part(model, tokenizer, canvas):
    trace = record(model, canvas, MDMGenerationConfig(steps=4))
    part = range(int((canvas == model.mask_token_id).nonzero()[0]) - 1, len(canvas) - 2)
    every = animation(trace, tokenizer)
    some = animation(trace, tokenizer, part)
    assert some["start"] == every["start"][part.start:part.stop]
    assert some["steps"] == [[(place - part.start, *rest) for place, *rest in step] for step in every["steps"]]


def test_a_gap_that_grows_and_shrinks_is_replayed(tokenizer):
    mask, gone = tokenizer.mask_token_id, -torch.inf
    trace = Trace(torch.tensor([5, mask, 6]), mask, "maskgit_plus")
    committed = [gone, 0.9, gone, gone]
    for index, (tokens, kept) in enumerate([([5, mask, mask, 6], [gone] * 4), ([5, 7, mask, 6], committed),
                                            ([5, 7, 6, 0], committed)]):
        visible = torch.tensor([[True] * 3 + [index < 2]])
        trace(CanvasStep(index, torch.tensor([tokens]), torch.tensor([kept]), torch.tensor([kept]), visible))
    data = animation(trace, tokenizer)
    five, six, seven = (tokenizer.decode([token]) for token in (5, 6, 7))
    pieces, seen = data["start"], []
    for changes in data["steps"]:
        for place, text, *_ in changes:
            pieces[place] = text
        seen.append(list(pieces))
    assert seen == [[five, None, None, six], [five, seven, None, six], [five, seven, six, ""]]


def test_text_that_looks_like_markup_cannot_leave_the_data(model, tokenizer, canvas):
    data = animation(record(model, canvas, MDMGenerationConfig(steps=3)), tokenizer)
    page = write_sample([data], {"Model": "<i>"}, "dllm sample")
    written = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert "".join(text for text in written["start"] if text).startswith("def f(</script>): <!-- & ")
    assert written == json.loads(json.dumps(data))
    assert page.count("</script>") == 2 and "<!--" not in page and "<i>" not in page


def test_a_position_masked_again_is_shown_as_masked(tokenizer):
    """P2 takes back what it committed."""
    mask = tokenizer.mask_token_id
    trace = Trace(torch.tensor([5, mask]), mask, "p2")
    confidence = torch.tensor([[0.0, 0.9]])
    for index, tokens in enumerate(([5, 7], [5, 7], [5, mask], [5, 8])):
        kept = torch.tensor([[-torch.inf, -torch.inf if tokens[1] == mask else 0.9]])
        trace(CanvasStep(index, torch.tensor([tokens]), confidence, kept, None))
    steps = animation(trace, tokenizer)["steps"]
    first, second = tokenizer.decode([7]), tokenizer.decode([8])
    assert [[text for _, text, *_ in step] for step in steps] == [[first], [None], [second]]


@pytest.mark.parametrize("confidence, alg, level", [
    (0.0, "maskgit_plus", 0), (0.19, "p2", 0), (0.5, "topk_margin", 2), (1.0, "maskgit_plus", 4),
    (0.0, "entropy", 4), (-0.7, "entropy", 2), (-9.0, "entropy", 0), (float("-inf"), "origin", 0),
])
def test_levels_of_confidence(confidence, alg, level):
    assert confidence_level(confidence, alg) == level


def test_black_text_is_legible_on_every_colour():
    def luminance(color: str) -> float:
        channels = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert all((luminance(color) + 0.05) / 0.05 >= 7 for color in (*RAMP, INSERTED, DELETED))


def show(model, tokenizer, canvas, terminal: bool, width: int = 100) -> tuple[str, torch.Tensor]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system="truecolor" if terminal else None)
    rows, config = canvas.expand(2, -1), MDMGenerationConfig(steps=9, seed=1, temperature=0.5)
    denoising = Denoising(model, rows, config)
    with watch(tokenizer, trace_rows(denoising), console) as on_step:
        result = finish(denoising, on_step)
    return out.getvalue(), result.sequences


def test_a_pipe_gets_the_final_texts_alone(model, tokenizer, canvas):
    text, sequences = show(model, tokenizer, canvas, terminal=False)
    assert text == "".join(tokenizer.decode(row, skip_special_tokens=True) + "\n" for row in sequences.tolist())


def test_a_terminal_sees_masks_first_and_the_coloured_text_at_the_end(model, tokenizer, canvas):
    text, sequences = show(model, tokenizer, canvas, terminal=True)
    assert "step 0, 18 still masked" in text and "step 9, 0 still masked" in text
    assert MASK_GLYPH * 9 in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    end = text[text.rindex("step 9"):]
    assert MASK_GLYPH not in end and "\x1b[30;48;2;" in end
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", end)
    for row in sequences.tolist():
        first_line = "".join(tokenizer.decode([token]) for token in row).split("\n")[0]
        assert first_line.rstrip() in plain


def test_padding_is_left_out(model, tokenizer):
    out = io.StringIO()
    tokens = tokenizer("abc", add_special_tokens=False)["input_ids"]
    rows = torch.tensor([[9, 9, *tokens, model.mask_token_id]])
    real = torch.tensor([[0, 0, *[1] * len(tokens), 1]])
    console = Console(file=out)
    denoising = Denoising(model, rows, MDMGenerationConfig(steps=1), real)
    with watch(tokenizer, trace_rows(denoising), console) as on_step:
        finish(denoising, on_step)
    assert out.getvalue().startswith("abc")


def test_a_step_of_edits_shows_what_it_inserted_deleted_and_substituted(tokenizer):
    gone, mask = -torch.inf, tokenizer.mask_token_id
    trace = Trace(torch.tensor([5, 6, 7, 8]), mask, "edit")
    edits = Update(torch.tensor([[5, 6, 7, 11, 0]]), None, torch.tensor([[False, True, False, False, False]]),
                   torch.tensor([[9, 10, -1, -1, -1]]))
    kept = torch.tensor([[gone, 0.5, 0.1, gone, 0.9]])
    trace(CanvasStep(0, torch.tensor([[5, 9, 10, 7, 11]]), kept, kept, torch.ones(1, 5, dtype=torch.bool), edits))
    shown = [(slot.token, slot.level, slot.fresh, slot.edit) for slot in trace.frames[-1]]
    assert shown == [(5, None, False, None), (9, 2, True, "inserted"), (6, None, False, "deleted"),
                     (10, 0, True, "inserted"), (7, None, False, None), (11, 4, True, None)]
    assert [slot.token for slot in trace.now] == [5, 9, 10, 7, 11]
    spans = color_text(trace.frames[-1], mask, tokenizer).spans
    assert [span.style for span in spans] == [
        f"bold black on {INSERTED}", f"strike black on {DELETED}", f"bold black on {INSERTED}",
        f"bold black on {RAMP[4]}"]
    name = {token: tokenizer.decode([token]) for token in (5, 6, 7, 8, 9, 10, 11)}
    data = animation(trace, tokenizer)
    assert data["start"] == [name[5], "", name[6], "", name[7], name[8]]
    assert data["steps"] == [[(1, name[9], 2, 2), (2, name[6], None, 3), (3, name[10], 0, 2), (5, name[11], 4, 1)],
                             [(2, "", None, 0)]]  # what the last step deleted goes in a step of its own


@pytest.mark.parametrize("settings", [{}, {"edit_source": "masks", "edit_source_length": 5}])
def test_replaying_the_animation_of_edits_gives_every_canvas(edit_folder, tokenizer, settings):
    model = DiffusionLM.from_pretrained(edit_folder)
    mask = model.mask_token_id
    config = MDMGenerationConfig(alg="edit", steps=12, temperature=1.0, seed=3, num_return_sequences=2,
                                 flow_schedule="linear", **settings)
    denoising = Denoising(model, torch.tensor([[5, 6, *[mask] * 9, 7]]), config)
    traces = trace_rows(denoising)
    canvases = [[row.tolist()] for row in denoising.result().rows()]
    assert all(canvas[0].count(mask) == settings.get("edit_source_length", 0) for canvas in canvases)
    for step in denoising:
        for index, (trace, canvas) in enumerate(zip(traces, canvases, strict=True)):
            trace(step)
            tokens = step.tokens[index][step.visible[index]].tolist()
            canvas.extend([tokens] * (tokens != canvas[-1]))
    assert len({len(canvas[-1]) for canvas in canvases}) == 2  # texts of different lengths
    kinds = set()
    for trace, canvas in zip(traces, canvases, strict=True):
        data = animation(trace, tokenizer)
        frame = [(text, 0) for text in data["start"]]
        replayed = [frame]
        for changes in data["steps"]:
            frame = list(frame)
            for place, text, _, mark in changes:
                frame[place] = (text, mark)
                kinds.add(mark)
            replayed.append(frame)
        seen = ["".join(MASK_GLYPH if text is None else text for text, mark in frame if mark != 3)
                for frame in replayed]
        wanted = ["".join(MASK_GLYPH if token == mask else tokenizer.decode([token]) for token in tokens)
                  for tokens in canvas]
        assert seen[:len(wanted)] == wanted and set(seen[len(wanted):]) <= {wanted[-1]}
        assert len(seen) <= len(wanted) + 1 and not any(mark == 3 for _, mark in replayed[-1])
    assert {1, 2, 3} <= kinds


def test_watching_edits_shows_them_and_leaves_the_text(edit_folder, tokenizer):
    model, outs = DiffusionLM.from_pretrained(edit_folder), []
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, color_system="truecolor" if terminal else None, width=300)
        ids = tokenizer("def f(x, y):", return_tensors="pt")["input_ids"]
        denoising = Denoising(model, ids, MDMGenerationConfig(alg="edit", steps=8, seed=1),
                              editable=torch.arange(ids.shape[1]).unsqueeze(0) > 0)
        with watch(tokenizer, trace_rows(denoising), console) as on_step:
            text = tokenizer.decode(finish(denoising, on_step).sequences[0], skip_special_tokens=True)
        outs.append(out.getvalue())
    assert outs[1] == text + "\n" and len(text) > 3
    green = ";".join(str(int(INSERTED[i:i + 2], 16)) for i in (1, 3, 5))
    assert f"48;2;{green}m" in outs[0] and f"step 0, {ids.shape[1]} tokens" in outs[0] and " deleted " in outs[0]
    end = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", outs[0])
    assert text.split("\n")[0].rstrip() in end[end.rindex("step 8"):]
