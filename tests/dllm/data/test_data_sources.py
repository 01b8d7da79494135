"""Sources of documents: kinds of files, the hub, unreadable data, and the cache of tokens."""

import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch

from dllm.config.schema import DataGroup
from dllm.data import Document, open_training_data, read_corpus, read_documents
from dllm.data import tokens as tokens_module
from dllm.data.tokens import encode_documents, load_or_encode
from dllm.errors import Failure, UserError

TEXTS = ["one", "two\nlines", "three, \"quoted\"", "four\u2028same"]


def write_table(kind, path):
    table = datasets.Dataset.from_dict({"id": range(4), "text": TEXTS})
    if kind == "arrow":
        table.save_to_disk(path)
        for other in path.glob("*.json"):
            other.unlink()
    elif kind == "arrow file":
        with pyarrow.ipc.new_file(path.with_suffix(".arrow"), table.data.schema) as file:
            file.write_table(table.data.table)
    elif kind == "csv":
        with open(path.with_suffix(".csv"), "w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate(TEXTS)])
    elif kind == "json":
        path.with_suffix(".json").write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)]))
    elif kind == "json lines":
        path.with_suffix(".json").write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in TEXTS))
    else:
        table.to_parquet(path.with_suffix(".parquet"))


@pytest.mark.parametrize("kind", ["arrow", "arrow file", "csv", "json", "json lines", "parquet"])
def test_a_table_gives_one_document_per_record_and_names_its_columns(kind, tmp_path):
    write_table(kind, tmp_path / "table")
    documents = read_documents([tmp_path])
    assert [document.text for document in documents] == TEXTS
    assert len({document.source for document in documents}) == 4
    with pytest.raises(UserError, match="has no column 'content'; it has id, text; name one of them in data.text_keys"):
        read_documents([tmp_path], "content")


@pytest.mark.parametrize("compression", ["gz", "bz2", "zst", "lz4"])
def test_tables_and_texts_may_be_compressed(compression, tmp_path):
    def write(name, text):
        with pyarrow.output_stream(tmp_path / f"{name}.{compression}", compression="detect") as file:
            file.write(text.encode())

    write("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    write("b.csv", "text\n\"of a\ntable\"\n")
    write("c.json", json.dumps([{"text": "a record"}]))
    write("d.py", "import this\n")
    texts = [document.text for document in read_documents([tmp_path])]
    assert texts == [*TEXTS, "of a\ntable", "a record", "import this\n"]


def test_xz_is_unpacked_and_its_damage_named(tmp_path, capsys):
    lines = "".join(json.dumps({"text": f"{i * i}"}) + "\n" for i in range(9999)).encode()
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines[:40]) + lzma.compress(lines[40:]))
    (tmp_path / "b.txt.XZ").write_bytes(lzma.compress(b"plain"))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines)[:-2000])
    (tmp_path / "d.txt.xz").write_bytes(b"no xz")
    texts = [document.text for document in read_documents([tmp_path])]
    assert texts[:3] == ["0", "1", "4"] and texts[9999] == "plain" and texts[10000:10003] == ["0", "1", "4"]
    error = capsys.readouterr().err
    assert error.startswith("skipped 2 ") and "c.jsonl.xz (Compressed file ended" in error and "d.txt.xz (" in error


def test_damaged_compressed_files_and_archives_are_skipped_and_named(tmp_path, capsys):
    lines = "".join(json.dumps({"text": f"a text with the number {i * i}"}) + "\n" for i in range(9999)).encode()
    whole = gzip.compress(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "b.jsonl.gz").write_bytes(lines)
    (tmp_path / "c.txt.gz").write_bytes(whole[:-9])
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as archive:
        archive.add(__file__, "test.py")
    documents = read_documents([tmp_path])
    assert 1000 < len(documents) < 9999
    assert {document.source.partition(":")[0] for document in documents} == {"a.jsonl.gz"}
    error = capsys.readouterr().err
    assert error == ("skipped 4 that could not be read as text: a.jsonl.gz (Truncated compressed stream), b.jsonl.gz "
                     "(zlib inflate failed: incorrect header check), c.txt.gz (Truncated compressed stream) and 1 "
                     "more\n")


def test_json_that_is_no_table_is_text(tmp_path):
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}')
    assert [document.text for document in read_documents([tmp_path])] == ['{\n "name": "x"\n}']


def test_damaged_and_empty_shards_are_skipped_counted_and_named(tmp_path, capsys):
    write_table("parquet", tmp_path / "good")
    capsys.readouterr()
    whole = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "bad.arrow").write_bytes(b"no arrow")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "void.arrow").write_bytes(b"")
    (tmp_path / "void.parquet").write_bytes(b"")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n{"text": "fine"}\n')
    assert {document.text for document in read_documents([tmp_path])} == {*TEXTS, "fine"}
    error = capsys.readouterr().err
    assert error.startswith("skipped 6 ") and error.count("\n") == 1
    (tmp_path / "good.parquet").unlink()
    (tmp_path / "half.jsonl").unlink()
    with pytest.raises(UserError, match=r"no text in .* \(5 skipped\)"):
        read_corpus(DataGroup(train_path=str(tmp_path)))
    assert "bad.arrow (not Arrow" in error and "cut.parquet (not Parquet" in error and "empty.jsonl (empty)" in error


@pytest.fixture
def hub(monkeypatch):
    """A hub with one dataset."""
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name != "owner/name":
            raise ConnectionError("Couldn't reach the Hub\nand more")
        table = datasets.Dataset.from_dict({"id": range(40), "text": [f"text {i}" for i in range(40)]})
        return table.to_iterable_dataset(num_shards=4) if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return asked


def test_a_dataset_of_the_hub_is_read_by_name_configuration_and_split(hub, tmp_path, monkeypatch):
    documents = read_documents(["owner/name:small@test"])
    assert [document.text for document in documents] == [f"text {i}" for i in range(40)]
    assert documents[0].source == "owner/name:small@test:1"
    read_documents(["owner/name"])
    assert hub == [("owner/name", "small", "test", False), ("owner/name", None, "train", False)]
    with pytest.raises(UserError, match=r"owner/other is no local path, and cannot .*\(Couldn't reach the Hub\)"):
        read_documents(["owner/other"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/a.txt").write_text("local")
    assert [document.text for document in read_documents(["owner/name"])] == ["local"]


def test_a_hub_that_stops_to_answer_ends_the_run_with_the_reason(hub, tokenizer, monkeypatch):
    def records():
        yield {"text": "one"}
        raise TimeoutError("the read timed out")

    table = datasets.IterableDataset.from_generator(records, features=datasets.Features(text=datasets.Value("string")))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    with pytest.raises(Failure, match=r"cannot read on in owner/name \(the read timed out\); start again to go on"):
        read_documents(["owner/name"])


@pytest.mark.slow
def test_a_dataset_of_the_hub_can_be_streamed(hub, tokenizer):
    group = DataGroup(train_path="owner/name", datasets_type="iterable", max_seq_len=32, validation_share=0.2)
    data = open_training_data(read_corpus(group), tokenizer, 0)
    texts = decode(tokenizer, data.rows.read(range(200)))
    held_out = set(decode(tokenizer, data.held_out.gather(torch.arange(len(data.held_out)))))
    assert held_out and set(texts) | held_out == {f"text {i}" for i in range(40)} and not set(texts) & held_out
    assert hub == [("owner/name", None, "train", True)]


def decode(tokenizer, packed):
    pieces = torch.tensor_split(packed.tokens, packed.cu_seqlens[1:-1].long())
    return [tokenizer.decode(piece[:-1]) for piece in pieces]


def make_corpus(folder, texts=TEXTS, **settings):
    folder.mkdir(exist_ok=True)
    for index, text in enumerate(texts):
        (folder / f"{index}.txt").write_text(text)
    return read_corpus(DataGroup(train_path=str(folder), max_seq_len=8, **settings))


@pytest.fixture
def encodings(monkeypatch, tmp_path):
    """The counts of documents that are tokenised, with an empty cache."""
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path / "cache"))
    counts = []

    def count(tokenizer, documents, workers, **rest):
        documents = list(documents)
        counts.append(len(documents))
        return encode_documents(tokenizer, documents, workers, **rest)

    monkeypatch.setattr(tokens_module, "encode_documents", count)
    return counts


def read_all(data):
    packed = data.rows.read(range(data.rows_per_epoch))
    return packed.tokens.tolist()


def test_tokens_are_kept_by_content_and_made_again_for_other_content_or_another_tokenizer(
        encodings, tokenizer, tmp_path):
    first = read_all(open_training_data(make_corpus(tmp_path / "a"), tokenizer, 0))
    again = open_training_data(make_corpus(tmp_path / "b", validation_share=0.3), tokenizer, 0)  # the same elsewhere
    assert encodings == [4] and again.documents + again.held_out_documents == 4
    assert read_all(open_training_data(make_corpus(tmp_path / "a"), tokenizer, 0)) == first
    assert encodings == [4]
    open_training_data(make_corpus(tmp_path / "a", ["other", *TEXTS[1:]]), tokenizer, 0)
    tokenizer.add_tokens("quoted")
    open_training_data(make_corpus(tmp_path / "b"), tokenizer, 0)
    assert encodings == [4, 4, 4]


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"",
                                    lambda b: b[9:]])
def test_damaged_tokens_are_made_again(damage, encodings, tokenizer, tmp_path, capsys):
    first = read_all(open_training_data(make_corpus(tmp_path / "a"), tokenizer, 0))
    path = next((tmp_path / "cache").rglob("*.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    assert read_all(open_training_data(make_corpus(tmp_path / "a"), tokenizer, 0)) == first
    assert encodings == [4, 4] and "damaged" in capsys.readouterr().err
    assert read_all(open_training_data(make_corpus(tmp_path / "a"), tokenizer, 0)) == first
    assert encodings == [4, 4]


def test_a_cache_that_cannot_be_written_is_told_and_done_without(tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path / "file"))
    assert open_training_data(make_corpus(tmp_path / "a"), tokenizer, 0).tokens > 0
    assert "set DLLM_CACHE to another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_script_without_a_main_part_is_told_what_to_do(tmp_path):
    (tmp_path / "script.py").write_text("""
from transformers import ByT5Tokenizer
from dllm.data import Document
from dllm.data.tokens import encode_documents
encode_documents(ByT5Tokenizer(), [Document("x", "x")] * 3000, 2)
""")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})
    assert "dllm.errors.Failure: a process that tokenises has died; in a script of your own" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fast", "python", "conversations", "pairs"])
def test_workers_of_any_kind_give_the_same_tokens_in_order(kind, tokenizer, monkeypatch):
    from transformers import ByT5Tokenizer
    monkeypatch.setattr(tokens_module, "_FEW", 150)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" \
                              "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = ByT5Tokenizer() if kind == "python" else tokenizer
    talks = [json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": str(i)}]})
             if kind == "conversations" else None for i in range(200)]
    documents = [Document(f"text number {i}", str(i), talks[i], f"test {i + 1}" if kind == "pairs" else None)
                 for i in range(200)]
    alone = encode_documents(tokenizer, documents, 1, anchor=0)
    for count in (200, 149):  # enough for processes, and too few
        for mine, expected in zip(encode_documents(tokenizer, documents[:count], 2, anchor=0), alone, strict=True):
            assert mine is expected is None or torch.equal(mine, expected[:len(mine)]) and len(mine) >= count
    assert (alone.trainable is None) == (kind in ("fast", "python")) and len(alone.lengths) == 200
    assert (alone.before is not None) == (kind == "pairs")
    for _ in range(2):  # made, and read back
        for mine, expected in zip(load_or_encode(tokenizer, kind, documents, 1, anchor=0), alone, strict=True):
            assert mine is expected is None or torch.equal(mine, expected)


def test_held_out_text_is_counted_in_bytes_and_the_fingerprint_follows_the_content(tokenizer, tmp_path):
    texts = [f"é{i}" for i in range(100)]
    data = open_training_data(make_corpus(tmp_path / "a", texts, validation_share=0.3), tokenizer, 0)
    found = decode(tokenizer, data.held_out.gather(torch.arange(len(data.held_out))))
    assert data.held_out_bytes == sum(len(text.encode()) for text in found) and len(found) == data.held_out_documents
    assert data.documents == 100 - len(found) and data.tokens == data.rows.num_tokens
    assert make_corpus(tmp_path / "b", texts).fingerprint == data.fingerprint
    assert make_corpus(tmp_path / "b", ["other"]).fingerprint != data.fingerprint
    streamed = [make_corpus(tmp_path / name, texts[1:], datasets_type="iterable").fingerprint for name in "ab"]
    (tmp_path / "b/new.txt").write_text("new")
    assert streamed[0] == streamed[1] != make_corpus(tmp_path / "b", [], datasets_type="iterable").fingerprint
