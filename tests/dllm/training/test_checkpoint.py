"""Checkpoints: whole or absent, whatever happens while they are written; damage is found and reported."""

import errno
import io
import os

import pytest
import torch

from dllm.errors import Failure, UserError
from dllm.files import write_atomically
from dllm.training.checkpoint import begin, explain, find_damage, list_checkpoints, load_latest, seal


def write_model(folder):
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)


def save(folder, step, **keywords):
    with explain(begin(folder, step)) as temporary:
        write_model(temporary / "hf_ckpt")
        torch.save({"step": step, "tensor": torch.arange(1000.0)}, temporary / "trainer_state.pt")
    return seal(folder, step, **keywords)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_saved_is_loaded_from_the_newest(tmp_path):
    assert load_latest(tmp_path / "checkpoints") is None
    for step in (9, 10):
        save(tmp_path, step)
    latest = load_latest(tmp_path)
    assert latest.folder.name == "global_step_10" and latest.hf_folder == latest.folder / "hf_ckpt"
    assert latest.state["step"] == 10 and torch.equal(latest.state["tensor"], torch.arange(1000.0))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_saving_a_step_again_replaces_it_and_old_ones_go_when_asked(tmp_path):
    for step in (1, 2, 2, 3):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["global_step_3", "global_step_2"]


@pytest.mark.parametrize("damage, reason", [
    (lambda f: os.truncate(f / "trainer_state.pt", 100), "trainer_state.pt has 100 bytes"),
    (lambda f: (f / "hf_ckpt/model.safetensors").unlink(), "hf_ckpt/model.safetensors is missing"),
    (lambda f: (f / "hf_ckpt/model.safetensors").write_bytes(b"weighty" * 1000), "the content of hf_ckpt/model"),
    (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
])
def test_a_damaged_checkpoint_is_passed_over_in_one_line_and_alone_refused(tmp_path, capsys, damage, reason):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    assert load_latest(tmp_path).state["step"] == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and reason in line
    assert "global_step_2" in line and "continuing from global_step_1" in line
    damage(tmp_path / "global_step_1")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged") as error:
        load_latest(tmp_path)
    assert reason in str(error.value) and "\n" not in str(error.value)


def fail_writing_the_model(monkeypatch):
    def full(folder):
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(f"{__name__}.write_model", full)


def fail_writing_the_state(monkeypatch):
    class FullFile(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write = torch.save
    monkeypatch.setattr(torch, "save", lambda state, _: write(state, FullFile()))


def fail_synchronising(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("fail", [fail_writing_the_model, fail_writing_the_state, fail_synchronising])
def test_a_full_disk_is_a_failure_and_leaves_what_was_there(tmp_path, monkeypatch, fail):
    before = content(save(tmp_path, 1).parent)
    for step in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Failure, match="cannot write .*No space left") as error:
            fail(patch)
            save(tmp_path, step)
        assert "\n" not in str(error.value)
        assert content(tmp_path) == before and load_latest(tmp_path).state["step"] == 1


def test_writes_that_the_system_refuses_leave_what_was_there(tmp_path, full_disk):
    (tmp_path / "file").write_bytes(b"before")
    with full_disk(2000), pytest.raises(Failure, match="cannot write .*file: File too large"):
        write_atomically(tmp_path / "file", b"x" * 3000)
    with full_disk(2000), pytest.raises(Failure, match="cannot write .*global_step_1"):
        save(tmp_path, 1)
    assert content(tmp_path).keys() == {(tmp_path / "file").relative_to(tmp_path)}
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path):
    for text in (b"one", b"two"):
        write_atomically(tmp_path / "new/folder/file", text)
        assert content(tmp_path / "new/folder") == {(tmp_path / "file").relative_to(tmp_path): text}


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Failure, match="cannot write"):
        write_atomically(tmp_path / "file/below", b"x")


def test_leftovers_of_a_killed_save_are_no_checkpoints_and_go_with_the_next(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / ".global_step_2.tmp"
    leftover.mkdir()
    (leftover / "trainer_state.pt").write_bytes(b"half")
    assert load_latest(tmp_path).state["step"] == 1
    assert find_damage(save(tmp_path, 2)) is None and not leftover.exists()
