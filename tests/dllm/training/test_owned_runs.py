"""Runs have an owner, save when they are interrupted, and write over nothing that they read."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.errors import Failure, UserError
from dllm.files import LOCK, own_folder
from dllm.train import main
from dllm.training.trainer import train
from tests.processes import end, start, wait_until

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(corpus, tmp_path):
    shape = ModelGroup(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1)
    return Config(model=shape, data=DataGroup(train_path=str(corpus), max_seq_len=48), train=TrainGroup(
        output_dir=str(tmp_path / "run"), max_steps=2, num_train_epochs=100_000, device="cpu", use_tensorboard=False))


def begin(config, tmp_path, command=main):
    """A run of its own process, after its first steps."""
    path = tmp_path / "given.yaml"
    path.write_text(replace(config, train=replace(config.train, max_steps=None)).to_yaml())
    running = start(command, [path], tmp_path / "told")
    wait_for_steps(config, running)
    return running


def wait_for_steps(config, running=None):
    metrics = Path(config.train.output_dir) / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, running)


def heed_interrupts(arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(arguments)


def ignore_hangups(arguments):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return main(arguments)


def checkpoints(config):
    return list((Path(config.train.output_dir) / "checkpoints").glob("global_step_*"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_an_interrupted_run_saves_and_the_same_command_continues(name, config, tmp_path):
    running = begin(config, tmp_path, heed_interrupts)
    os.kill(running.pid, getattr(signal, name))
    assert end(running) == 0
    told = (tmp_path / "told").read_text()
    assert f"stopped by {name} after step" in told and "continues" in told
    assert len(checkpoints(config)) == 1


@pytest.mark.slow
def test_a_run_whose_terminal_closes_saves(config, tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text(replace(config, train=replace(config.train, max_steps=None)).to_yaml())
    holder = subprocess.Popen([sys.executable, "-c", "import os, pty, sys\npid, terminal = pty.fork()\n"
                               "if pid == 0: os.execv(sys.executable, sys.argv[1:])\n"
                               "while os.read(terminal, 4096): pass",
                               sys.executable, "-m", "dllm", "train", str(path)], env=ENVIRONMENT)
    wait_for_steps(config)
    holder.kill()
    holder.wait()
    wait_until(lambda: checkpoints(config))


def test_an_ignored_hangup_stays_ignored(config, tmp_path):
    running = begin(config, tmp_path, ignore_hangups)
    os.kill(running.pid, signal.SIGHUP)
    running.terminate()
    assert end(running) == 0 and "stopped by SIGTERM" in (tmp_path / "told").read_text()


@pytest.mark.slow
def test_a_second_run_is_refused_in_one_sentence_and_a_dead_one_is_taken_over(config, tmp_path, monkeypatch, capsys):
    running = begin(config, tmp_path)
    os.symlink(tmp_path / "run", tmp_path / "link")
    for folder in ("run", "link", "./run"):
        with pytest.raises(UserError, match=rf"belongs to a run that is going on, process {running.pid} on "
                                            f"{socket.gethostname()}; wait for its end, stop it, or name another"):
            train(replace(config, train=replace(config.train, output_dir=f"{tmp_path}/{folder}")))
    assert not checkpoints(config)
    running.kill()
    end(running)
    assert train(config).finished and len(checkpoints(config)) == 1


def test_a_disk_without_locks_is_told_of_and_a_full_one_refused(tmp_path, monkeypatch, capsys, full_disk):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with own_folder(tmp_path / "run"):
        assert "run cannot be locked (No locks available); let no other run write to it" in capsys.readouterr().err
    monkeypatch.undo()
    with full_disk(0), pytest.raises(Failure, match=f"cannot write .*{LOCK}: File too large"), own_folder(tmp_path):
        pass


def test_the_same_data_by_another_name_continues_a_run(config, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("some words to learn\n" * 50)
    os.symlink(data, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("data", "./data", "~/data", "link", "data/", str(data), f"../{tmp_path.name}/data")
    for steps, path in enumerate(names, start=1):
        again = replace(config, data=replace(config.data, train_path=path),
                        train=replace(config.train, output_dir="~/run", max_steps=steps))
        assert train(again).steps == steps
    assert not (tmp_path / "~").exists() and len(checkpoints(config)) == 7
    (data / "a.txt").write_text("other words")
    with pytest.raises(UserError, match="continues a run on other documents"):
        train(again)


def test_another_chat_template_is_refused_and_the_same_in_another_file_goes_on(config, tmp_path):
    template = tmp_path / "template.jinja"
    content = "{% for m in messages %}{{ m.role }}:\r\n{{ m.content }}{{ eos_token }}{% endfor %}"
    template.write_text(content, newline="")
    talks = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(40)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    data = replace(config.data, train_path=str(tmp_path / "talks.jsonl"), data_type="conversation")

    def run(steps, file):
        return train(replace(config, data=replace(data, chat_template=str(file)),
                             train=replace(config.train, max_steps=steps))).steps

    assert run(1, template) == 1
    template.rename(tmp_path / "moved.jinja")
    assert run(2, tmp_path / "moved.jinja") == 2 and run(3, "default") == 3
    template.write_text(content.replace(":", ";"), newline="")
    with pytest.raises(UserError, match="continues a run with another chat template than there is now in .*put it"):
        run(4, template)


def test_a_run_inside_its_data_is_no_data(config, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words to learn\n" * 50)
    config = replace(config, data=replace(config.data, train_path=str(tmp_path)))
    first = train(config)
    again = train(replace(config, train=replace(config.train, max_steps=4)))
    assert first.steps == 2 and again.steps == 4
    assert "left out 1 not meant for training: run (the folder of a run)" in capsys.readouterr().err


def test_a_run_never_writes_over_its_data_or_its_configuration(config, tmp_path, corpus):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(corpus.read_text())
    for path in ("run", "run/metrics.jsonl"):
        with pytest.raises(UserError, match="train.output_dir .*run holds the data .*; name a folder of its own"):
            train(replace(config, data=replace(config.data, train_path=f"{tmp_path}/{path}")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    (tmp_path / "run/metrics.jsonl").unlink()
    mine = f"# mine\ntrain: {{output_dir: {tmp_path}/run, max_steps: 1}}\n"
    (tmp_path / "run/config.yaml").write_text(mine)
    assert main([str(tmp_path / "run/config.yaml"), f"--data.train_path={corpus}"]) == 2
    assert (tmp_path / "run/config.yaml").read_text() == mine
    (tmp_path / "run/config.yaml").unlink()
    train(config)  # whose own configuration continues it
    assert main([str(tmp_path / "run/config.yaml"), "--train.max_steps=3"]) == 0


def test_a_key_that_is_given_twice_is_refused(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    for text, key in (("train:\n  lr: 1\n  output_dir: x\n  lr: 2\n", "lr"),
                      ("data: {}\ntrain: {}\ndata: {}\n", "data")):
        path.write_text(text)
        assert main([str(path)]) == 2
        assert f"the key {key} is given twice; keep one" in capsys.readouterr().err
