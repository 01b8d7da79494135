"""Data: an epoch has every token of every readable document once, in an order that only the seed decides."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from dllm.data import Document, PackedDataset, pack, read_documents, split_documents, tokenize
from dllm.errors import UserError
from dllm.model.tokenizer import train_tokenizer


def make_sequences(seed=0, count=60, longest=70):
    """Documents whose tokens are all different numbers, so that a test can find each."""
    lengths = torch.randint(1, longest, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return list(torch.arange(sum(lengths)).split(lengths))


def test_a_folder_gives_its_files_in_order_and_skips_and_counts_what_is_no_text(tmp_path, capsys):
    (tmp_path / "b.py").write_text("b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a.txt").write_text("a")
    (tmp_path / "a/empty.txt").write_text("")
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe\x80")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_text("hidden")
    assert read_documents([tmp_path]) == [Document("a", "a/a.txt"), Document("b", "b.py")]
    assert capsys.readouterr().err == "skipped 1 that could not be read as text: bad.py (not UTF-8)\n"


def test_jsonl_and_parquet_give_one_document_per_record(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet
    records = ['{"text": "one"}', '{"id": 1, "text": "two\\nlines"}', "", "not json", '{"text": 5}', '{"text": ""}']
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    table = pyarrow.table({"id": [1, 2, 3], "text": ["three", None, "four\u2028same"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 cut short")
    documents = read_documents([tmp_path])
    assert [d.text for d in documents] == ["one", "two\nlines", "three", "four\u2028same"]
    assert [d.source for d in documents] == ["a.jsonl:1", "a.jsonl:2", "b.parquet:1", "b.parquet:3"]
    error = capsys.readouterr().err
    assert "skipped 3" in error and "a.jsonl line 4 (not JSON)" in error and "c.parquet (not Parquet" in error


def test_the_first_present_text_key_is_taken_and_a_missing_one_refused_with_those_there(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "yes", "id": 1}))
    assert read_documents([tmp_path / "a.jsonl"], ["text", "content"])[0].text == "yes"
    with pytest.raises(UserError, match="a.jsonl line 1 has no column 'text'; it has content, id; name one of "):
        read_documents([tmp_path / "a.jsonl"])


def test_a_table_without_the_columns_among_texts_is_skipped_and_named(tmp_path, capsys):
    """Like a list of settings in JSON, in a folder of code."""
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.json").write_text(json.dumps([{"op": "add"}, {"op": "remove"}]))
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"other": "two"}\n{"text": "three"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "d.parquet")
    assert [document.text for document in read_documents([tmp_path])] == ["x = 1\n", "one", "three"]
    said = capsys.readouterr().err
    assert "skipped 3" in said
    for skipped in ("b.json (no column 'text')", "c.jsonl line 2 (no column 'text')", "d.parquet (no column 'text')"):
        assert skipped in said


def test_a_missing_folder_and_an_empty_corpus_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_documents([tmp_path / "nowhere"])
    (tmp_path / "bad.py").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"no text in .* \(1 skipped\)"):
        read_documents([tmp_path])


@pytest.mark.slow
def test_without_a_path_the_standard_library_is_read_without_its_tests():
    sources = {d.source for d in read_documents()}
    assert {"argparse.py", "json/decoder.py"} <= sources
    assert not any(part in ("test", "tests", "site-packages") for s in sources for part in Path(s).parts[:-1])


def test_a_document_stays_on_its_side_when_others_come():
    documents = [Document("x", f"file{i}.py") for i in range(400)]
    training, held_out = split_documents(documents, 0.1)
    assert sorted(d.source for d in training + held_out) == sorted(d.source for d in documents)
    assert 20 <= len(held_out) <= 60
    assert set(held_out) >= set(split_documents(documents[:200], 0.1)[1])
    assert split_documents(documents, 0)[1] == []


def test_two_documents_are_enough_for_a_held_out_one():
    for share in (1e-9, 1 - 1e-9):
        assert [len(side) for side in split_documents([Document("x", "a"), Document("y", "b")], share)] == [1, 1]
    assert split_documents([Document("x", "a")], 0.5) == ([Document("x", "a")], [])


def test_tokens_end_with_end_of_text_and_begin_with_nothing():
    documents = [Document("def f(): pass\n", "a"), Document("x = 1\n", "b")]
    tokenizer = train_tokenizer([d.text for d in documents], 270)
    for sequence, document in zip(tokenize(tokenizer, documents), documents, strict=True):
        assert sequence[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(sequence[:-1]) == document.text


@pytest.mark.parametrize("max_seq_len", [2, 7, 16, 100])
def test_an_epoch_holds_every_token_once_and_no_row_is_too_long(max_seq_len):
    sequences = make_sequences()
    dataset = PackedDataset(sequences, max_seq_len)
    packed = dataset.read(range(len(dataset)))
    assert packed.tokens.sort().values.tolist() == list(range(sum(map(len, sequences))))
    assert packed.row.bincount().max() <= max_seq_len
    assert (packed.column == torch.cat([torch.arange(n) for n in packed.row.bincount().tolist()])).all()


def test_chunks_are_consecutive_pieces_of_one_document_of_at_most_max_seq_len():
    sequences = make_sequences()
    document = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor([len(s) for s in sequences]))
    dataset = PackedDataset(sequences, 16)
    packed = dataset.read(range(len(dataset)))
    pieces = torch.tensor_split(packed.tokens, packed.cu_seqlens[1:-1].long())
    assert max(map(len, pieces)) == packed.max_seqlen == 16
    for piece in pieces:
        assert (piece.diff() == 1).all() and len(document[piece].unique()) == 1
    assert sum(len(p) < 16 for p in pieces) <= len(sequences)  # only a last chunk is shorter


def test_packing_wastes_little():
    dataset = PackedDataset(make_sequences(count=2000), 128)
    assert len(dataset.tokens) / (len(dataset) * 128) > 0.99


def test_pack_fits_and_keeps_everything():
    lengths = [5, 5, 3, 3, 3, 1, 8]
    rows = pack(lengths, 8)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 8 for row in rows) and len(rows) == 4


def test_rows_depend_on_the_seed_and_place_alone_and_epochs_differ():
    first, again = (PackedDataset(make_sequences(), 16, seed=3) for _ in range(2))
    n, tokens = len(first), len(first.tokens)
    order = first.read(range(3 * n)).tokens
    pieces = torch.cat([again.read(range(i, min(i + 5, 3 * n))).tokens for i in range(0, 3 * n, 5)])
    assert torch.equal(pieces, order)
    epochs = order.split(tokens)
    assert all(epoch.sort().values.tolist() == list(range(tokens)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], PackedDataset(make_sequences(), 16, seed=4).read(range(n)).tokens)
