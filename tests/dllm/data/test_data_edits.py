"""Pairs of texts before and after an edit: aligned with the fewest edits, cut and packed, learnt by Edit Flows."""

import gzip
import json
import random
import time
from dataclasses import replace

import datasets
import pytest
import torch

from dllm.config.reading import load_config
from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.data import alignment as alignment_module
from dllm.data import open_training_data, read_corpus
from dllm.data.alignment import BLANK, align
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.files import read_json
from dllm.model.tokenizer import anchor_token_id, encode, load_tokenizer, train_tokenizer
from dllm.training import trainer
from dllm.training.batches import make_batches
from dllm.training.trainer import train

WORDS = ("alpha", "beta", "gamma", "delta", "x", "y", "(", ")")


def make_pairs(count, seed=0, words=12):
    """Texts of words, and each with a third of its words deleted, replaced, or followed by another."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        before = draw.choices(WORDS, k=draw.randrange(1, words))
        after = [word for old in before for word in draw.choice(
            (*[[old]] * 6, [], [draw.choice(WORDS)], [old, draw.choice(WORDS)]))]
        pairs.append({"before": " ".join(before), "after": " ".join(after)})
    return pairs


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def open_pairs(path, tokenizer, **settings):
    settings = {"validation_share": 0.0, "max_seq_len": 64} | settings
    corpus = read_corpus(DataGroup(train_path=str(path), data_type="edits", **settings))
    return open_training_data(corpus, tokenizer, 0, 4, anchor=anchor_token_id(tokenizer))


def split_chunks(packed):
    """(tokens before, tokens after) of each chunk, with the blanks."""
    cuts = packed.cu_seqlens[1:-1].long()
    return [(before.tolist(), after.tolist()) for before, after in zip(
        torch.tensor_split(packed.before, cuts), torch.tensor_split(packed.tokens, cuts), strict=True)]


def text_of(tokenizer, side):
    return tokenizer.decode([token for token in side if token != BLANK]).removesuffix(tokenizer.eos_token)


def count_edits(columns):
    return sum(a != b for a, b in columns)


def plain_table(before, after):
    """The same columns by the table of distances as in the textbooks."""
    table = [[i + j for j in range(len(after) + 1)] for i in range(len(before) + 1)]
    for i in range(1, len(before) + 1):
        for j in range(1, len(after) + 1):
            table[i][j] = min(table[i - 1][j - 1] + (before[i - 1] != after[j - 1]), table[i - 1][j] + 1,
                              table[i][j - 1] + 1)
    i, j, columns = len(before), len(after), []
    while i or j:
        if i and j and table[i][j] == table[i - 1][j - 1] + (before[i - 1] != after[j - 1]):
            i, j = i - 1, j - 1
            columns.append((before[i], after[j]))
        elif i and table[i][j] == table[i - 1][j] + 1:
            i -= 1
            columns.append((before[i], BLANK))
        else:
            j -= 1
            columns.append((BLANK, after[j]))
    return columns[::-1]


def test_columns_and_distances_are_the_recorded_ones(shared):
    cases = json.loads((shared / "golden" / "editflow" / "alignments.json").read_text())
    cases = [case for case in cases if "distance" in case]
    assert len(cases) == 34
    for case in cases:
        columns = align(case["x0"], case["x1"])
        assert count_edits(columns) == case["distance"]
        assert columns == list(zip(case["zz_z0"], case["zz_z1"], strict=True))


@pytest.mark.parametrize("part", [1, 3, 1024])  # rows of the table that are in memory at once
def test_columns_are_those_of_the_whole_table(part, monkeypatch):
    monkeypatch.setattr(alignment_module, "_PART", part)
    draw = random.Random(part)
    for _ in range(300):
        words = draw.choice((1, 2, 4, 20))
        before, after = ([draw.randrange(words) for _ in range(draw.randrange(14))] for _ in range(2))
        assert align(before, after) == plain_table(before, after)


def test_a_thousand_tokens_are_aligned_in_20_ms():
    draw = random.Random(0)
    before, after = ([draw.randrange(300) for _ in range(1024)] for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        align(before, after)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.02


def test_a_pair_is_anchored_and_ended_and_special_tokens_in_it_are_text(tmp_path, tokenizer):
    pairs = [{"before": "x <|endoftext|> y", "after": "x <|mask|> y"}, {"before": "", "after": "new"},
             {"before": "old", "after": ""}, {"before": "same", "after": "same"}, {"before": "", "after": ""}]
    data = open_pairs(write(tmp_path / "a.jsonl", pairs), tokenizer)
    assert data.documents == 4 and data.describe().startswith("4 pairs, ") and " columns in 1 rows" in data.describe()
    packed = data.rows.read(range(1))
    end = tokenizer.eos_token_id
    found = set()
    for before, after in split_chunks(packed):
        assert before[0] == after[0] == before[-1] == after[-1] == end  # the tokenizer has no beginning-of-text
        assert end not in before[1:-1] + after[1:-1] and tokenizer.mask_token_id not in after
        assert not any(a == b == BLANK for a, b in zip(before, after, strict=True))
        found.add((text_of(tokenizer, before[1:]), text_of(tokenizer, after[1:])))
    assert found == {(pair["before"], pair["after"]) for pair in pairs[:4]}
    ends = torch.cat((packed.cu_seqlens[:-1], packed.cu_seqlens[1:] - 1)).long()
    assert not packed.trainable[ends].any() and (~packed.trainable).sum() == len(ends)
    tokenizer.bos_token = "<|pad|>"
    before = split_chunks(open_pairs(tmp_path / "a.jsonl", tokenizer).rows.read(range(1)))[0][0]
    assert (before[0], before[-1]) == (tokenizer.bos_token_id, end) and anchor_token_id(tokenizer) != end


@pytest.mark.parametrize("max_seq_len", [2, 3, 8, 21])
def test_long_pairs_are_cut_into_consecutive_chunks_that_each_begin_with_the_anchor(max_seq_len, tmp_path, tokenizer):
    tokenizer.bos_token = "<|pad|>"
    anchor, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    pairs = [{"before": "x" * n, "after": "y" * (n // 2)} for n in range(1, 41)]
    data = open_pairs(write(tmp_path / "a.jsonl", pairs), tokenizer, max_seq_len=max_seq_len)
    packed = data.rows.read(range(data.rows_per_epoch))
    chunks = split_chunks(packed)
    assert max(len(before) for before, _ in chunks) == packed.max_seqlen == max_seq_len
    assert packed.row.bincount().max() <= max_seq_len and data.tokens == len(packed.tokens)
    assert all(before[0] == after[0] == anchor and anchor not in before[1:] for before, after in chunks)
    columns = sorted(column for before, after in chunks for column in zip(before[1:], after[1:], strict=True))
    whole = [list(zip(*side, strict=True)) for side in split_chunks(open_pairs(
        tmp_path / "a.jsonl", tokenizer, max_seq_len=256).rows.read(range(20)))]
    whole = list({tuple(side) for side in whole})
    assert len(whole) == 40
    ends = [(end, end)] * sum((len(side) - 2) % (max_seq_len - 1) == 0 for side in whole)  # alone: nothing to learn
    assert sorted(columns + ends) == sorted(column for side in whole for column in side[1:])
    texts = {tuple(side[1:]) for side in whole}
    for before, after in chunks:
        inside = tuple(zip(before[1:], after[1:], strict=True))
        assert any(text[k:k + len(inside)] == inside for text in texts for k in range(len(text)))


def test_every_source_gives_the_same_pairs(tmp_path, tokenizer):
    pairs = make_pairs(12)
    write(tmp_path / "a.jsonl", pairs)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    datasets.Dataset.from_list(pairs).to_parquet(tmp_path / "c.parquet")
    datasets.Dataset.from_list(pairs).save_to_disk(tmp_path / "d")
    renamed = [{"id": 1, "new": pair["after"], "old": pair["before"]} for pair in pairs]
    write(tmp_path / "e.jsonl", renamed)
    (tmp_path / "f.json").write_text(json.dumps(pairs))
    datasets.Dataset.from_list(pairs).to_csv(tmp_path / "g.csv")
    expected = sorted((pair["before"], pair["after"]) for pair in pairs)
    prints = set()
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d", "e.jsonl", "f.json", "g.csv"):
        data = open_pairs(tmp_path / name, tokenizer, text_keys="old,new" if name[0] == "e" else None)
        found = split_chunks(data.rows.read(range(data.rows_per_epoch)))
        assert sorted(tuple(text_of(tokenizer, side[1:]) for side in chunk) for chunk in found) == expected, name
        prints.add(read_corpus(DataGroup(train_path=str(tmp_path / name), data_type="edits", text_keys="old,new"
                                         if name[0] == "e" else None)).sources[0].content)
    assert len(prints) == 1
    streamed = open_pairs(tmp_path / "a.jsonl", tokenizer, datasets_type="iterable").rows.read(range(60))
    assert {tuple(text_of(tokenizer, side[1:]) for side in chunk) for chunk in split_chunks(streamed)} == set(expected)
    mixed = open_pairs(f"{tmp_path / 'a.jsonl'}*3,{tmp_path / 'c.parquet'}*1", tokenizer).rows.read(range(40))
    assert {tuple(text_of(tokenizer, side[1:]) for side in chunk) for chunk in split_chunks(mixed)} == set(expected)


def test_the_cache_gives_the_columns_back_and_the_held_out_pairs_are_apart(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "a.jsonl", pairs := make_pairs(60))
    first = open_pairs(tmp_path / "a.jsonl", tokenizer, validation_share=0.2)
    monkeypatch.setattr("dllm.data.tokens.align", lambda *texts: pytest.fail("aligned again"))
    again = open_pairs(tmp_path / "a.jsonl", tokenizer, validation_share=0.2)
    places = range(first.rows_per_epoch)
    for mine, kept in zip(first.rows.read(places), again.rows.read(places), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(kept))
    held_out = split_chunks(again.held_out.gather(torch.arange(len(again.held_out))))
    afters = [text_of(tokenizer, after[1:]) for _, after in held_out]
    assert len(afters) == again.held_out_documents == 60 - again.documents > 3
    assert again.held_out_bytes == sum(len(text.encode()) for text in afters)
    corpus = read_corpus(DataGroup(train_path=str(tmp_path / "a.jsonl"), data_type="edits", validation_share=0.0))
    assert list(corpus.texts()) == [text for pair in pairs for text in (pair["before"], pair["after"])]
    other = [*pairs[:-1], {**pairs[-1], "before": "other"}]
    changed = read_corpus(DataGroup(train_path=str(write(tmp_path / "b.jsonl", other)), data_type="edits"))
    assert changed.fingerprint != first.fingerprint


def test_pairs_without_a_side_are_skipped_by_line_and_column_and_refused_if_there_is_no_other(
        tmp_path, tokenizer, capsys):
    bad = [{"after": "a"}, {"before": None, "after": "b"}, {"before": "c"}, {"before": 5, "after": "d"}]
    path = write(tmp_path / "a.jsonl", [*bad, {"before": "e", "after": "f"}])
    assert open_pairs(path, tokenizer).documents == 1
    said = capsys.readouterr().err
    lacks = 'no text in column \'{}\', not even ""'
    assert "skipped 4" in said and f"a.jsonl line 1 ({lacks.format('before')})" in said
    assert f"a.jsonl line 2 ({lacks.format('before')})" in said
    open_pairs(write(path, [*bad[2:], {"before": "e", "after": "f"}]), tokenizer)
    said = capsys.readouterr().err
    assert f"a.jsonl line 1 ({lacks.format('after')})" in said and "line 2 (before is not text)" in said
    for records, message in ((bad[:1], 'line 1 has no text in column \'before\', not even ""; it has after; write "" '
                                       "for an empty text, or name the columns before and after an edit in data.text_"),
                             (bad[1:2], "line 1 has no text in column 'before', .*; it has after"),
                             ([{"text": "x"}], "no text in column 'before' and 'after', .*; it has text")):
        with pytest.raises(UserError, match=message):
            open_pairs(write(path, records), tokenizer)
    (tmp_path / "c.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"no text in .*c.py \(1 skipped\)"):
        open_pairs(tmp_path / "c.py", tokenizer)
    assert "c.py (not a table of pairs)" in capsys.readouterr().err


@pytest.mark.parametrize("data, settings, message", [
    ({"data_type": "edits"}, {"objective": "mdm"}, "data.data_type=edits is learnt by train.objective=edit alone, not"),
    ({"data_type": "edits"}, {"objective": "edit", "edit_source": "masks"}, "train.edit_source 'masks' has no effect"),
    ({"data_type": "edits", "text_keys": "text"}, {"objective": "edit"}, "data.text_keys must be two columns"),
    ({"data_type": "edits"}, {"objective": "edit", "ulysses_parallel_size": 2}, "train.ulysses_parallel_size to 1")])
def test_settings_that_do_not_go_together_are_one_line(data, settings, message):
    with pytest.raises(UserError, match=message):
        Config(data=DataGroup(**data), train=TrainGroup(output_dir="run", **settings))


def is_on_the_way(text, columns):
    """Whether the text has of each column one side."""
    reached = {0}  # tokens of the text that the columns so far can have made
    for column in columns:
        reached = {n + (side != BLANK) for n in reached for side in column
                   if side == BLANK or n < len(text) and text[n] == side}
    return len(text) in reached


@pytest.mark.parametrize("propagation", [0.0, 2.0])
def test_a_row_shows_each_column_before_or_after_and_learns_the_edits_that_remain(propagation, tmp_path, tokenizer,
                                                                                  model):
    tokenizer.bos_token = "<|pad|>"
    data = open_pairs(write(tmp_path / "a.jsonl", make_pairs(25, words=30)), tokenizer, max_seq_len=24)
    rows = data.rows_per_epoch
    settings = TrainGroup(output_dir="run", objective="edit", edit_propagation=propagation, micro_batch_size=rows)
    model.config = replace(model.config, edit_heads="all")
    packed = data.rows.read(range(rows))
    (batch,) = make_batches(data.rows, 0, range(rows), rows, settings, 0, model)
    left, kept = batch.targets, packed.before == packed.tokens
    assert all(left.counts) and sum(left.counts) < (~kept).sum()
    shown = batch.input_ids.flatten()
    assert (shown != BLANK).all() and (shown != tokenizer.mask_token_id).all() and batch.max_seqlen <= 24
    ends = batch.cu_seqlens.long()
    assert (shown[ends[:-1]] == tokenizer.bos_token_id).all() and not left.rate_weights[ends[1:-1] - 1, :2].any()
    for (before, after), text in zip(split_chunks(packed), shown.tensor_split(ends[1:-1]), strict=True):
        assert is_on_the_way(text.tolist(), list(zip(before, after, strict=True)))
    ended = ends[1:][shown[ends[1:] - 1] == tokenizer.eos_token_id] - 1
    assert len(ended) > 8 and not left.rate_weights[ended, 2].any()  # nothing is inserted after end-of-text
    # Micro-batches of one row each give the same rows.
    alone = make_batches(data.rows, 0, range(rows), rows, replace(settings, micro_batch_size=1), 0, model)
    assert torch.equal(torch.cat([part.input_ids.flatten() for part in alone]), shown)
    assert sum(part.scored for part in alone) == batch.scored


@pytest.fixture
def config(tmp_path):
    write(tmp_path / "pairs.jsonl", make_pairs(60))
    train_tokenizer([" ".join(WORDS)], 270).save_pretrained(tmp_path / "tokenizer")
    return Config(
        model=ModelGroup(tokenizer_path=str(tmp_path / "tokenizer"), hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
        data=DataGroup(train_path=str(tmp_path / "pairs.jsonl"), data_type="edits", max_seq_len=48,
                       validation_share=0.1),
        train=TrainGroup(output_dir=str(tmp_path / "run"), objective="edit", lr=3e-3, micro_batch_size=4, max_steps=16,
                         num_train_epochs=100, device="cpu", precision="fp32", eval_every=8, use_tensorboard=False))


def losses(history):
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
            for line in history]


def test_a_run_lowers_the_loss_continues_bit_for_bit_and_its_model_edits(config, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = train(config)
    assert sum(line["loss"] for line in whole.history[-4:]) < 0.8 * sum(line["loss"] for line in whole.history[:4])
    assert whole.history[-1]["validation_loss"] < whole.history[7]["validation_loss"]
    config = replace(config, train=replace(config.train, output_dir=str(tmp_path / "again"), save_steps=8))

    def interrupt(source, step, *rest):
        if step == 11:
            raise KeyboardInterrupt
        return make_batches(source, step, *rest)

    monkeypatch.setattr(trainer, "make_batches", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(trainer, "make_batches", make_batches)
    resumed = train(config)
    torch.set_num_threads(threads)
    assert losses(resumed.history) == losses(whole.history)
    before, after = (DiffusionLM.from_pretrained(result.checkpoint).state_dict() for result in (whole, resumed))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_config(resumed.output_dir / "config.yaml") == config
    model = DiffusionLM.from_pretrained(resumed.checkpoint)
    defaults = read_json(resumed.checkpoint / "generation_config.json")
    assert model.config.edit_heads == "all" and defaults["alg"] == "edit" and "edit_source" not in defaults
    out = model.edit(torch.tensor([[0, 5, 6, 7, 0]]), steps=4, max_new_tokens=4, seed=0)
    assert out.sequences[0, 0] == 0 and out.sequences.shape[1] <= 9


def test_pairs_that_only_delete_are_measured_too(config, tmp_path):
    write(tmp_path / "pairs.jsonl", [{"before": f"{pair['before']} x", "after": ""} for pair in make_pairs(20)])
    result = train(replace(config, train=replace(config.train, max_steps=2)))
    assert result.history[-1]["validation_loss"] > 0


@pytest.mark.slow
def test_edits_learnt_by_heart_are_made(config, tmp_path):
    pairs = [("one and two", "two and one"), ("x = 1", "x = 12"), ("print x", "print(x)"), ("bad line", ""),
             ("leave this", "leave this")]
    write(tmp_path / "pairs.jsonl", [{"before": before, "after": after} for before, after in pairs])
    result = train(replace(
        config, model=replace(config.model, hidden_size=64, intermediate_size=128),
        data=replace(config.data, validation_share=0.0, max_seq_len=16),
        train=replace(config.train, max_steps=400, num_train_epochs=10_000, log_steps=100,
                      lr_decay_style="cosine")))
    model, tokenizer = DiffusionLM.from_pretrained(result.checkpoint), load_tokenizer(result.checkpoint)
    right = 0
    for before, after in pairs:
        ids = torch.cat((torch.tensor([anchor_token_id(tokenizer)]), encode(tokenizer, before),
                         torch.tensor([tokenizer.eos_token_id])))
        editable = torch.arange(len(ids)).remainder(len(ids) - 1) > 0
        for seed in range(3):
            out = model.edit(ids, editable=editable, steps=32, max_new_tokens=16, temperature=0.0, seed=seed)
            row = out.sequences[0] if out.attention_mask is None else out.sequences[0][out.attention_mask[0]]
            right += text_of(tokenizer, row[1:].tolist()) == after
    assert right >= 12  # of 15: how many edits a step makes is drawn
