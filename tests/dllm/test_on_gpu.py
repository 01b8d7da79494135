"""Training, sampling and judging on a GPU give the results of a CPU, and wait for it no more than promised.

Without a GPU, all tests run on a stand-in that computes on the CPU (tests/stand_in_gpu.py).
"""

import subprocess
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.data import Document
from dllm.diffusion_lm import DiffusionLM
from dllm.evaluators.held_out import HeldOutSettings
from dllm.evaluators.likelihood import bound_likelihood, masked_accuracy
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import infill
from dllm.generation.sampler import generate, start
from dllm.model.families import ModelConfig
from dllm.training.trainer import train
from dllm_kernels import linear_masked_cross_entropy, native_extension

RUNS = torch.cuda.is_available()
pytestmark = pytest.mark.gpu


@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="the tests below run in this process")
def test_on_a_stand_in():
    if reason := native_extension.why_unbuildable():
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "tests.stand_in_gpu", "-p", "no:cacheprovider",
                           __file__], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def where_there_is_a_gpu(request):
    if not RUNS and request.function is not test_on_a_stand_in:
        pytest.skip("needs a GPU")


@pytest.fixture
def make_config(corpus, tmp_path):
    def make(device: str, model_path: Path | None = None, **train_keys) -> Config:
        sizes = {} if model_path else {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32,
                                       "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        keys = {"output_dir": str(tmp_path / device), "lr": 3e-3, "micro_batch_size": 2, "max_steps": 2,
                "num_train_epochs": 100, "precision": "fp32", **train_keys}
        return Config(model=ModelGroup(model_path=model_path and str(model_path), **sizes),
                      data=DataGroup(train_path=str(corpus), max_seq_len=24, validation_share=0.1),
                      train=TrainGroup(device=device, **keys))
    return make


@pytest.mark.parametrize("keys", [
    {"objective": "mdm", "path_term": True, "global_batch_size": 4},
    {"objective": "elbo", "optimizer": "muon", "enable_gradient_checkpointing": True},
    {"objective": "block_diffusion", "block_length": 8, "causal_blocks": True}, {"objective": "ar", "lora_rank": 2},
    {"objective": "expansion", "expand_token_id": 299}, {"objective": "cart"},
    {"objective": "uniform", "uniform_share": 0.3, "self_conditioning": 1.0},
    {"objective": "mdm", "anneal_attention_ratio": 0.7},
    {"objective": "mdm", "precision": "bf16"}], ids=str)
def test_training_equals_that_on_a_cpu(make_config, keys):
    """Muon and bf16 round differently on each."""
    near = 2e-2 if {"optimizer", "precision"} & {*keys} else 1e-4
    ours, theirs = (train(make_config(device, **keys)).history for device in ("cuda", "cpu"))
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=near)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=10 * near)
    assert ours[-1]["validation_loss"] == pytest.approx(theirs[-1]["validation_loss"], rel=near)
    assert "peak_memory_gib" in ours[-1]


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_of_hidden_states_never_waits(reduction, count):
    hidden, head = (torch.randn(size, 8, device="cuda").requires_grad_() for size in (9, 21))
    targets, scored = torch.arange(9, device="cuda"), torch.arange(9, device="cuda") < 3
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, nll = linear_masked_cross_entropy(hidden, head, targets, scored, count=count, reduction=reduction,
                                                return_nll=True)
        gradients = torch.autograd.grad(loss.sum(), (hidden, head))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    leaves = [x.detach().cpu().requires_grad_() for x in (hidden, head)]
    expected = linear_masked_cross_entropy(*leaves, targets.cpu(), scored.cpu(), reduction=reduction)
    assert (loss.cpu() - expected).abs().max() <= 1e-5 and (nll.cpu()[3:] == 0).all()
    for mine, its in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert (mine.cpu() - its).abs().max() <= 1e-5


def test_a_wrong_count_shows_in_the_loss():
    hidden, head = torch.randn(9, 8, device="cuda"), torch.randn(21, 8, device="cuda")
    targets, scored = torch.arange(9, device="cuda"), torch.arange(9, device="cuda") < 3
    for count in (2, 4):
        assert linear_masked_cross_entropy(hidden, head, targets, scored, count=count).isnan()


def test_training_beside_a_teacher_and_a_continued_run(make_config, tmp_path):
    begun = train(make_config("cpu", objective="ar", output_dir=str(tmp_path / "begun"))).checkpoint
    ours, theirs = (make_config(device, begun, repr_align_wt=1.0, max_steps=3, save_steps=2)
                    for device in ("cuda", "cpu"))
    whole = train(theirs)
    assert train(ours).history[-1]["alignment"] == pytest.approx(
        whole.history[-1]["alignment"], rel=1e-3)
    last = tmp_path / "cuda" / "checkpoints" / "global_step_3"
    last.rename(tmp_path / "out of the way")
    continued = train(ours)  # from step 2
    assert continued.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize("keys", [{"precision": "fp32"}, pytest.param({"precision": "bf16"}, marks=pytest.mark.skipif(
    torch.version.cuda is None, reason="the stand-in has no FlashAttention"))], ids=str)
def test_a_training_step_waits_for_the_gpu_twice(make_config, tmp_path, keys):
    """It waits for the norm of the gradients and the losses, which decide whether the step counts. In fp32 attention to
    packed documents waits too, so there the rows are parts of one document."""
    config = make_config("cuda", log_steps=100, global_batch_size=4, **keys)
    if keys["precision"] == "fp32":
        text = "".join(f"def add_{i}(x):\n    return x + {i}\n" for i in range(200))
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "long.py").write_text(text)
        config = replace(config, data=replace(config.data, train_path=str(tmp_path / "corpus"), validation_share=0.0))

    def waits_of(steps: int) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(replace(config, train=replace(config.train, max_steps=steps, output_dir=str(tmp_path / f"{steps}"))))
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    torch.cuda.set_sync_debug_mode("warn")
    try:
        assert waits_of(3) - waits_of(1) <= 2 * 2
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_model(**keys) -> DiffusionLM:
    """A model that never predicts its mask token, which steps that commit by count would not notice on a GPU."""
    torch.manual_seed(0)
    model = DiffusionLM(ModelConfig(**{
        "family": "qwen3", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "qk_norm": True, "initializer_range": 0.2,
        "max_position_embeddings": 128, "mask_token_id": 1, "eos_token_id": 2, **keys})).eval()
    with torch.no_grad():
        model.head_weight[1] = 0
    return model


MODELS = {"shifted": {}, "unshifted": {"shift_logits": False},
          "block_causal": {"block_causal": True, "block_length": 8, "shift_logits": False},
          "causal_blocks": {"block_causal": True, "block_length": 8, "causal_blocks": True},
          "uniform": {"uniform_share": 1.0}, "hybrid": {"uniform_share": 0.3, "self_conditioning": True}}
METHODS = [  # those of the first part commit by count
    ("shifted", {"alg": "entropy"}), ("shifted", {"alg": "topk_margin"}),
    ("shifted", {"alg": "maskgit_plus", "temperature": 0.5, "alg_temp": 0.3}),
    ("unshifted", {"remasking": "low_confidence", "schedule": "cosine"}),
    ("unshifted", {"remasking": "low_confidence", "cfg_scale": 1.0}), ("unshifted", {"remasking": "random"}),
]
OTHER_METHODS = [
    ("shifted", {"alg": "p2", "temperature": 0.7}), ("shifted", {"alg": "origin"}),
    ("shifted", {"alg": "remdm", "temperature": 1.0}), ("shifted", {"stop_at_eos": True}),
    ("shifted", {"threshold": 0.3, "block_length": 4, "cache": "prefix"}),
    ("unshifted", {"alg": "maskgit_plus", "factor": 1.0, "block_length": 4, "cache": "dual"}),
    ("shifted", {"alg": "maskgit_plus", "expand_token_id": 5, "pad_eos_to_right": True}),
    ("block_causal", {"remasking": "low_confidence", "steps": 7}), ("causal_blocks", {"threshold": 0.3}),
    ("block_causal", {"remasking": "low_confidence_dynamic", "threshold": 0.3, "editing_threshold": 0.2}),
    ("shifted", {"alg": "entropy_bound", "entropy_bound": 2.0}),
    ("causal_blocks", {"alg": "maskgit_plus", "threshold": 0.3, "window_blocks": 2}),
    ("causal_blocks", {"alg": "maskgit_plus", "threshold": 0.3, "sub_block_length": 4}),
    ("block_causal", {"alg": "soft_parallel", "threshold": 0.3}),
    ("causal_blocks", {"alg": "self_speculation", "draft_length": 3, "temperature": 0.5}),
    ("uniform", {"alg": "ancestral", "temperature": 1.0, "correction_steps": 3}),
    ("hybrid", {"alg": "ancestral", "temperature": 0.8, "top_p": 0.9, "greedy_end": True}),
]


def on_both(family: str) -> tuple[DiffusionLM, DiffusionLM]:
    model = make_model(**MODELS[family])
    return deepcopy(model).to("cuda"), model


@pytest.mark.parametrize("family, keys", METHODS + OTHER_METHODS, ids=str)
def test_sampling_gives_the_tokens_of_a_cpu(family, keys):
    prompts = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    config = MDMGenerationConfig(**{"max_new_tokens": 8, "steps": 8, "seed": 3, **keys})
    ours, theirs = (generate(model, prompts.to(model.device), mask.to(model.device), config)
                    for model in on_both(family))
    assert ours.sequences.is_cuda and torch.equal(ours.sequences.cpu(), theirs.sequences)
    assert torch.allclose(ours.confidence.cpu(), theirs.confidence, atol=1e-4) and ours.forwards == theirs.forwards


@pytest.mark.parametrize("family, keys", METHODS, ids=str)
def test_steps_that_commit_by_count_never_wait(family, keys):
    """Except for the last step, which makes sure that none is left."""
    config = MDMGenerationConfig(**{"max_new_tokens": 16, "steps": 8, "seed": 3, **keys})
    steps = iter(start(on_both(family)[0], torch.arange(10, 15, device="cuda"), config=config))
    for _ in range(2):  # the first ones of the cosine schedule commit nothing
        before = next(steps).tokens
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            after = next(steps).tokens
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (before != after).any()


def test_a_forward_pass_never_waits():
    ours, theirs = on_both("shifted")
    ids = torch.arange(10, 26).view(2, 8)
    there = ids.to("cuda")
    ours(there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = ours(there).logits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(logits.cpu(), theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("family", ["shifted", "unshifted", "hybrid"])
def test_infilling_and_likelihoods_equal_those_on_a_cpu(tokenizer, family):
    prefix, suffix, texts = torch.tensor([[10, 11, 12]]), torch.tensor([[20, 21]]), torch.arange(10, 30).view(2, 10)
    config = MDMGenerationConfig(steps=8, seed=3, infill_lengths=(2, 5))
    filled, nats, shares = [], [], []
    for model in on_both(family):
        filled.append(infill(model, prefix.to(model.device), suffix.to(model.device), length="auto",
                             generation_config=config).sequences.tolist())
        nats.append(bound_likelihood(model, texts.to(model.device), samples=4).nats)
        shares.append(masked_accuracy(model, tokenizer, [Document("def add(x, y):\n    return x + y\n" * 4, "a.py")],
                                      HeldOutSettings(shares=(0.5,)))[0])
    assert filled[0] == filled[1] and shares[0].accuracy == shares[1].accuracy
    torch.testing.assert_close(*nats, rtol=1e-5, atol=0)
    assert shares[0].nats == pytest.approx(shares[1].nats, rel=1e-5)


def test_requests_served_together():
    pytest.importorskip("greenlet")
    from dllm.server.scheduler import Scheduler
    from tests.dllm.server.test_scheduler import Request

    on_gpu, model = on_both("shifted")
    config = MDMGenerationConfig(steps=8, seed=3)
    prompts = [torch.arange(10, 10 + length) for length in (3, 9, 5)]
    scheduler = Scheduler(on_gpu)
    scheduler.start()
    try:
        requests = [Request(prompt, 8, config) for prompt in prompts]
        for request in requests:
            scheduler.submit(request.job)
        for prompt, request in zip(prompts, requests, strict=True):
            alone = generate(model, prompt, config=replace(config, max_new_tokens=8))
            assert request.wait()[0].tokens == alone.sequences[0, len(prompt):].tolist()
    finally:
        scheduler.drain()
