"""The cache of compilers' outputs: made once, made anew for other ingredients, nothing left of a failure."""

import itertools
import os
import subprocess
import sys

import pytest

from tests import compiled


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "SHELVES", tmp_path)
    return tmp_path


def test_what_is_made_is_found_again_until_an_ingredient_changes(root):
    source, made = root / "a.cpp", []
    for text in ("int a;", "int a;", "int b;"):
        source.write_text(text)
        folder = compiled.make_once("a", lambda folder: made.append(folder), source, ["-O2"])
        assert folder.is_dir()
    assert len(made) == 2
    assert compiled.make_once("a", lambda folder: made.append(folder), source, ["-O3"]) != folder and len(made) == 3


def test_what_was_asked_for_last_is_kept(root):
    def ask(i: int):
        folder = compiled.make_once("a", lambda folder: None, i)
        os.utime(folder, (time := next(clock), time))
        return folder

    clock = itertools.count(1)
    first, second, *_ = [ask(i) for i in range(compiled.KEPT)]
    ask(0)
    ask(compiled.KEPT)
    assert first.is_dir() and not second.exists()
    assert len([path for path in first.parent.iterdir() if path.is_dir()]) == compiled.KEPT


def test_a_failure_leaves_nothing_and_the_next_call_tries_again(root):
    with pytest.raises(ZeroDivisionError):
        compiled.make_once("a", lambda folder: (folder / "half").write_text("") or 1 / 0)
    assert [path.name for path in (root / "a").iterdir()] == ["lock"]
    assert compiled.make_once("a", lambda folder: (folder / "whole").write_text("")).joinpath("whole").exists()


def test_processes_that_ask_at_the_same_time_make_once(root):
    code = ("import sys, time; from pathlib import Path; from tests import compiled\n"
            "compiled.SHELVES = Path(sys.argv[1])\n"
            "print(compiled.make_once('a', lambda folder: (time.sleep(0.5), print('made'))))")
    started = [subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE, text=True)
               for _ in range(3)]
    said = [process.communicate()[0].split() for process in started]
    assert sum("made" in words for words in said) == 1 and len({words[-1] for words in said}) == 1
