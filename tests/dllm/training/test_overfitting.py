"""A tiny model learns 64 lines by heart, at any share of masking, and then writes each of them exactly."""

import json

import pytest
import torch

from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.data import open_training_data, read_corpus
from dllm.diffusion_lm import DiffusionLM
from dllm.generation.config import MDMGenerationConfig
from dllm.model.tokenizer import load_tokenizer
from dllm.training.batches import forward, make_batches
from dllm.training.trainer import train

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
NAMES = ["alpha", "bravo", "delta", "gamma", "omega", "sigma", "theta", "kappa"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Each line is the answer to a question that is never masked, so a fully masked line is determined."""
    folder = tmp_path_factory.mktemp("overfitting")
    lines = [f"    {one}_{other} = max({other}[{i}], {one} + {j})" for i, one in enumerate(NAMES)
             for j, other in enumerate(NAMES)]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"line {number}"}, {"role": "assistant", "content": line}]}) + "\n"
        for number, line in enumerate(lines)))
    (folder / "template.jinja").write_text(TEMPLATE)
    return Config(
        model=ModelGroup(vocab_size=400, hidden_size=96, intermediate_size=192, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2),
        data=DataGroup(train_path=str(folder / "lines.jsonl"), data_type="conversation", text_keys="messages",
                       chat_template=str(folder / "template.jinja"), max_seq_len=128, validation_share=0.0),
        train=TrainGroup(output_dir=str(folder / "run"), device="cpu", objective="mdm", lr=4e-3, max_steps=400,
                         optimizer="muon", lr_decay_style="linear", lr_warmup_ratio=0.05, micro_batch_size=8,
                         num_train_epochs=10_000, log_steps=50))


@pytest.mark.slow
def test_64_lines_are_learnt_by_heart_at_every_share_masked_and_written_exactly(config):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = train(config)
    torch.set_num_threads(threads)
    model = DiffusionLM.from_pretrained(result.checkpoint)
    tokenizer = load_tokenizer(result.checkpoint)
    data = open_training_data(read_corpus(config.data), tokenizer, 0)
    settings = TrainGroup(output_dir="x", objective="elbo", micro_batch_size=8)
    with torch.no_grad():
        sums = torch.stack([forward(model, batch, model.device).by_ratio for step in range(20) for batch in
                            make_batches(data.rows, step, range(8), 8, settings, 1, model, by_ratio=True)]).sum(0)
    assert (sums[1] > 100).all() and (sums[0] / sums[1] < 0.05).all(), sums[0] / sums[1]

    written = set()
    packed = data.rows.read(range(data.rows_per_epoch))
    for first, last in packed.cu_seqlens.unfold(0, 2, 1).tolist():
        tokens, answer = packed.tokens[first:last], packed.trainable[first:last]
        begin, end = answer.nonzero()[0].item(), answer.nonzero()[-1].item() + 1
        filled = model.infill(tokens[None, :begin], tokens[None, end:], length=end - begin,
                              generation_config=MDMGenerationConfig(steps=4, temperature=0.0))
        assert torch.equal(filled.sequences[0], tokens), tokenizer.decode(filled.sequences[0])
        written.add(tokenizer.decode(tokens[begin:end]))
    assert len(written) == 64
