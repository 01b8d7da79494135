"""The input pipeline against the training step that waits for it, at the demo's settings.

One thread beside the step makes batches fast enough for a machine that trains twenty times as fast.
"""

import time
from dataclasses import replace
from pathlib import Path

from dllm.config.reading import load_config
from dllm.data import open_training_data, read_corpus
from dllm.diffusion_lm import DiffusionLM
from dllm.model.families import FAMILIES, ModelConfig
from dllm.model.tokenizer import train_tokenizer
from dllm.training.batches import forward, make_batches
from dllm.training.optimizer import build_optimizers


def bench_make_batches(paired, monkeypatch, tmp_path):
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))
    root = Path(__file__).parents[1]
    config = load_config(root / "configs/demo.yaml", [f"--data.train_path={root / 'dllm'}"])
    corpus, group, settings = read_corpus(config.data), config.model, config.train
    tokenizer = train_tokenizer(corpus.texts(), group.vocab_size)
    model = DiffusionLM(ModelConfig(
        family=group.family, vocab_size=group.vocab_size, hidden_size=group.hidden_size,
        intermediate_size=group.intermediate_size, num_hidden_layers=group.num_hidden_layers,
        num_attention_heads=group.num_attention_heads, num_key_value_heads=group.num_key_value_heads,
        head_dim=group.hidden_size // group.num_attention_heads, tie_word_embeddings=group.tie_word_embeddings,
        shift_logits=group.shift_logits, mask_token_id=tokenizer.mask_token_id, **FAMILIES[group.family].fixed))
    optimizers = build_optimizers(model, settings)

    def make(data, step):
        return make_batches(data.rows, step, range(settings.rows_per_step), settings.rows_per_step, settings,
                            settings.seed, model)

    def train():
        for batch in batches:
            sums = forward(model, batch, model.head_weight.device)
            (sums.loss / batch.normaliser).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    # A stream tokenises while it is read: the mean over the steps that use up the first block of every lane.
    streamed = open_training_data(read_corpus(replace(config.data, datasets_type="iterable")), tokenizer, settings.seed,
                                  settings.rows_per_step)
    start, steps = time.perf_counter(), 0
    while min(lane[0] for lane in streamed.rows.state()["lanes"]) == 0:
        make(streamed, steps)
        steps += 1
    streamed_ms = 1e3 * (time.perf_counter() - start) / steps

    data = open_training_data(corpus, tokenizer, settings.seed, settings.rows_per_step)
    batches = make(data, 0)
    paired(ours=lambda: make(data, 0), baseline=train, at_least=20,
           tokens=sum(batch.tokens for batch in batches), streamed_ms=round(streamed_ms, 2))
