"""Files as the world writes them: encodings, suffixes, uneven records, links, and what lies beside the data."""

import gzip
import json
import os

import datasets
import pytest

from dllm.data import Document, read_documents, tokenize
from dllm.errors import UserError


def lines(*texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def texts_of(*paths, keys="text"):
    return [document.text for document in read_documents(paths, keys)]


def save(texts, folder):
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonlines", "a.JSONL", "a.NdJson", "a.JSONL.GZ",
                                  "a.ndjson.gz", "a.JSON", "a.Json.Gz", "a.jsonl-00000-of-00002"])
def test_a_table_of_json_is_known_by_any_spelling_of_its_suffix(name, tmp_path):
    content = lines("one", "two").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert texts_of(tmp_path) == ["one", "two"]


def test_tab_separated_tables_are_read(tmp_path):
    (tmp_path / "a.TSV").write_text("id\ttext\n1\tone, two\n")
    assert texts_of(tmp_path) == ["one, two"]


@pytest.mark.parametrize("mark, encoding", [
    (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"), (b"\xff\xfe\0\0", "utf-32-le")])
@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"text": "one"}\n{"text": "zwö\u2028lf"}\n'), ("a.csv", 'text,id\none,1\nzwö\u2028lf,2\n'),
    ("a.json", '[{"text": "one"}, {"text": "zwö\u2028lf"}]')])
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(mark, encoding, name, content, tmp_path):
    (tmp_path / name).write_bytes(mark + content.encode(encoding))
    (tmp_path / "b.txt").write_bytes(mark + "plain ß".encode(encoding))
    assert texts_of(tmp_path) == ["one", "zwö\u2028lf", "plain ß"]


def test_bytes_in_another_encoding_cost_their_own_records_alone_which_are_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n{"text": "good", "other": "\xe9"}\n')
    (tmp_path / "b.csv").write_bytes(b"text,id\nwell,1\ncaf\xe9,2\nright,3\n")
    (tmp_path / "c.txt").write_bytes("café".encode("latin-1"))
    assert texts_of(tmp_path) == ["fine", "good", "well", "right"]
    assert capsys.readouterr().err == ("skipped 3 that could not be read as text: a.jsonl line 2 (not UTF-8), b.csv "
                                       "line 2 (not UTF-8), c.txt (not UTF-8, perhaps latin-1)\n")


def test_records_without_the_column_cost_nothing_but_themselves(tmp_path, capsys):
    records = ['{"id": 1}', '{"text": "one"}', '{"other": "x"}', '5', '{"text": null}', '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    (tmp_path / "b.csv").write_text("text,id\nhello, world,1\nthree,2\n")
    assert texts_of(tmp_path) == ["one", "two", "three"]
    error = capsys.readouterr().err
    assert error == ("skipped 4 that could not be read as text: a.jsonl line 4 (not a record with columns), a.jsonl "
                     "line 1 (no column 'text'), a.jsonl line 3 (no column 'text') and 1 more\n")


def test_of_several_columns_the_first_that_is_not_null_is_read(tmp_path):
    records = [{"text": None, "content": "one"}, {"text": "two", "content": "x"}, {"text": None, "content": "three"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "b.parquet")
    assert texts_of(tmp_path, keys=["text", "content"]) == ["one", "two", "three"] * 2


def test_single_records_and_uneven_lists_of_json_are_tables(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{\n "text": "one"\n}')
    (tmp_path / "b.json").write_text('[null, {"text": "two"}]')
    assert texts_of(tmp_path) == ["one", "two"]
    assert "skipped 1 that could not be read as text: b.json line 1 (not a record" in capsys.readouterr().err


def test_files_of_one_character_are_text(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.json").write_text("5")
    (tmp_path / "c.json").write_text("[")
    assert texts_of(tmp_path) == ["a", "5", "["]


def test_of_a_saved_dataset_with_splits_only_the_training_split_is_read(tmp_path, capsys):
    table = datasets.Dataset.from_dict
    datasets.DatasetDict({"train": table({"text": ["one", "two"]}), "test": table({"text": ["answer"]}),
                          "validation": table({"text": ["held out"]})}).save_to_disk(tmp_path / "below/saved")
    for path in (tmp_path, tmp_path / "below/saved"):
        assert texts_of(path) == ["one", "two"]
    error = capsys.readouterr().err
    assert "left out 2 not meant for training: test (the split test), validation (the split validation)" in error
    assert texts_of(tmp_path / "below/saved/test") == ["answer"]  # asked for by name
    datasets.DatasetDict({"test": table({"text": ["answer"]})}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match=r"other has the splits test, and none is train; name the one .*other/test"):
        read_documents([tmp_path / "other"])


def test_a_saved_dataset_gives_its_records_and_not_its_description(tmp_path):
    save(["one", "two"], tmp_path / "saved")
    (tmp_path / "saved/cache-12ab.arrow").write_bytes(next((tmp_path / "saved").glob("data*.arrow")).read_bytes())
    assert texts_of(tmp_path / "saved") == texts_of(tmp_path) == ["one", "two"]


def test_what_describes_a_dataset_and_its_other_splits_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for split in ("train", "test", "validation"):
        datasets.Dataset.from_dict({"text": [split]}).to_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet")
    for name in ("README.md", "LICENSE", "LICENSE.txt", "dataset_info.json", ".gitattributes"):
        (tmp_path / name).write_text("{}")
    for folder in (".git", "__pycache__", ".cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(lines("no data"))
    capsys.readouterr()
    assert texts_of(tmp_path) == ["train"]
    error = capsys.readouterr().err
    assert error.startswith("left out 6 not meant for training: LICENSE (describes the data), ")
    for name in ("README.md", "dataset_info.json", "data/test-00000-of-00001.parquet (the split test)"):
        assert name in error
    assert texts_of(tmp_path / "README.md") == ["{}"]  # asked for by name
    assert texts_of(tmp_path / "data/test-00000-of-00001.parquet") == ["test"]


def test_splits_of_tables_are_told_by_words_of_their_names(tmp_path):
    for name in ("train.jsonl", "train_2.jsonl", "latest.jsonl", "contest.jsonl", "test.jsonl", "val.jsonl",
                 "dev_1.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(lines(name))
    assert texts_of(tmp_path) == ["contest.jsonl", "latest.jsonl", "train.jsonl", "train_2.jsonl"]
    for name in ("train.jsonl", "train_2.jsonl"):
        (tmp_path / name).unlink()
    assert len(texts_of(tmp_path)) == 6  # without a training split they are the data


@pytest.mark.parametrize("suffix", ["raw", "tokens"])
def test_wikitexts_other_splits_are_left_out(suffix, tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.{suffix}").write_text(split)
    assert texts_of(tmp_path) == ["train"]


@pytest.mark.parametrize("suffix, content", [("json", '[{{"text": "{0}"}}]'), ("JSON", '{{"text": "{0}"}}'),
                                             ("txt", "{0}")])
@pytest.mark.parametrize("name", ["{0}.{1}", "{0}/a.{1}", "wiki.{0}.{1}"])
def test_other_splits_of_json_and_plain_text_are_left_out_too(suffix, content, name, tmp_path, capsys):
    for split in ("train", "test", "valid"):
        path = tmp_path / name.format(split, suffix)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content.format(split))
    assert texts_of(tmp_path) == ["train"]
    error = capsys.readouterr().err
    assert error.startswith("left out 2 not meant for training: ") and "(the split test)" in error


def test_what_describes_files_of_json_is_left_out_where_there_is_nothing_else(tmp_path, capsys):
    (tmp_path / "data.json").write_text('[{"text": "one"}]')
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["one"]
    assert "left out 2 not meant for training: LICENSE (describes the data), README.md" in capsys.readouterr().err
    (tmp_path / "index.js").write_text("code")
    assert texts_of(tmp_path) == ["LICENSE", "README.md", "one", "code"]  # source code with a .json file


def test_objects_one_after_the_other_are_records(tmp_path):
    (tmp_path / "a.json").write_text('{\n "text": "one"\n}\n\n{\n "text": "two"\n} {"text": "three"}\n')
    (tmp_path / "b.json").write_text('{\n "text": "one"\n}\n{\n "text": ')
    assert texts_of(tmp_path) == ["one", "two", "three", (tmp_path / "b.json").read_text()]


def test_binary_columns_of_text_are_text(tmp_path, capsys):
    table = datasets.Dataset.from_dict({"text": [b"one", "zwölf".encode(), b"\xff", None]},
                                       features=datasets.Features(text=datasets.Value("binary")))
    table.to_parquet(tmp_path / "a.parquet")
    capsys.readouterr()
    assert texts_of(tmp_path) == ["one", "zwölf"]
    assert capsys.readouterr().err == "skipped 1 that could not be read as text: a.parquet line 3 (not UTF-8)\n"


def test_records_below_a_key_are_not_trained_on_as_json(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"version": 2, "data": [{"id": 1}, {"text": "one"}]}')
    (tmp_path / "b.json").write_text('{"name": "package", "files": ["a"], "authors": [{"name": "x"}]}')
    assert texts_of(tmp_path) == [(tmp_path / "b.json").read_text()]
    assert "skipped 1 that could not be read as text: a.json (its records are below the key 'data'; save" \
        in capsys.readouterr().err


def test_lines_with_too_few_fields_are_counted(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("id,text,note\n1\n2,two\n3,,x\n4,four,y\n")
    assert texts_of(tmp_path) == ["two", "four"]
    assert capsys.readouterr().err == "skipped 1 that could not be read as text: a.csv line 1 (no column 'text')\n"


def test_backups_and_unfinished_downloads_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(lines("one"))
    copies = ["#a.jsonl#", "a.jsonl.BAK", "a.jsonl.tmp", "a.jsonl~", "b.parquet.incomplete"]
    for name in copies:
        (tmp_path / name).write_text(lines("old"))
    assert texts_of(tmp_path) == ["one"]
    error = capsys.readouterr().err
    assert error.startswith("left out 5 not meant for training")
    assert all(f"{name} (a backup, or not whole)" in error for name in copies)


def test_pointers_of_git_lfs_are_no_text(tmp_path, capsys):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
    for name in ("a.txt", "b.jsonl", "c.parquet", "d.json.gz"):
        (tmp_path / name).write_text(pointer)
    (tmp_path / "e.txt").write_text("one")
    assert texts_of(tmp_path) == ["one"]
    assert "skipped 4 that could not be read as text: a.txt (a pointer to it alone; fetch it with git lfs pull), b" \
        in capsys.readouterr().err


def test_source_code_is_read_with_its_readme_and_its_tests(tmp_path):
    (tmp_path / "tests").mkdir()
    for name in ("README.md", "LICENSE", "a.py", "tests/test_a.py"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["LICENSE", "README.md", "a.py", "tests/test_a.py"]


def test_runs_and_models_among_the_data_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    for name in ("run/config.yaml", "run/metrics.jsonl", "model/config.json", "model/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert texts_of(tmp_path) == ["a"]
    assert "left out 2 not meant for training: model (a model), run (the folder of a run)" in capsys.readouterr().err


def test_links_are_followed_each_folder_is_read_once_and_circles_end(tmp_path, capsys):
    folder, other = tmp_path / "data", tmp_path / "elsewhere"
    for path, text in ((folder / "real/a.txt", "a"), (other / "b.txt", "b"), (tmp_path / "c.txt", "c")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, target in (("again", "real"), ("up", ".."), ("self", "."), ("linked", other), ("broken", "nothing"),
                         ("c.txt", tmp_path / "c.txt")):
        os.symlink(target, folder / name)
    os.mkfifo(folder / "pipe")
    assert texts_of(folder) == ["c", "b", "a"]
    error = capsys.readouterr().err
    assert "skipped 2 that could not be read as text: broken (a link to nothing), pipe (no file)" in error
    assert "left out 3 not meant for training: again (a link to a folder that is read already)" in error
    os.symlink(folder, tmp_path / "link")
    assert read_documents([tmp_path / "link"]) == read_documents([folder])


def test_a_link_to_a_file_is_the_same_document(tmp_path):
    (tmp_path / "blob").write_text(lines("one"))  # as in the hub's cache, where links have the names
    (tmp_path / "a.jsonl").write_text(lines("one"))
    os.symlink("blob", tmp_path / "named.jsonl")
    os.symlink("a.jsonl", tmp_path / "b.jsonl")
    assert read_documents([tmp_path / "b.jsonl"]) == read_documents([tmp_path / "a.jsonl"])
    assert read_documents([tmp_path / "named.jsonl"]) == [Document("one", "named.jsonl:1")]


def test_a_text_that_mentions_a_special_token_stays_text(tokenizer):
    text = "<|mask|> ends<|endoftext|>here"
    ids = tokenize(tokenizer, [Document(text, "a")])[0].tolist()
    assert ids[-1] == tokenizer.eos_token_id and not {tokenizer.eos_token_id, tokenizer.mask_token_id} & set(ids[:-1])
    assert tokenizer.decode(ids[:-1]) == text
