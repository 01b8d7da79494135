"""Several processes train as one does: the same losses, the same checkpoints, whoever dies in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from dllm.config import Config, DataGroup, ModelGroup, TrainGroup
from dllm.model import DiffusionLM

ROOT = Path(__file__).parents[2]
# The last one: or else restarted processes may look for those before them (pytorch/pytorch#135712).
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
               "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def make_config(corpus):
    def make(output: Path, **train_keys) -> Path:
        keys = {"output_dir": str(output), "lr": 3e-3, "micro_batch_size": 4, "global_batch_size": 8, "max_steps": 20,
                "save_steps": 5, "eval_every": 10, "num_train_epochs": 100, "device": "cpu", "lr_warmup_ratio": 0.2,
                "lr_decay_style": "cosine", "max_grad_norm": 0.0, "optimizer": "muon", "use_tensorboard": False,
                **train_keys}
        model = ModelGroup(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1)
        config = Config(model=model, train=TrainGroup(**keys),
                        data=DataGroup(train_path=str(corpus), max_seq_len=48, validation_share=0.1))
        path = output.parent / f"{output.name}.yaml"
        path.write_text(config.to_yaml())
        return path
    return make


def command(processes: int, path: Path, *flags: str, restarts: int = 0) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "dllm.train", str(path), *flags]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0", "--max-restarts", str(restarts), "--monitor-interval", "0.1", "-m",
            "dllm.train", str(path), *flags]


def run(processes: int, path: Path, *flags: str, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(command(processes, path, *flags, **keywords), env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=300)


def read(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
            for line in lines]


@pytest.fixture(scope="module")
def alone(make_config, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    result = run(1, make_config(output))
    assert result.returncode == 0, result.stderr
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
def test_two_processes_equal_one_for_20_steps(make_config, alone, tmp_path, flags):
    mode, *more = flags
    result = run(2, make_config(tmp_path / "run", data_parallel_mode=mode), *more)
    assert result.returncode == 0, result.stderr
    assert_close(read(tmp_path / "run"), read(alone), 1e-5)
    ours, theirs = weights(tmp_path / "run"), weights(alone)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_align_as_one(make_config, alone, tmp_path, mode):
    start = str(alone / "checkpoints/global_step_5/hf_ckpt")
    flags = ["--train.repr_align_wt=10", "--train.max_steps=4", "--train.micro_batch_size=2"]
    for processes in (1, 2):
        path = make_config(tmp_path / str(processes), data_parallel_mode=mode)
        config = yaml.safe_load(path.read_text()) | {"model": {"model_path": start}}
        path.write_text(yaml.safe_dump(config))
        result = run(processes, path, *flags)
        assert result.returncode == 0, result.stderr
    ours, theirs = read(tmp_path / "2"), read(tmp_path / "1")
    assert all(line["alignment"] > 0 for line in ours)
    assert_close(ours, theirs, 1e-5)


def test_two_processes_are_one_bit_for_bit_when_each_adds_one_gradient(make_config, alone, tmp_path):
    assert run(2, make_config(tmp_path / "run")).returncode == 0
    assert read(tmp_path / "run") == read(alone)


def start_and_kill(processes: int, path: Path, wanted: Path, *flags: str) -> int:
    """Kill all processes of a run as soon as `wanted` is there; the exit code of the first."""
    running = subprocess.Popen(command(processes, path, *flags), env=ENVIRONMENT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not wanted.exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(running.pid, signal.SIGKILL)
    return running.wait()


@pytest.mark.parametrize("before, after, mode", [(1, 2, "ddp"), (2, 1, "fsdp2")])
def test_after_kill_9_another_number_of_processes_goes_on_bit_for_bit(make_config, alone, tmp_path, before, after,
                                                                      mode):
    path, output = make_config(tmp_path / "run", data_parallel_mode=mode), tmp_path / "run"
    start_and_kill(before, path, output / "checkpoints/global_step_10")
    result = run(after, path)
    assert result.returncode == 0, result.stderr
    # A sharded norm is added up in another order; nothing follows from it here, where gradients are not clipped.
    ignored = "grad_norm" if mode == "fsdp2" else None
    assert [{**line, ignored: 0} for line in read(output)] == [{**line, ignored: 0} for line in read(alone)]
    assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(output).items())


def test_a_stream_goes_on_where_it_was_with_another_number_of_processes(make_config, tmp_path):
    stream = ("--data.datasets_type=iterable",)
    assert run(1, make_config(tmp_path / "alone"), *stream).returncode == 0
    path, output = make_config(tmp_path / "run"), tmp_path / "run"
    killed = start_and_kill(2, path, output / "checkpoints/global_step_10", *stream)
    assert killed == -signal.SIGKILL
    result = run(1, path, *stream)
    assert result.returncode == 0, result.stderr
    assert read(output) == read(tmp_path / "alone")


def test_a_rank_that_is_killed_is_started_again_and_the_run_ends_the_same(make_config, alone, tmp_path):
    path, output = make_config(tmp_path / "run"), tmp_path / "run"
    running = subprocess.Popen(command(2, path, restarts=1), env=ENVIRONMENT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints/global_step_5").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    workers = [int(child) for child in subprocess.run(["pgrep", "-P", str(running.pid), "-f", "dllm.train"],
                                                      capture_output=True, text=True).stdout.split()]
    os.kill(workers[-1], signal.SIGKILL)
    assert running.wait(120) == 0
    assert read(output) == read(alone)


def test_sigterm_saves_and_the_same_command_continues(make_config, alone, tmp_path):
    path, output = make_config(tmp_path / "run", save_steps=0), tmp_path / "run"
    running = subprocess.Popen(command(1, path), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len((output / "metrics.jsonl").read_text().splitlines()) < 3:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 0 and "stopped by SIGTERM after step" in told and "continues" in told
    assert len(list((output / "checkpoints").iterdir())) == 1
    assert run(1, path).returncode == 0
    assert read(output) == read(alone)


@pytest.mark.parametrize("flags, message", [
    (("--train.global_batch_size=4",), "train.global_batch_size 4 must be a multiple of train.micro_batch_size 4 times "
                                       "2, the number of processes"),
    (("--train.ulysses_parallel_size=3",), "train.ulysses_parallel_size 3 must divide the number of processes, 2")])
def test_a_number_of_processes_that_does_not_fit_is_said_in_one_line(make_config, tmp_path, flags, message):
    result = run(2, make_config(tmp_path / "run"), *flags)
    assert result.returncode != 0
    assert f"dllm: error: {message}" in result.stderr
