"""JSON schemas: every text parses, as what the schema accepts; what cannot be held is refused by name."""

import json
import random
import re

import pytest
import torch

from dllm.constraints import Regex, json_schema
from dllm.constraints.schemas import schema_pattern
from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import denoise
from dllm.model.tokenizer import train_tokenizer
from tests.dllm.tiny_models import tiny_of

jsonschema = pytest.importorskip("jsonschema_rs", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(['{"name": "ab", "age": 12}', "2024-01-31", "Grüße, naïve", '[1, 2, {"a": null, "b": true}]',
                            "日本語"] * 3, 340)


PERSON = {"$defs": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                    "address": {"type": "object", "properties": {"zip": {"$ref": "#/$defs/zip"}}, "required": ["zip"]}},
          "type": "object", "title": "Person", "required": ["name"],
          "properties": {"name": {"type": "string", "maxLength": 8}, "home": {"$ref": "#/$defs/address"},
                         "kind": {"enum": ["a", 1, None]}}}
SCHEMAS = [
    PERSON, {"type": "object"}, True, {"type": "array"}, {"type": ["integer", "null"]},
    {"type": "string", "minLength": 2, "maxLength": 3}, {"type": "string", "pattern": '.*"\\\\\n?'},
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 1},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"a": True, "b": {"type": "null"}, "c": {"const": 'x\\"'}}},
    {"type": "object", "properties": {"a": {}, "b": {"type": "null"}}, "required": ["b", "z"]},
    {"type": "integer", "minimum": -12, "maximum": 345}, {"type": "integer", "exclusiveMinimum": 7, "maximum": 1000},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 2}, {"type": "number", "minimum": -3, "exclusiveMaximum": -1},
    {"type": "integer", "minimum": 1_600_000_000_000}, {"type": "number", "minimum": -1e12, "exclusiveMaximum": 2**53},
    {"type": "string", "pattern": "^a|b$"}, {"type": "string", "pattern": "(x|^a)(b|c$|$c){2}"},
    {"type": "string", "pattern": "(?:^a|b){2}"},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]}, {"anyOf": [{"type": "integer"}, {"type": "number"}]},
    {"oneOf": [{"type": "object", "required": ["k"], "properties": {"k": {"const": name}}} for name in "xy"]},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "boolean"}}, "description": "a flag"},
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "uuid", "ipv4", "email")),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_texts_are_what_the_schema_accepts(tokenizer, schema):
    model = tiny_of("qwen2", vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, eos_token_id=0)
    constraint = json_schema(schema, tokenizer, len(tokenizer))
    length = max(24, constraint.matcher.shortest())  # the shortest is just enough
    with pytest.raises(UserError, match="no text of 0 tokens matches the constraint .* the length does not suffice"):
        constraint.check(0)
    for settings in ({"alg": "entropy", "temperature": 1.0}, {"alg": "origin", "temperature": 2.0}):
        config = MDMGenerationConfig(steps=6, seed=1, constraint=constraint, **settings)
        canvas = torch.full((5, length), tokenizer.mask_token_id)
        for row in denoise(model, canvas, config).sequences:
            text = tokenizer.decode(row, skip_special_tokens=True)
            assert jsonschema.is_valid(schema, json.loads(text), validate_formats=True), text
            assert re.fullmatch(constraint.pattern, text)


@pytest.mark.parametrize("low, high", [(0, 0), (0, 9), (3, 7), (9, 10), (17, 905), (99, 1000), (-5, 5), (-120, -19)])
def test_bounds_of_whole_numbers_are_exact(low, high):
    pattern = schema_pattern({"type": "integer", "minimum": low, "maximum": high})
    for number in range(-200, 1200):
        assert (re.fullmatch(pattern, str(number)) is not None) == (low <= number <= high), number


@pytest.mark.parametrize("schema, message", [
    ({"type": "array", "uniqueItems": True}, "the keyword 'uniqueItems' is not supported for type array"),
    ({"type": "number", "multipleOf": 3}, "the keyword 'multipleOf' is not supported for type number"),
    ({"type": "number", "minimum": 0.5}, "minimum takes a whole number here, not 0.5"),
    ({"type": "object", "patternProperties": {}}, "the keyword 'patternProperties' is not supported for type object"),
    ({"not": {"type": "null"}}, "the keyword 'not' is not supported"),
    ({"type": "string", "format": "uri"}, "the format 'uri' is not supported; there are date, time"),
    ({"type": "string", "pattern": "a", "minLength": 3}, "the keyword 'minLength' beside pattern is not supported"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around cannot be held"),
    ({"properties": {"a": {"$ref": "#"}}}, "\\$ref '#' leads back to itself"),
    ({"$ref": "#/$defs/none"}, "\\$ref '#/\\$defs/none' names nothing in the schema"),
    ({"$ref": "https://example.org/x"}, "\\$ref must begin with '#/'"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf needs schemas that exclude each other"),
    ({"oneOf": [{"properties": {"a": True}}, {"properties": {"b": True}}]}, "oneOf needs schemas that exclude each"),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "allOf is supported with one schema alone"),
    ({"type": "integer", "enum": ["a"]}, "no value of enum or const has the type of the schema"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength 5 is more than maxLength 2"),
    ({"required": ["a"], "properties": {"b": {}}, "additionalProperties": False}, "property 'a' is none of the"),
    ({"required": [1]}, "required a list of names"),
    ({"type": "number", "minimum": 2e9}, "no number from -999999999 to 999999999"),
    ({"type": "integer", "minimum": 10**15}, "one side without a bound ends at 999999999999999"),
    ('{"enum": [NaN]}', "not JSON compliant"), ('{"const": ' + "9" * 5000 + "}", "4300 digits"),
    (False, "a schema is an object or true, not False"), ("[1]", "a schema is an object or true, not \\[1\\]"),
    ({"$defs": {str(n): {"type": "array", "prefixItems": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(40)}
      | {"40": {}}, "$ref": "#/$defs/0"}, "more than 300000 characters; write a smaller one"),
])
def test_what_cannot_be_held_is_refused_by_name(schema, message):
    with pytest.raises(UserError, match=f"the JSON schema cannot be used: .*{message}"):
        schema_pattern(schema)


@pytest.mark.parametrize("pattern", ["a^b", "x+^a", "a$b*", "(?:^a){2}"])
def test_an_anchor_within_a_text_never_holds(tokenizer, pattern):
    with pytest.raises(UserError, match="no text matches it"):
        json_schema({"type": "string", "pattern": pattern}, tokenizer, len(tokenizer))


PARTS = ["a", "b", "1", "é", "日", ".", '[^"]', "[a-c]", "[^a-z]", r"\d", r"\w", r"\s", r"\S", r"\W", '"', ",", "ab",
         "[à-ÿ]", r"[^\d\s]", "(?i:ab)", "(?s:.)", r"\.", "-"]
LEAVES = [{"type": "string"}, {"type": "string", "maxLength": 3}, {"type": "number", "minimum": -3}, {"type": "null"},
          {"type": "integer"}, {"type": "boolean"}, {"enum": ["a", 1, None, 'é"\n']},
          *({"type": "string", "pattern": pattern} for pattern in ('[^a]{2}', r"\d{3}", r"\S.", r"[^\w\s]"))]
STRATEGIES = [
    {"alg": "maskgit_plus"}, {"alg": "entropy", "temperature": 1.0}, {"alg": "origin", "temperature": 1.0},
    {"alg": "topk_margin", "temperature": 0.7, "top_k": 5}, {"alg": "p2", "temperature": 1.0, "stop_at_eos": True},
    {"alg": "remdm", "remask_rate": 0.3, "temperature": 1.0}, {"alg": "maskgit_plus", "factor": 1.0},
    {"remasking": "random", "temperature": 1.0}, {"alg": "entropy", "block_length": 4, "cache": "dual"},
    {"alg": "entropy", "temperature": 1.0, "top_p": 0.5, "stop_at_eos": True}, {"alg": "entropy", "cfg_scale": 1.0},
    {"remasking": "low_confidence_dynamic", "threshold": 0.01, "editing_threshold": 0.005, "block_causal": True,
     "block_length": 4}, {"alg": "confidence_threshold", "threshold": 0.01},
    {"alg": "entropy_bound", "temperature": 1.0},
    {"alg": "maskgit_plus", "threshold": 0.01, "block_causal": True, "block_length": 4, "window_blocks": 3},
    {"alg": "soft_parallel", "threshold": 0.1, "block_causal": True, "block_length": 4, "temperature": 1.0},
    {"alg": "entropy_bound", "block_causal": True, "block_length": 8, "sub_block_length": 4}]


def random_pattern(draw: random.Random, depth: int = 0) -> str:
    kind = draw.random()
    if depth > 3 or kind < 0.45:
        return draw.choice(PARTS)
    if kind < 0.7:
        return "".join(random_pattern(draw, depth + 1) for _ in range(draw.randint(1, 3)))
    if kind < 0.82:
        return "(?:" + "|".join(random_pattern(draw, depth + 1) for _ in range(draw.randint(2, 3))) + ")"
    return f"(?:{random_pattern(draw, depth + 1)}){draw.choice(['*', '+', '?', '{2}', '{0,3}', '*?', '{2,}'])}"


def random_schema(draw: random.Random, depth: int = 0) -> dict:
    kind = draw.random()
    if depth > 2 or kind < 0.3:
        return draw.choice(LEAVES)
    if kind < 0.65:
        names = draw.sample(["a", "b", "c d", 'q"', "é"], draw.randint(1, 4))
        return {"type": "object", "properties": {name: random_schema(draw, depth + 1) for name in names},
                "required": [name for name in names if draw.random() < 0.5]}
    if kind < 0.85:
        return {"type": "array", "items": random_schema(draw, depth + 1), "maxItems": draw.randint(1, 3)}
    return {"anyOf": [random_schema(draw, depth + 1) for _ in range(2)]}


@pytest.mark.slow
@pytest.mark.parametrize("texts", [60, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_random_patterns_and_schemas_hold_with_random_models_and_every_strategy(tokenizer, texts):
    """No text fails; a length is refused only where no text has it, and the number named is the least that suffices."""
    draw, size, checked = random.Random(texts), len(tokenizer) + 29, 0
    while checked < texts:
        schema = random_schema(draw) if draw.random() < 0.5 else None
        constraint = (Regex(random_pattern(draw), tokenizer, size) if schema is None
                      else json_schema(schema, tokenizer, size))
        torch.manual_seed(checked)
        model = tiny_of("qwen2", vocab_size=size, mask_token_id=2, eos_token_id=0, shift_logits=draw.random() < 0.5)
        settings, length = draw.choice(STRATEGIES), 4 * draw.randint(1, 8)
        canvas = torch.full((draw.randint(1, 3), 3 + length + 2), 2)
        canvas[:, :3], canvas[:, -2:] = 5, 9
        config = MDMGenerationConfig(seed=checked, constraint=constraint, steps=length * 2, **settings)
        try:
            out = denoise(model, canvas, config).sequences
        except UserError as error:
            needed = int(re.search(r"the length does not suffice, at least (\d+) tokens", str(error))[1])
            assert constraint.fits(needed) and not any(constraint.fits(n) for n in range(length, needed))
            continue
        assert (out[:, :3] == 5).all() and (out[:, -2:] == 9).all()
        for row in out[:, 3:-2]:
            text = tokenizer.decode(row, skip_special_tokens=True)
            assert re.fullmatch(constraint.pattern, text), (constraint.pattern, text, settings)
            assert 2 not in row.tolist()
            if schema is not None:
                assert jsonschema.is_valid(schema, json.loads(text)), (schema, text, settings)
            checked += 1
