"""Training of edit flows: micro-batches, resuming, several processes, heads for any model, bad input."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dllm import DiffusionLM, UserError
from dllm.config.schema import ModelGroup, TrainGroup
from dllm.data import PackedDataset
from dllm.model.growth import add_edit_heads
from dllm.training.batches import forward, make_batches
from dllm.training.trainer import train
from tests.dllm.tiny_models import tiny_of
from tests.dllm.training.test_distributed import assert_close, read, run

SOURCES = [{}, {"edit_source": "masks", "edit_source_length": 5}, {"edit_source": "uniform", "edit_source_length": 6},
           {"edit_source": "uniform", "edit_source_length": 6, "edit_propagation": 2.0}]


@pytest.fixture
def make_config(make_short_run):
    return partial(make_short_run, objective="edit", max_steps=8, save_steps=4)


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("family", ["qwen3", "a2d-qwen3"])
def test_micro_batches_of_any_size_give_the_gradients_of_the_whole(family, source):
    generator = torch.Generator().manual_seed(0)
    dataset = PackedDataset([torch.randint(60, (int(n),), generator=generator)
                             for n in torch.randint(2, 30, (50,), generator=generator)], 16)
    model = add_edit_heads(tiny_of(family, vocab_size=64, mask_token_id=63), "all" if source else "insert")
    gradients = []
    for size in (12, 4, 1):
        settings = TrainGroup(output_dir="x", objective="edit", micro_batch_size=size, global_batch_size=12, **source)
        batches = make_batches(dataset, 5, range(12), 12, settings, 1, model)
        assert sum(batch.scored for batch in batches) > 0
        loss = sum(forward(model, b, torch.device("cpu")).loss for b in batches) / sum(b.normaliser for b in batches)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES[:2], ids=str)
def test_a_run_lowers_its_loss_and_its_folder_is_sampled_as_it_was_trained(make_config, source):
    result = train(make_config(max_steps=40, **source))
    history = result.history
    assert sum(line["nll"] for line in history[-5:]) < 0.9 * sum(line["nll"] for line in history[:5])
    last = history[-1]
    assert "validation_loss" in last and not {"validation_bound", "validation_bits_per_byte"} & last.keys()
    model = DiffusionLM.from_pretrained(result.checkpoint)
    assert model.config.edit_heads == ("all" if source else "insert")
    assert model.generation_defaults["alg"] == "edit" and source.items() <= model.generation_defaults.items()
    out = model.diffusion_generate(torch.tensor([[5, 6, 7]]), steps=20, max_new_tokens=30, seed=0, temperature=1.0)
    assert out.sequences[0, :3].tolist() == [5, 6, 7] and out.attention_mask is not None


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(make_config, tmp_path):
    config = make_config(edit_source="uniform", edit_source_length=6)
    whole = train(config)
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "run", folder)
    shutil.rmtree(folder / "checkpoints" / "global_step_8")
    again = train(replace(config, train=replace(config.train, output_dir=str(folder))))
    assert [line["step"] for line in again.history][-4:] == [5, 6, 7, 8]
    assert read(folder) == read(tmp_path / "run")
    ours, theirs = (DiffusionLM.from_pretrained(result.checkpoint).state_dict() for result in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("source", [{}, {"edit_source": "uniform", "edit_source_length": 2}], ids=str)
def test_two_processes_equal_one_also_where_a_micro_batch_has_no_edit_of_a_head(make_config, tmp_path, source):
    config = make_config(micro_batch_size=1, global_batch_size=2, max_steps=4, save_steps=0, max_grad_norm=0.0,
                         **source)
    for processes, mode in ((1, "ddp"), (2, "ddp"), (2, "fsdp2")):
        output = tmp_path / f"{processes}{mode}"
        path = output.with_suffix(".yaml")
        path.write_text(replace(config, train=replace(config.train, output_dir=str(output),
                                                      data_parallel_mode=mode)).to_yaml())
        run(processes, path)
    for mode in ("ddp", "fsdp2"):
        assert_close(read(tmp_path / f"2{mode}"), read(tmp_path / "1ddp"), 1e-5)


@pytest.mark.slow
def test_a_model_without_heads_gets_them_lora_trains_them_and_more_kinds_of_edits_can_come(make_config, model_folder,
                                                                                           tmp_path):
    config = make_config(max_steps=2, lora_rank=2, save_steps=0)
    config = replace(config, model=ModelGroup(model_path=str(model_folder)))
    before = DiffusionLM.from_pretrained(model_folder)
    model = DiffusionLM.from_pretrained(train(config).checkpoint)
    assert not torch.equal(model.insert_head.weight, before.head_weight) and model.rate_head.bias.any()
    assert torch.equal(model.head_weight, before.head_weight) and model.config.edit_heads == "insert"
    again = replace(config, model=ModelGroup(model_path=str(Path(config.train.output_dir) /
                                                            "checkpoints/global_step_2/hf_ckpt")),
                    train=replace(config.train, output_dir=str(tmp_path / "second"), edit_source="masks",
                                  edit_source_length=4, lora_rank=0))
    assert DiffusionLM.from_pretrained(train(again).checkpoint).config.edit_heads == "all"


@pytest.mark.parametrize("keys, message", [
    ({"objective": "mdm", "edit_source": "masks"}, "train.edit_source masks needs train.objective=edit, not 'mdm'"),
    ({"objective": "elbo", "edit_propagation": 1.0}, "train.edit_propagation 1.0 needs train.objective=edit"),
    ({"block_length": 4}, "train.objective=block_diffusion and train.block_length"),
    ({"path_term": True}, "train.path_term True needs train.objective=mdm"),
    ({"anneal_attention_ratio": 0.5}, "train.anneal_attention_ratio 0.5 needs train.objective=mdm or elbo"),
    ({"ulysses_parallel_size": 2}, "train.objective=edit learns from edits anywhere in a row"),
    ({"edit_source_length": 8}, "needs train.edit_source=masks or uniform, for the empty source has no tokens"),
    ({"edit_source": "words"}, "train.edit_source must be none or one of empty, masks, uniform, not 'words'")])
def test_keys_that_do_not_go_together_are_refused_with_the_remedy(make_config, keys, message):
    with pytest.raises(UserError) as error:
        make_config(**keys)
    assert message in str(error.value)


def test_models_that_edits_do_not_fit_are_refused(make_config, model_folder, tmp_path):
    config = make_config(edit_source="masks", edit_source_length=300)
    with pytest.raises(UserError, match="may need 348 positions, the model has 256; lower one of them"):
        train(replace(config, model=ModelGroup(model_path=str(model_folder))))
    folder = tmp_path / "blocks"
    shutil.copytree(model_folder, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "block_size": 4}))
    with pytest.raises(UserError, match="choose a model without blocks"):
        train(replace(make_config(), model=ModelGroup(model_path=str(folder))))
