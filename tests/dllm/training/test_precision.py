"""`train.precision: auto`: bf16 on a CPU where a probe shows that it is faster; the run keeps what was found."""

import json
from dataclasses import replace

import pytest
import torch

import dllm.training.precision as precision
from dllm.cli import main
from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.model.families import FAMILIES, ModelConfig
from dllm.training.checkpoint import load_latest
from dllm.training.precision import Probe, probe, settle_precision
from dllm.training.trainer import train

FAST, SLOW = Probe("avx512_bf16", 0.2, 0.1), Probe("avx512_bf16", 0.1, 0.2)


@pytest.fixture
def make_config(corpus, tmp_path):
    def make(**keys) -> Config:
        return Config(model=ModelGroup(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=2, num_key_value_heads=1),
                      data=DataGroup(train_path=str(corpus), max_seq_len=48, validation_share=0.1),
                      train=TrainGroup(**{"output_dir": str(tmp_path / "run"), "lr": 3e-3, "micro_batch_size": 4,
                                          "num_train_epochs": 100, "device": "cpu", "use_tensorboard": False, **keys}))
    return make


def found(monkeypatch, result):
    monkeypatch.setattr(precision, "probe", lambda *_: result)


def losses(result) -> list[float]:
    return [line["loss"] for line in result.history]


@pytest.mark.parametrize("result, wanted", [(FAST, "bf16"), (SLOW, "fp32"), (None, "fp32"),
                                            (Probe("amx_bf16", 0.105, 0.1), "fp32")])  # 5% is not worth it
def test_auto_takes_what_the_probe_shows(make_config, monkeypatch, result, wanted, capsys):
    found(monkeypatch, result)
    auto = train(make_config(max_steps=3))
    assert f"parameters on cpu, {wanted}" in capsys.readouterr().err
    state = load_latest(auto.output_dir / "checkpoints").state
    assert state["config"]["train"]["precision"] == wanted
    assert state["probe"] == (result and {"units": result.units, "fp32_seconds": result.fp32_seconds,
                                          "bf16_seconds": result.bf16_seconds, "precision": wanted})
    named = train(make_config(max_steps=3, precision=wanted, output_dir=str(auto.output_dir) + "-named"))
    assert losses(named) == losses(auto)


def test_bf16_losses_stay_near_those_of_fp32(make_config, tmp_path):
    runs = [train(make_config(max_steps=20, precision=name, output_dir=str(tmp_path / name)))
            for name in ("fp32", "bf16")]
    first, second = map(losses, runs)
    assert first != second
    assert all(abs(b - a) <= 0.02 * a for a, b in zip(first, second, strict=True))
    assert abs(runs[1].history[-1]["validation_loss"] / runs[0].history[-1]["validation_loss"] - 1) <= 0.02


@pytest.mark.parametrize("before, later", [(FAST, SLOW), (SLOW, FAST), (FAST, None)])
def test_a_resumed_run_keeps_its_arithmetic_bit_for_bit(make_config, monkeypatch, tmp_path, before, later):
    found(monkeypatch, before)
    whole = train(make_config(max_steps=6, output_dir=str(tmp_path / "whole")))
    train(make_config(max_steps=3))
    found(monkeypatch, later)
    assert losses(train(make_config(max_steps=6)))[3:] == losses(whole)[3:]


def test_a_run_older_than_the_probe_goes_on_in_fp32_and_a_named_precision_wins(make_config, monkeypatch):
    found(monkeypatch, SLOW)
    run = train(make_config(max_steps=2))
    checkpoint = load_latest(run.output_dir / "checkpoints")
    checkpoint.state["config"]["train"]["precision"] = "auto"
    torch.save(checkpoint.state, checkpoint.folder / "trainer_state.pt")
    (checkpoint.folder / "manifest.json").write_text("{}")  # nothing to compare with
    found(monkeypatch, FAST)
    again = train(make_config(max_steps=4))
    assert load_latest(again.output_dir / "checkpoints").state["config"]["train"]["precision"] == "fp32"
    last = train(make_config(max_steps=5, precision="bf16"))
    assert load_latest(last.output_dir / "checkpoints").state["config"]["train"]["precision"] == "bf16"


def test_the_manifest_of_an_export_has_the_probe(make_config, monkeypatch, tmp_path):
    found(monkeypatch, FAST)
    run = train(make_config(max_steps=1))
    assert main(["export", str(run.output_dir), "--output-dir", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "dllm_run.json").read_text())
    assert manifest["precision_probe"]["bf16_seconds"] == 0.1 and manifest["config"]["train"]["precision"] == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "llada2_moe"])
def test_a_probe_measures_both_and_changes_nothing(family, monkeypatch):
    monkeypatch.setattr(precision, "processor_flags", lambda: {"avx2", "avx512_bf16"})
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192} if "moe" in family else {}
    config = ModelConfig(family=family, vocab_size=300, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=64, mask_token_id=299,
                         **{**FAMILIES[family].fixed, "block_causal": False, **experts})
    state = torch.get_rng_state()
    measured = probe(config, 64)
    assert torch.equal(torch.get_rng_state(), state) and measured.units == "avx512_bf16"
    assert 0 < measured.fp32_seconds < 5 and 0 < measured.bf16_seconds < 5
    assert probe(replace(config, hidden_size=16), 64) is None  # casts would cost more
    for large in (replace(config, hidden_size=16384), replace(config, vocab_size=10**6)):
        assert probe(large, 10**6).bf16_seconds < 5


def test_a_processor_without_units_is_not_measured(monkeypatch, make_config):
    monkeypatch.setattr(precision, "processor_flags", lambda: {"avx512f"})
    monkeypatch.setattr(precision, "time_both", lambda run: pytest.fail("measured"))
    assert probe() is None
    from dllm.training.distributed import World

    config, result = settle_precision(make_config(), None, None, World(0, 1, torch.device("cpu")))
    assert config.train.precision == "fp32" and result is None


def test_the_doctor_and_the_plan_tell_the_probe(make_config, capsys, tmp_path, monkeypatch):
    found(monkeypatch, FAST)
    monkeypatch.setattr("dllm.doctor.probe", lambda: FAST)
    told = "avx512_bf16: a layer and the head take 100 ms in bf16, 200 ms in fp32; train.precision=auto takes bf16"
    assert main(["doctor"]) == 0 and told in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(make_config(max_steps=3).to_yaml())
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    assert f"arithmetic: bf16 ({told})" in capsys.readouterr().out
