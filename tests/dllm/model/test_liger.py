"""Layers by Liger-Kernel against PyTorch's, in Triton's interpreter (wrong on bf16) or on a GPU.

Without a GPU the first test runs this file again in a process of its own.
"""

import importlib.metadata
import os
import tomllib
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch.distributed.fsdp import fully_shard

from dllm.cli import main
from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.model import liger
from dllm.model.layouts import Packed, Padded
from dllm.model.rotary import rotate
from dllm.training.lora import add_adapters
from dllm.training.trainer import train
from tests.dllm.tiny_models import tiny

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS = INTERPRETED or torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
MODELS = {
    "llama": {"family": "llama", "qk_norm": False},
    "qwen2": {"family": "qwen2", "qk_norm": False, "qkv_bias": True},
    "qwen3": {},
    "partial": {"family": "llada2_moe", "partial_rotary_factor": 0.5, "num_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 12, "num_shared_experts": 1},
    "scaled": {"family": "llama", "qk_norm": False, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2, "llama_4_scaling_beta": 0.5}},
}
installed = pytest.mark.skipif(liger.missing() is not None, reason=f"layers by Liger-Kernel: {liger.missing()}")
computed = [installed, pytest.mark.skipif(not RUNS, reason="needs a GPU or Triton's interpreter")]


def where_liger_runs(test):
    for mark in computed:
        test = mark(test)
    return test


@installed
@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="the tests below run in this process")
def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def compare(ours, eager, *inputs):
    """Values and gradients: at most twice the error of eager, both measured from float64."""
    def run(function, tensors):
        tensors = [x.detach().clone().requires_grad_() for x in tensors]
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        upstream = [torch.randn(x.shape, device=DEVICE).to(inputs[0].dtype).to(x.dtype) for x in outputs]
        return *outputs, *torch.autograd.grad([x * 1 for x in outputs], tensors, upstream)

    exact = run(eager, [x.double() for x in inputs])
    for mine, its, true in zip(run(ours, inputs), run(eager, inputs), exact, strict=True):
        assert mine.dtype == its.dtype and mine.shape == its.shape
        if true.numel():
            bound = 2 * (its - true).abs().max() + 2 * torch.finfo(mine.dtype).eps * true.abs().max()
            assert (mine - true).abs().max() <= bound


@where_liger_runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 40), (2, 3, 4, 8), (0, 5, 24), (2, 1300)], ids=str)
def test_norms_and_products_are_pytorchs(dtype, shape):
    torch.manual_seed(0)
    compare(lambda x, weight: liger.rms_norm(x, weight, 1e-5),
            lambda x, weight: F.rms_norm(x, shape[-1:], weight, 1e-5),
            draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype))
    compare(liger.silu_times, lambda gate, up: F.silu(gate) * up, draw(*shape, dtype=dtype), draw(*shape, dtype=dtype))


@where_liger_runs
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_norms_round_once(dtype):
    """Rounded before the weight too, as Llama's are, the mean error would be 1.4 times that of PyTorch."""
    torch.manual_seed(0)
    x, weight = draw(20, 100, dtype=dtype), draw(100, dtype=dtype)
    exact = F.rms_norm(x.double(), (100,), weight.double(), 1e-5)
    ours, its = ((norm - exact).abs().mean() for norm in (liger.rms_norm(x, weight, 1e-5),
                                                          F.rms_norm(x, (100,), weight, 1e-5)))
    assert ours <= 1.05 * its


@where_liger_runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, L, H, Hkv, E, turned", [
    (1, 1, 1, 1, 2, 2), (2, 5, 3, 1, 8, 8), (3, 4, 4, 2, 24, 24), (2, 3, 4, 2, 8, 4), (0, 3, 4, 2, 8, 8),
    (1, 0, 4, 2, 8, 8)])
def test_rotation_is_pytorchs_with_a_position_for_each_token(dtype, B, L, H, Hkv, E, turned):
    torch.manual_seed(0)
    angles = torch.randn(B, L, 1, turned // 2, device=DEVICE).repeat(1, 1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    compare(lambda q, k: liger.rotate(q * 1, k * 1, cos, sin),
            lambda q, k: (rotate(q, cos.to(q.dtype), sin.to(q.dtype)), rotate(k, cos.to(q.dtype), sin.to(q.dtype))),
            draw(B, L, H, E, dtype=dtype), draw(B, L, Hkv, E, dtype=dtype))


@where_liger_runs
def test_a_graph_that_liger_has_overwritten_is_refused():
    gate, up = draw(3, 8), draw(3, 8)
    product = liger.silu_times(gate * 1, up * 1).sum()
    product.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


LAYOUTS = {
    "padded": Padded(torch.tensor([[True] * 7, [False] * 3 + [True] * 4])),
    "packed": Packed(torch.tensor([0, 3, 9, 14], dtype=torch.int32), 6),
}


def both(name="qwen3", **changes) -> tuple[DiffusionLM, DiffusionLM, torch.Tensor]:
    """The same model by Liger and by PyTorch, and tokens [2, 7]."""
    ours = tiny(**MODELS[name], **changes).to(DEVICE).train()
    theirs = deepcopy(ours)
    ours.layers_backend, theirs.layers_backend = "liger", "torch"
    return ours, theirs, torch.randint(60, (2, 7), device=DEVICE)


def check_same(ours, theirs, run, near=1e-5):
    hidden = []
    for model in (ours, theirs):
        hidden.append(run(model))
        torch.manual_seed(1)
        upstream = torch.randn_like(hidden[-1])
        kept = upstream.clone()
        hidden[-1].backward(upstream)
        assert upstream.equal(kept), "the caller's gradient was written to"
    torch.testing.assert_close(*hidden, rtol=near, atol=near)
    for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if its.grad is not None:
            grad = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
            torch.testing.assert_close(grad, its.grad, rtol=near, atol=near * its.grad.abs().max().item(), msg=name)
        else:
            assert mine.grad is None, name


@where_liger_runs
@pytest.mark.parametrize("name, layout, checkpointing", [
    ("llama", "padded", False), ("qwen2", "packed", False), ("qwen3", "packed", False), ("qwen3", "padded", True),
    ("partial", "padded", False), ("scaled", "packed", False)])
def test_models_and_their_gradients_are_pytorchs(name, layout, checkpointing):
    ours, theirs, tokens = both(name)
    ours.checkpointing = checkpointing
    layout = LAYOUTS[layout]
    lies = {"key_mask": layout.key_mask.to(DEVICE)} if layout.key_mask is not None else {
        "cu_seqlens": layout.cu_seqlens.to(DEVICE), "max_seqlen": layout.max_seqlen}
    check_same(ours, theirs, lambda model: model.hidden_states(tokens, type(layout)(**lies)))


@where_liger_runs
def test_adapters_are_trained_alike():
    ours, theirs, tokens = both()
    for model in (ours, theirs):
        torch.manual_seed(2)
        add_adapters(model, rank=2, alpha=4.0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    check_same(ours, theirs, lambda model: model.hidden_states(tokens))


@where_liger_runs
def test_half_precision_by_autocast_is_pytorchs():
    def run(model):
        with torch.autocast(DEVICE, torch.float16):
            return model.hidden_states(tokens).float()

    ours, theirs, tokens = both(initializer_range=0.1)
    check_same(ours, theirs, run, near=2e-2)


@where_liger_runs
def test_a_compiled_layer_calls_liger_between_its_graphs():
    ours, theirs, tokens = both()
    ours.model.layers[0].compile(backend="eager")
    check_same(ours, theirs, lambda model: model.hidden_states(tokens))


@where_liger_runs
def test_sharded_layers_are_trained_alike():
    ours, theirs, tokens = both()
    dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh(DEVICE, (1,))
        for module in (*ours.model.layers, ours):
            fully_shard(module, mesh=mesh)
        check_same(ours, theirs, lambda model: model(tokens).logits)
    finally:
        dist.destroy_process_group()


@where_liger_runs
@pytest.mark.parametrize("settings", [{}, {"cache": "dual", "block_length": 2}])
def test_sampling_gives_the_same_tokens(settings):
    ours, theirs, tokens = both()
    ours, theirs = (model.eval().diffusion_generate(tokens, max_new_tokens=4, steps=2, seed=1, temperature=0.5,
                                                    **settings).sequences for model in (ours, theirs))
    assert ours.equal(theirs)


@where_liger_runs
def test_a_run_trains_by_the_layers_that_it_names(corpus, tmp_path, monkeypatch):
    computed, losses = [], {}
    monkeypatch.setattr(liger, "silu_times", lambda *x, run=liger.silu_times: computed.append(1) or run(*x))
    for name in ("torch", "liger"):
        assert not computed
        run = train(Config(
            model=ModelGroup(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1),
            data=DataGroup(train_path=str(corpus), max_seq_len=16, validation_share=0.1),
            train=TrainGroup(output_dir=str(tmp_path / name), device=DEVICE, layers_backend=name, precision="fp32",
                             micro_batch_size=2, lr=3e-3, max_steps=1, eval_tokens=16)))
        losses[name] = [value for line in run.history for key, value in line.items() if key.endswith("loss")]
    assert computed and losses["liger"] == pytest.approx(losses["torch"], rel=1e-5)


@pytest.fixture
def version(monkeypatch):
    """Sets the version of Liger-Kernel that is found, None for none."""
    def set_version(found):
        def read(name):
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", read)
        liger.missing.cache_clear()

    yield set_version
    liger.missing.cache_clear()


def test_auto_takes_liger_on_cuda_where_it_is_installed_and_torch_never(version, monkeypatch):
    layer, other = tiny().model.norm, tiny()
    other.layers_backend = "torch"
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    version("0.8.10")
    assert layer.by_liger(x) and not other.model.norm.by_liger(x)
    assert not layer.by_liger(SimpleNamespace(is_cuda=True, dtype=torch.float64))
    assert not layer.by_liger(SimpleNamespace(is_cuda=False, dtype=torch.bfloat16))
    for found in (None, "0.5.8"):
        version(found)
        assert not layer.by_liger(x)
    version("0.8.5")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not layer.by_liger(x)


@pytest.mark.parametrize("found, said", [(None, "not installed"), ("0.5.8", "not 0.5.8")])
def test_liger_asked_for_and_not_there_is_an_error(version, found, said):
    version(found)
    with pytest.raises(UserError, match=f"^layers_backend is liger, which needs liger-kernel 0.8.5 or newer, {said}: "
                                        r"pip install 'dllm\[liger\]'; or set it to torch$"):
        tiny().layers_backend = "liger"
    with pytest.raises(UserError, match="^layers_backend must be one of auto, torch, liger, not 'triton'$"):
        tiny().layers_backend = "triton"


def test_liger_refuses_tensors_that_it_does_not_take(version, model_folder):
    version("0.8.5")
    model = DiffusionLM.from_pretrained(model_folder, torch.float64, layers_backend="liger")
    assert model.layers_backend == "liger"
    with pytest.raises(UserError, match="^layers_backend is liger, which takes fp32, fp16 and bf16 on CUDA, not "
                                        "float64 on cpu; set it to torch or auto$"):
        model(torch.tensor([[1]]))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_on_a_cpu_auto_is_pytorch_and_liger_an_error(version):
    version("0.8.5")
    auto, torchs, ligers = (tiny() for _ in range(3))
    torchs.layers_backend, ligers.layers_backend = "torch", "liger"
    tokens = torch.tensor([[1, 2, 3]])
    assert auto.hidden_states(tokens).equal(torchs.hidden_states(tokens))
    with pytest.raises(UserError, match="not float32 on cpu; set it to torch or auto"):
        ligers.hidden_states(tokens)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_a_command_passes_the_name_on(version, model_folder, capsys):
    version("0.8.5")
    asked = "--prompt", "x", "--max-new-tokens", "2", "--steps", "2", "--device", "cpu"
    assert main(["sample", str(model_folder), *asked, "--layers-backend", "torch"]) == 0
    capsys.readouterr()
    assert main(["sample", str(model_folder), *asked, "--layers-backend", "liger"]) == 2
    assert capsys.readouterr().err == ("dllm: error: layers_backend is liger, which takes fp32, fp16 and bf16 on CUDA, "
                                       "not float32 on cpu; set it to torch or auto\n")


def test_the_extra_asks_for_the_oldest_version_that_is_taken():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    wanted, = project["optional-dependencies"]["liger"]
    assert str(Requirement(wanted).specifier) == f">={liger.OLDEST}"
