"""Streams and mixtures: rows are a function of corpus, seed and place, whichever process reads them, from any place."""

import json

import pytest
import torch

from dllm.config.reading import load_config
from dllm.config.schema import DataGroup
from dllm.data import MixedDataset, PackedDataset, open_training_data, read_corpus
from dllm.data import streaming as streaming_module
from dllm.data.corpus import choose_lanes
from dllm.errors import UserError
from dllm.training.trainer import train


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming_module, "_BLOCK", 200)


@pytest.fixture
def folder(tmp_path):
    """320 documents in three tables and twenty files, some longer than a row."""
    for i in range(3):
        texts = [f"record {i} {number} " + "and so on " * (number % 7) for number in range(100)]
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"file {i}")
    return tmp_path


def open_stream(folder, tokenizer, rows_per_step=8, seed=0, **settings):
    group = DataGroup(train_path=str(folder), datasets_type="iterable",
                      **{"validation_share": 0.0, "max_seq_len": 32} | settings)
    return open_training_data(read_corpus(group), tokenizer, seed, rows_per_step)


def split_rows(packed):
    rows = packed.row.bincount().cumsum(0)[:-1]
    return [row.tolist() for row in torch.tensor_split(packed.tokens, rows)]


def split_chunks(tokenizer, packed):
    return [tokenizer.decode(piece) for piece in torch.tensor_split(packed.tokens, packed.cu_seqlens[1:-1].long())]


def test_rows_are_the_same_however_many_processes_read_them(folder, tokenizer):
    expected = split_rows(open_stream(folder, tokenizer).rows.read(range(80)))
    for processes in (2, 4, 8):
        for rank in range(processes):
            rows, share = open_stream(folder, tokenizer).rows, 8 // processes
            mine = [row for step in range(10)
                    for row in split_rows(rows.read(range(step * 8 + rank * share, step * 8 + (rank + 1) * share)))]
            assert mine == [row for place, row in enumerate(expected) if place % 8 // share == rank]


def test_a_process_reads_only_the_lanes_of_its_rows(folder, tokenizer):
    rows = open_stream(folder, tokenizer, rows_per_step=16).rows
    for step in range(30):
        rows.read(range(step * 16 + 4, step * 16 + 8))
    moved = [lane for lane, state in enumerate(rows.state()["lanes"]) if any(state)]
    assert moved == [4, 5, 6, 7]
    assert [choose_lanes(n) for n in (1, 3, 8, 60, 64, 96, 512)] == [8, 9, 8, 60, 64, 48, 64]


@pytest.mark.parametrize("before, after", [(2, 2), (4, 1), (1, 8), (2, 4)])
def test_a_run_goes_on_with_another_number_of_processes_without_reading_again(folder, tokenizer, before, after,
                                                                              monkeypatch):
    """The step before the state may be read again too, because a checkpoint follows the last trained step."""
    expected = split_rows(open_stream(folder, tokenizer).rows.read(range(30 * 8)))
    states = []
    for rank in range(before):
        rows, share = open_stream(folder, tokenizer).rows, 8 // before
        for step in range(20):
            rows.read(range(step * 8 + rank * share, step * 8 + (rank + 1) * share))
        states.append(json.loads(json.dumps(rows.state())))
    packed, encode = [], streaming_module.encode_documents
    monkeypatch.setattr(streaming_module, "encode_documents",
                        lambda *args, **rest: packed.append(1) or encode(*args, **rest))
    for rank in range(after):
        rows, share = open_stream(folder, tokenizer).rows, 8 // after
        packed.clear()
        rows.restore(states)
        places = range(20 * 8 + rank * share, 20 * 8 + (rank + 1) * share)
        assert split_rows(rows.read(places)) == expected[places.start:places.stop]
        assert len(packed) <= 2 * share  # the block of a lane, and the next one if it had ended
        for step in range(21, 30):
            places = range(step * 8 + rank * share, step * 8 + (rank + 1) * share)
            assert split_rows(rows.read(places)) == expected[places.start:places.stop]


def test_every_document_comes_once_an_epoch_in_another_order(folder, tokenizer):
    rows = open_stream(folder, tokenizer).rows
    lane = rows._lanes[3]
    chunks, ends = [], []
    number = 0
    while len(ends) < 2:
        packed = lane.read(number)
        if lane.start[0] > len(ends):
            ends.append(len(chunks))
        chunks += split_chunks(tokenizer, packed)
        number += 1
    first, second = chunks[:ends[0]], chunks[ends[0]:ends[1]]
    assert sorted(first) == sorted(second) and first != second and len(first) > 30
    others = split_chunks(tokenizer, rows._lanes[4].read(0))
    begins = {chunk for chunk in others if chunk.startswith(("record", "file"))}  # the ends of documents repeat
    assert begins and not set(first) & begins


def test_all_lanes_together_hold_every_document(folder, tokenizer):
    chunks = split_chunks(tokenizer, open_stream(folder, tokenizer, max_seq_len=256).rows.read(range(400)))
    assert len(set(chunks)) == 320


def test_of_many_files_each_lane_opens_its_own(tmp_path, tokenizer):
    for i in range(70):
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"text": f"{i} {n}"}) + "\n" for n in range(4)))
    rows = open_stream(tmp_path, tokenizer, max_seq_len=256).rows
    files = [{text.split()[0] for number in range(8) for text in split_chunks(tokenizer, lane.read(number))}
             for lane in rows._lanes]
    assert sorted(file for lane in files for file in lane) == sorted(map(str, range(70)))
    chunks = split_chunks(tokenizer, open_stream(tmp_path, tokenizer, max_seq_len=256).rows.read(range(200)))
    assert len(set(chunks)) == 280


def test_the_seed_decides_the_order(folder, tokenizer):
    first, other = (split_rows(open_stream(folder, tokenizer, seed=seed).rows.read(range(80))) for seed in (0, 1))
    assert first != other


def test_a_corpus_of_fewer_documents_than_lanes_is_read_by_all(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    rows = open_stream(tmp_path, tokenizer).rows
    expected = split_rows(rows.read(range(16)))
    assert expected == split_rows(open_stream(tmp_path, tokenizer).rows.read(range(16)))
    again = open_stream(tmp_path, tokenizer).rows
    again.restore([rows.state()])
    assert split_rows(again.read(range(16, 32))) == split_rows(rows.read(range(16, 32)))


def test_held_out_documents_are_never_trained_on(folder, tokenizer):
    data = open_stream(folder, tokenizer, validation_share=0.1, max_seq_len=256)
    held_out = set(split_chunks(tokenizer, data.held_out.gather(torch.arange(len(data.held_out)))))
    trained = set(split_chunks(tokenizer, data.rows.read(range(400))))
    assert not held_out & trained and len(held_out | trained) == 320 and 10 < len(held_out) < 60
    assert data.held_out_bytes == sum(len(text.removesuffix(tokenizer.eos_token)) for text in held_out)
    assert (data.rows_per_epoch, data.tokens, data.documents) == (None, None, None)


def test_a_stream_of_nothing_is_refused_and_what_is_damaged_told_once(tmp_path, folder, tokenizer, capsys):
    (folder / "bad.parquet").write_bytes(b"PAR1")
    open_stream(folder, tokenizer).rows.read(range(400))
    assert capsys.readouterr().err.count("bad.parquet") == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="nothing to train on"):
        open_stream(empty, tokenizer).rows.read(range(8))


def test_reading_back_is_refused(folder, tokenizer):
    rows = open_stream(folder, tokenizer).rows
    first = split_rows(rows.read(range(400)))[:8]
    with pytest.raises(ValueError, match="in order"):
        rows.read(range(8))
    rows.restore([])
    assert split_rows(rows.read(range(8))) == first


def make_source(first, count, seed=0):
    return PackedDataset(list(torch.arange(first, first + count * 3).split(3)), 3, seed)


def test_a_mixture_gives_each_source_its_share_of_any_stretch():
    weights = [5, 3, 1.5, 0.5]
    mixed = MixedDataset([make_source(1000 * i, 50) for i in range(4)], weights, seed=1)
    source = mixed.read(range(25_000)).tokens[::3] // 1000
    for stretch, tolerance in ((source[:10_000], 0), (source[10_000:20_000], 0), (source[3_000:8_000], 0.02)):
        shares = stretch.bincount(minlength=4) / len(stretch)
        assert (shares - torch.tensor(weights) / 10).abs().max() <= tolerance + 1e-6
    assert not torch.equal(source[:10_000], source[10_000:20_000])


def test_a_mixture_keeps_the_order_of_each_source_and_its_rows_depend_on_seed_and_place_alone():
    sources = [make_source(0, 40), make_source(1000, 7)]
    mixed = MixedDataset(sources, [3, 1], seed=5)
    rows = split_rows(mixed.read(range(12_000)))
    for index, source in enumerate(sources):
        mine = [row for row in rows if row[0] // 1000 == index]
        assert mine == split_rows(source.read(range(len(mine))))
    other = MixedDataset([make_source(0, 40), make_source(1000, 7)], [3, 1], seed=5)
    assert split_rows(other.read(range(9_990, 10_010))) == rows[9_990:10_010]
    assert split_rows(MixedDataset(sources, [3, 1], seed=6).read(range(100))) != rows[:100]


def test_rows_of_several_chunks_stay_whole_in_a_mixture():
    documents = [list(torch.arange(first, first + 400).split([7, 3, 5, 5] * 20)) for first in (0, 1000)]
    sources = [PackedDataset(sequences, 10) for sequences in documents]
    mixed = MixedDataset(sources, [1, 1])
    packed = mixed.read(range(30))
    assert packed.tokens.dtype == torch.int64 and packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens[-1] == len(packed.tokens) and packed.max_seqlen == packed.cu_seqlens.diff().max()
    for piece in torch.tensor_split(packed.tokens, packed.cu_seqlens[1:-1].long()):
        assert (piece.diff() == 1).all()
    assert torch.equal(packed.column, torch.cat([torch.arange(len(row)) for row in split_rows(packed)]))


def test_a_streamed_mixture_goes_on_from_its_state(folder, tmp_path, tokenizer):
    def open_mixture():
        group = DataGroup(train_path=f"{folder / '0.jsonl'}*3, {folder / '1.jsonl'}*1", datasets_type="iterable",
                          max_seq_len=32, validation_share=0.1)
        return open_training_data(read_corpus(group), tokenizer, 0)

    expected = split_rows(open_mixture().rows.read(range(200)))
    first = open_mixture()
    first.rows.read(range(120))
    second = open_mixture()
    second.rows.restore([first.rows.state(), open_mixture().rows.state()])
    assert split_rows(second.rows.read(range(120, 200))) == expected[120:]
    assert first.held_out_documents > 0


def test_training_on_a_stream_goes_on_after_a_stop_to_the_same_losses_and_not_on_other_files(folder, tmp_path_factory):
    def run(output_dir, steps):
        flags = [f"--data.train_path={folder}", "--data.datasets_type=iterable", "--data.max_seq_len=32",
                 f"--train.output_dir={output_dir}", "--train.micro_batch_size=4", "--model.vocab_size=300",
                 "--model.hidden_size=16", "--model.intermediate_size=32", "--model.num_hidden_layers=1",
                 "--model.num_attention_heads=2", "--model.num_key_value_heads=2", "--train.device=cpu"]
        return [line["loss"] for line in train(load_config(None, flags + steps)).history]

    outputs = [tmp_path_factory.mktemp("run") for _ in range(2)]
    whole = run(outputs[0], ["--train.max_steps=20"])
    run(outputs[1], ["--train.max_steps=12"])
    assert run(outputs[1], ["--train.max_steps=20"]) == whole and len(whole) == 20
    with pytest.raises(UserError, match="a stream has no known length; set data.train_size"):
        run(outputs[0], [])
    (folder / "new.txt").write_text("new")
    with pytest.raises(UserError, match="continues a run on other documents than there are now in"):
        run(outputs[1], ["--train.max_steps=30"])


def test_weights_are_read_from_the_path_and_must_be_given_to_all():
    group = DataGroup(train_path="a*3, owner/name:small@train*0.5")
    assert group.sources == [(["a"], 3.0), (["owner/name:small@train"], 0.5)]
    assert group.path_list == ["a", "owner/name:small@train"]
    assert DataGroup(train_path="a,b").sources == [(["a", "b"], 1.0)] and DataGroup().sources == [(None, 1.0)]
    for path in ("a*3,b", "a*0,b*1"):
        with pytest.raises(UserError, match="must give every entry a weight above 0"):
            DataGroup(train_path=path)
    with pytest.raises(UserError, match="less than one row in 10,000"):
        MixedDataset([make_source(0, 1), make_source(9, 1)], [1, 1e-6])


def test_a_mixture_of_folders_trains_with_the_shares_and_holds_out_of_each(folder, tokenizer):
    group = DataGroup(train_path=f"{folder / '0.jsonl'}*3,{folder / '1.jsonl'}*1", max_seq_len=32, validation_share=0.2)
    data = open_training_data(read_corpus(group), tokenizer, 0)
    texts = split_chunks(tokenizer, data.held_out.gather(torch.arange(len(data.held_out))))
    assert any("record 0" in text for text in texts) and any("record 1" in text for text in texts)
    rows = [tokenizer.decode(row) for row in split_rows(data.rows.read(range(10_000)))]
    seen = [sum(f"record {i}" in row for row in rows) for i in range(2)]  # the rest are middles of long documents
    assert sum(seen) > 5000 and abs(seen[0] / sum(seen) - 0.75) < 0.02
    assert data.rows_per_epoch == sum(map(len, data.rows.sources))
