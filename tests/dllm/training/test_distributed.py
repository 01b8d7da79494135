"""Several processes train as one does: the same losses, the same checkpoints, whichever process dies in between."""

import json
import os
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml

from dllm import train
from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.diffusion_lm import DiffusionLM
from tests.processes import end, find_free_port, start, wait_until

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def make_config(corpus):
    def make(output: Path, **train_keys) -> Path:
        keys = {"output_dir": str(output), "lr": 3e-3, "micro_batch_size": 4, "global_batch_size": 8, "max_steps": 20,
                "save_steps": 10, "eval_every": 10, "num_train_epochs": 100, "device": "cpu", "lr_warmup_ratio": 0.2,
                "lr_decay_style": "cosine", "max_grad_norm": 0.0, "optimizer": "muon", "use_tensorboard": False,
                "precision": "fp32", **train_keys}
        model = ModelGroup(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1)
        config = Config(model=model, train=TrainGroup(**keys),
                        data=DataGroup(train_path=str(corpus), max_seq_len=48, validation_share=0.1))
        path = output.parent / f"{output.name}.yaml"
        path.write_text(config.to_yaml())
        return path
    return make


def start_all(count: int, path: Path, *flags: str) -> list[BaseProcess]:
    """As many processes of a run as torchrun would start, told of each other as it tells them."""
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
             "MASTER_PORT": str(find_free_port())}
    return [start(train.main, [path, *flags], path.with_suffix(f".{rank}"), RANK=str(rank), LOCAL_RANK=str(rank),
                  **world) for rank in range(count)]


def run(count: int, path: Path, *flags: str) -> None:
    for rank, process in enumerate(start_all(count, path, *flags)):
        assert end(process) == 0, path.with_suffix(f".{rank}").read_text()


def read(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
            for line in lines]


@pytest.fixture(scope="module")
def short(make_config, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("short") / "run"
    run(1, make_config(output, max_steps=8, save_steps=4, eval_every=4))
    return output


@pytest.fixture(scope="module")
def alone(make_config, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    run(1, make_config(output))
    return output


def weights(output: Path, step: int = 20) -> dict[str, torch.Tensor]:
    return DiffusionLM.from_pretrained(output / f"checkpoints/global_step_{step}/hf_ckpt").state_dict()


def assert_close(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys() and mine["tokens"] == other["tokens"]
        for key in mine:
            assert mine[key] == pytest.approx(other[key], rel=tolerance, abs=1e-12), (mine["step"], key)


@pytest.mark.parametrize("flags", [
    ("fsdp2",), ("ddp", "--train.ulysses_parallel_size=2"),
    ("fsdp2", "--train.ulysses_parallel_size=2", "--train.enable_gradient_checkpointing=true"),
    ("ddp", "--train.micro_batch_size=2"),
    ("fsdp2", "--train.micro_batch_size=2", "--train.save_async=true", "--train.enable_full_shard=false")],
    ids=lambda flags: "-".join(flag.split(".")[-1] for flag in flags))
def test_two_processes_equal_one_for_8_steps(make_config, short, tmp_path, flags):
    mode, *more = flags
    run(2, make_config(tmp_path / "run", data_parallel_mode=mode, max_steps=8, save_steps=4, eval_every=4), *more)
    assert_close(read(tmp_path / "run"), read(short), 1e-5)
    ours, theirs = weights(tmp_path / "run", 8), weights(short, 8)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_two_processes_align_as_one(make_config, short, tmp_path):
    start = str(short / "checkpoints/global_step_4/hf_ckpt")
    flags = ["--train.repr_align_wt=10", "--train.max_steps=4", "--train.micro_batch_size=2"]
    for processes, mode in ((1, "ddp"), (2, "ddp"), (2, "fsdp2")):
        path = make_config(tmp_path / f"{processes}{mode}", data_parallel_mode=mode)
        config = yaml.safe_load(path.read_text()) | {"model": {"model_path": start}}
        path.write_text(yaml.safe_dump(config))
        run(processes, path, *flags)
    theirs = read(tmp_path / "1ddp")
    assert all(line["alignment"] > 0 for line in theirs)
    for mode in ("ddp", "fsdp2"):
        assert_close(read(tmp_path / f"2{mode}"), theirs, 1e-5)


def test_two_processes_are_one_bit_for_bit_when_each_adds_one_gradient(make_config, alone, tmp_path):
    run(2, make_config(tmp_path / "run"))
    assert read(tmp_path / "run") == read(alone)


def start_and_kill(processes: int, path: Path, wanted: Path, *flags: str) -> None:
    """Kill all processes of a run once `wanted` exists."""
    running = start_all(processes, path, *flags)
    wait_until(wanted.exists, running[0])
    for process in running:
        process.kill()
    assert [end(process) for process in running] == [-signal.SIGKILL] * processes


@pytest.mark.parametrize("before, after, mode", [(1, 2, "ddp"), (2, 1, "fsdp2")])
def test_after_kill_9_another_number_of_processes_goes_on_bit_for_bit(make_config, alone, tmp_path, before, after,
                                                                      mode):
    path, output = make_config(tmp_path / "run", data_parallel_mode=mode), tmp_path / "run"
    start_and_kill(before, path, output / "checkpoints/global_step_10")
    run(after, path)
    # A sharded norm adds in another order, which has no effect here, because gradients are not clipped.
    ignored = "grad_norm" if mode == "fsdp2" else None
    assert [{**line, ignored: 0} for line in read(output)] == [{**line, ignored: 0} for line in read(alone)]
    assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(output).items())


def test_a_stream_goes_on_where_it_was_with_another_number_of_processes(make_config, tmp_path):
    stream = ("--data.datasets_type=iterable",)
    run(1, make_config(tmp_path / "alone"), *stream)
    path, output = make_config(tmp_path / "run"), tmp_path / "run"
    start_and_kill(2, path, output / "checkpoints/global_step_10", *stream)
    run(1, path, *stream)
    assert read(output) == read(tmp_path / "alone")


def test_a_rank_that_is_killed_is_started_again_by_torchrun_and_the_run_ends_the_same(make_config, alone, tmp_path):
    path, output = make_config(tmp_path / "run"), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", "--max-restarts", "1", "--monitor-interval", "0.1", "-m", "dllm.train",
               path]
    # The second variable: without it restarted processes may look for those before them (pytorch/pytorch#135712).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: running.poll() is not None or (output / "checkpoints/global_step_10").exists())
    workers = [int(child) for child in subprocess.run(["pgrep", "-P", str(running.pid), "-f", "dllm.train"],
                                                      capture_output=True, text=True).stdout.split()]
    os.kill(workers[-1], signal.SIGKILL)
    assert running.wait(120) == 0
    assert read(output) == read(alone)


def test_sigterm_saves_and_the_same_command_continues(make_config, alone, tmp_path):
    path, output = make_config(tmp_path / "run", save_steps=0), tmp_path / "run"
    running, = start_all(1, path)
    metrics = output / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, running)
    running.terminate()
    assert end(running) == 0
    told = path.with_suffix(".0").read_text()
    assert "stopped by SIGTERM after step" in told and "continues" in told
    assert len(list((output / "checkpoints").iterdir())) == 1
    run(1, path)
    assert read(output) == read(alone)


@pytest.mark.parametrize("flags, message", [
    (("--train.global_batch_size=4",), "train.global_batch_size 4 must be a multiple of train.micro_batch_size 4 times "
                                       "2, the number of processes"),
    (("--train.ulysses_parallel_size=3",), "train.ulysses_parallel_size 3 must divide the number of processes, 2")])
def test_a_number_of_processes_that_does_not_fit_is_said_in_one_line(make_config, tmp_path, monkeypatch, capsys, flags,
                                                                     message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main([str(make_config(tmp_path / "run")), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dllm: error: {message}") and error.count("\n") == 1
