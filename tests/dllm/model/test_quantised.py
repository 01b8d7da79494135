"""Models with int8 linear maps: what they compute, the folders that hold them, what is refused."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm.cli import main
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.model import quantised
from dllm.model.loading import load_with_tokenizer
from tests.dllm.tiny_models import tiny, tiny_of

needs_torchao = pytest.mark.skipif("not __import__('importlib').util.find_spec('torchao')",
                                   reason="torchao is not installed: pip install 'dllm[quant]'")
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """The tiny model's folder with generation defaults and code, quantised by the command."""
    pytest.importorskip("torchao")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("quantised") / "int8"
    for file in model_folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"auto_map": {"AutoModel": "modeling.Model"}}))
    (source / "modeling.py").write_text("raise SystemExit('never run')\n")
    (source / "generation_config.json").write_text(json.dumps({"steps": 3}))
    assert main(["quantize", str(source), "--bits", "8", "--output", str(output)]) == 0
    return output


@needs_torchao
@pytest.mark.parametrize("family", ["Dream", "llada", "qwen3"])  # with biases, other names, norms of queries
def test_a_folder_gives_the_model_quantised_in_memory(family, tmp_path):
    model = tiny_of(family, mask_token_id=60, hidden_size=32)
    quantised.quantise(model, 8)
    model.save_pretrained(tmp_path)
    loaded = DiffusionLM.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert sum(hasattr(tensor, "qdata") for tensor in theirs.values()) == 7 * 3
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_errs_by_half_a_step_of_its_row(dtype):
    exact, model = tiny(), tiny().to(dtype)
    before = {name: module.weight.double() for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and ".layers." in name}
    quantised.quantise(model, 8)
    for name, weight in before.items():
        after = model.get_submodule(name).weight
        step = weight.abs().amax(1, keepdim=True) / 127.5
        assert ((after.qdata.double() * after.scale.double() - weight).abs() <= 0.51 * step).all()
    with torch.no_grad():
        hidden, ours = exact.hidden_states(IDS), model.hidden_states(IDS).float()
    error = (ours - hidden).norm() / hidden.norm()
    assert 0 < error < 0.05


@needs_torchao
def test_what_lies_in_the_folder(folder, model_folder):
    raw, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert raw["quantization_config"] == {"quant_method": "dllm", "bits": 8}
    source = load_file(model_folder / "model.safetensors")
    assert weights.keys() - source.keys() == {f"{name}_scale" for name in source if name.endswith("proj.weight")}
    assert all((weights[name].dtype == torch.int8) == name.endswith("proj.weight") for name in source)
    assert json.loads((folder / "generation_config.json").read_text()) == {"steps": 3}
    assert (folder / "modeling.py").exists() and not [*folder.glob(".*")]
    model, tokenizer = load_with_tokenizer(folder)
    assert model.mask_token_id == tokenizer.mask_token_id
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@needs_torchao
def test_the_commands_take_the_folder(folder, tmp_path, capsys):
    settings = ["--max-new-tokens=4", "--steps=2", "--device=cpu"]
    assert main(["sample", str(folder), "--prompt=def", *settings]) == 0
    assert capsys.readouterr().out.startswith("def")
    assert main(["infill", str(folder), "--prefix=def", "--suffix=x", "--length=3", "--steps=2", "--device=cpu",
                 "--dtype=bfloat16"]) == 0
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "def add(x, y):\n    return x + y\n" * 20}) + "\n")
    assert main(["eval", "perplexity", str(folder), "--data", str(text), "--windows=2", "--samples=1",
                 "--max-seq-len=16", "--device=cpu"]) == 0


@needs_torchao
def test_training_on_it_and_quantising_it_again_are_refused(folder, corpus, tmp_path, capsys):
    assert main(["train", f"--model.model_path={folder}", f"--data.train_path={corpus}",
                 f"--train.output_dir={tmp_path / 'run'}"]) == 2
    assert main(["quantize", str(folder), "--output", str(tmp_path / "twice")]) == 2
    assert main(["quantize", str(folder), "--output", str(folder)]) == 2
    trained, twice, over = capsys.readouterr().err.splitlines()
    assert "not supported for qwen3; take the checkpoint that it was quantised from" in trained
    assert "this qwen3 is quantised already" in twice and not (tmp_path / "twice").exists()
    assert "int8 is there already; name a new folder" in over
    with pytest.raises(UserError, match="overflow in float16; choose another dtype"):
        DiffusionLM.from_pretrained(folder, "float16")


@needs_torchao
def test_weights_that_are_not_as_config_json_promises(folder, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    broken = ({key: value for key, value in weights.items() if key != f"{name}_scale"},
              weights | {name: weights[name].float()}, weights | {f"{name}_scale": weights[f"{name}_scale"][:-1]},
              {key: value.float() for key, value in weights.items() if not key.endswith("_scale")})
    for state, named in zip(broken, (name, name, name, "no weight"), strict=True):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"{named} .* quantise the model again"):
            DiffusionLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("made, bits, message", [
    (tiny, 4, "bits 4 is not supported: .* use 8"), (tiny, 3, "bits must be 8, not 3"),
    (lambda: tiny_of("llada_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8), 8,
     "layers with experts"),
    (lambda: tiny(edit_heads="all"), 8, "has heads for edits")])
def test_what_cannot_be_quantised(made, bits, message):
    with pytest.raises(UserError, match=message):
        quantised.quantise(made(), bits)


def test_a_diffusion_gemma_is_refused(gemma_folder, tmp_path, capsys):
    assert main(["quantize", str(gemma_folder), "--output", str(tmp_path / "int8")]) == 2
    assert "is a DiffusionGemma, which cannot be quantised" in capsys.readouterr().err


def test_without_torchao_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"need torchao 0.18 or newer: pip install 'dllm\[quant\]'"):
        quantised.quantise(tiny(), 8)
