"""Edit flows: a training step on rows of edits against one on masked rows, per token of the canvas."""

from pathlib import Path

import torch

from dllm.config.reading import load_config
from dllm.data import open_training_data, read_corpus
from dllm.diffusion_lm import DiffusionLM
from dllm.model.growth import add_edit_heads
from dllm.training.batches import forward, make_batches
from dllm.training.build import choose_model

ROWS = 16


def bench_edit_step(paired, tmp_path):
    """Corruption, forward and backward. A canvas of edits has fewer tokens than its rows, so it gets more rows."""
    root = Path(__file__).parents[1]
    config = load_config(root / "configs/demo.yaml", [
        f"--train.output_dir={tmp_path}", f"--data.train_path={root / 'dllm'}", "--train.device=cpu",
        "--data.validation_share=0", "--train.objective=edit", "--train.micro_batch_size=64"])
    masked = load_config(root / "configs/demo.yaml", [
        f"--train.output_dir={tmp_path}", "--train.micro_batch_size=64"]).train
    corpus = read_corpus(config.data)
    tokenizer, model_config, _ = choose_model(config, lambda: corpus, None)
    torch.manual_seed(0)
    model = DiffusionLM(model_config)
    add_edit_heads(model, "insert")
    source = open_training_data(corpus, tokenizer, 0, ROWS).rows

    def batch_of(settings, rows):
        (batch,) = make_batches(source, 0, range(rows), rows, settings, 0, model)
        return batch

    tokens = batch_of(masked, ROWS).tokens
    rows = next(rows for rows in range(ROWS, 64) if batch_of(config.train, rows).tokens >= tokens)

    def step(settings, rows):
        batch = batch_of(settings, rows)
        model.zero_grad(set_to_none=True)
        (forward(model, batch, torch.device("cpu")).loss / batch.normaliser).backward()
        return batch.tokens

    paired(ours=lambda: step(config.train, rows), baseline=lambda: step(masked, ROWS), at_least=1 / 1.25, rounds=20,
           canvas_tokens=batch_of(config.train, rows).tokens, masked_tokens=tokens, edit_rows=rows)
