"""Settings as data: everything derived from a field agrees with it."""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from dllm.config.fields import add_fields, check, fill_tables, given, setting, settings_of
from dllm.config.schema import TrainGroup
from dllm.diffusion.corruption import SCHEDULES
from dllm.errors import UserError
from dllm.evaluators.code.presets import PRESETS
from dllm.evaluators.settings import RunSettings
from dllm.generation.config import CONFIDENCES, MDMGenerationConfig
from dllm.generation.strategies import REMASKINGS, STRATEGIES

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Oven:
    degrees: int = setting(180, "degrees Celsius", at_least=50, at_most=250)
    minutes: float | None = setting(None, "minutes", above=0, none="until it is turned off")
    mode: Literal["fan", "grill"] = setting("fan", "100% of the heat | where it comes from")
    shelves: tuple[int, ...] = setting((1, 2), "shelves in use", at_least=1)
    light: bool = setting(True, "light")
    maker: object = None  # declares nothing, so nothing derives from it

    def __post_init__(self):
        check(self, "oven.")


@pytest.mark.parametrize("values, message", [
    ({"degrees": 40}, "oven.degrees must be at least 50 and at most 250, not 40"),
    ({"degrees": 60.5}, "oven.degrees must be a whole number, not 60.5"),
    ({"degrees": True}, "oven.degrees must be a whole number, not True"),
    ({"degrees": None}, "oven.degrees must be a whole number, not None"),
    ({"minutes": float("nan")}, "oven.minutes must be above 0, not nan"),
    ({"minutes": "ten"}, "oven.minutes must be a number, not 'ten'"),
    ({"mode": "steam"}, "oven.mode must be one of fan, grill, not 'steam'"),
    ({"shelves": ()}, "oven.shelves must be numbers at least 1, not ()"),
    ({"shelves": (1, 0)}, "oven.shelves must be numbers at least 1, not (1, 0)"),
    ({"shelves": 3}, "oven.shelves must be whole numbers, not 3"),
    ({"shelves": (1, 2.5)}, "oven.shelves must be whole numbers, not (1, 2.5)"),
    ({"light": 1}, "oven.light must be true or false, not 1"),
])
def test_a_value_of_the_wrong_kind_or_out_of_range_is_refused(values, message):
    with pytest.raises(UserError) as error:
        Oven(**values)
    assert str(error.value) == message


def test_flags_give_only_what_is_asked_and_build_an_equal_object():
    parser = argparse.ArgumentParser()
    add_fields(parser, Oven, leave_out=("mode",))
    assert given(parser.parse_args([]), Oven) == {}
    values = given(parser.parse_args(["--degrees", "200", "--minutes", "2.5", "--shelves", "3,4", "--no-light"]), Oven)
    assert Oven(**values) == Oven(degrees=200, minutes=2.5, shelves=(3, 4), light=False)
    assert given(parser.parse_args(["--minutes", "none"]), Oven) == {"minutes": None}
    help_text = " ".join(parser.format_help().split())
    assert "minutes; default: until it is turned off" in help_text and "--mode" not in help_text


def test_a_page_gets_its_table_and_keeps_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- settings: dllm.config.schema.DataGroup -->\nold\n<!-- end of settings -->\nafter\n")
    subprocess.run([sys.executable, "-m", "dllm.config.fields", str(page)], check=True, cwd=ROOT)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end of settings -->\nafter\n") and "\nold\n" not in text
    assert "| `max_seq_len` | 2048 | a whole number, at least 2 |" in text
    assert fill_tables(text) == text


def test_tables_of_the_docs_are_up_to_date():
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert fill_tables(page.read_text()) == page.read_text(), f"run python -m dllm.config.fields docs/{page.name}"


@pytest.mark.parametrize("cls, name, names", [
    (MDMGenerationConfig, "alg", [*STRATEGIES, "ancestral"]), (MDMGenerationConfig, "remasking", REMASKINGS),
    (MDMGenerationConfig, "schedule", ["even", *SCHEDULES]), (TrainGroup, "schedule", SCHEDULES),
    (RunSettings, "preset", PRESETS)])
def test_choices_are_the_keys_of_their_table(cls, name, names):
    assert set(settings_of(cls)[name].choices) == set(names)


def test_algorithms_with_confidences_are_algorithms():
    assert set(CONFIDENCES) <= {*STRATEGIES, *REMASKINGS}
