"""Sources, tokenizer, shards and blocks: what goes in comes out, and bad input is named."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest
from tokenizers import processors

from dynamask.data import Corpus, PackedDataset, documents, load_tokenizer, prepare, shards, train_tokenizer
from dynamask.errors import UsageError

TEXTS = [f"document number {i}: " + "the quick brown fox jumps over the lazy dog. " * (i + 1) for i in range(40)]


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "texts"
    (source / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS[:20]):
        (source / f"{i:02d}.txt").write_text(text)
    rows = [json.dumps({"text": text, "other": 1}) for text in TEXTS[20:30]]
    (source / "deep" / "table.jsonl").write_text("\n".join(rows) + "\n\n")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[30:]}), source / "deep" / "table.parquet")
    (source / "picture.png").write_bytes(b"\x89PNG")
    return source


def test_a_folder_gives_all_its_texts(folder) -> None:
    assert sorted(d.text for d in documents([str(folder)])) == sorted(TEXTS)
    assert [d.text for d in documents([str(folder / "03.txt")])] == [TEXTS[3]]


def test_the_standard_library_is_a_source() -> None:
    first = next(documents(["stdlib"]))
    assert first.name.endswith(".py")
    assert len(first.text) > 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9".encode("latin-1"), "latin.txt is not UTF-8 \\(byte 3: 0xe9\\)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "broken.jsonl, line 2"),
        ("column.jsonl", b'{"content": "a"}\n', 'line 1: expected a JSON object with a "text" field'),
        ("number.jsonl", b'{"text": 3}\n', '"text" must be a string; got int'),
        ("broken.parquet", b"not parquet", "cannot read .*broken.parquet as parquet"),
    ],
)
def test_bad_files_are_named_or_skipped(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "zz.txt").write_text("fine")
    with pytest.raises(UsageError, match=message):
        list(documents([str(tmp_path)]))
    skipped: list[str] = []
    kept = list(documents([str(tmp_path)], errors="skip", skipped=skipped))
    assert kept[-1].text == "fine"
    assert len(skipped) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_named(tmp_path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(UsageError, match=r"cannot read .*secret.txt"):
        list(documents([str(tmp_path)]))


@pytest.mark.parametrize(
    ("source", "message"),
    [("./nowhere", "no such file"), ("gone.txt", "no such file"), ("no-such/dataset", "could be loaded from the hub")],
)
def test_missing_sources_are_named(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(documents([source]))


def test_empty_corpora_are_named_and_leave_nothing(tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(UsageError, match="holds no text"):
        list(documents([str(tmp_path / "texts")]))
    (tmp_path / "texts" / "blank.txt").write_text(" \n ")
    with pytest.raises(UsageError, match="no text in"):
        prepare([str(tmp_path / "texts")], tmp_path / "corpus", vocab_size=300)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts"]


def test_tokens_round_trip_and_splits_share_no_document(folder, tmp_path) -> None:
    corpus = prepare([str(folder)], tmp_path / "corpus", vocab_size=300, validation=0.25)
    tokenizer = corpus.tokenizer
    found = {}
    for split in ("train", "validation"):
        stream = np.concatenate(corpus.tokens(split))
        starts = [*corpus.document_starts(split), len(stream)]
        found[split] = [tokenizer.decode(stream[a : b - 1]) for a, b in itertools.pairwise(starts)]
        assert all(stream[b - 1] == tokenizer.eos_token_id for b in starts[1:])
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    assert 1 <= len(found["validation"]) <= 20


def test_documents_begin_as_the_tokenizer_begins_them(folder, tmp_path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    corpus = prepare([str(folder)], tmp_path / "corpus", vocab_size=300, tokenizer=str(tmp_path / "tokenizer"))
    stream = np.concatenate(corpus.tokens("train"))
    assert {int(stream[start]) for start in corpus.document_starts("train")} == {tokenizer.eos_token_id}


def test_shards_may_be_cut_anywhere(folder, tmp_path, monkeypatch) -> None:
    whole = prepare([str(folder)], tmp_path / "whole", vocab_size=300)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 97)
    cut = prepare([str(folder)], tmp_path / "cut", vocab_size=300)
    assert len(cut.tokens("train")) > 5
    assert all(len(shard) == 97 for shard in cut.tokens("train")[:-1])
    first, second = (PackedDataset(corpus, "train", 64) for corpus in (whole, cut))
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all((a[name] == b[name]).all() for name in a)


def test_blocks_mark_where_documents_begin(folder, tmp_path) -> None:
    corpus = prepare([str(folder)], tmp_path / "corpus", vocab_size=300)
    stream = np.concatenate(corpus.tokens("train"))
    starts = set(corpus.document_starts("train").tolist())
    dataset = PackedDataset(corpus, "train", 50)
    for number, block in enumerate(dataset):
        assert (block["input_ids"].numpy() == stream[number * 50 : (number + 1) * 50]).all()
        position = 0
        for place in range(50):
            begins = number * 50 + place in starts
            position = 0 if begins or place == 0 else position + 1
            assert block["position_ids"][place] == position
            assert (block["labels"][place] == -100) == (begins or place == 0)


def test_an_unchanged_corpus_is_reused_and_a_changed_one_made_again(folder, tmp_path) -> None:
    target = tmp_path / "corpus"
    prepare([str(folder)], target, vocab_size=300)
    stamp = (target / "index.json").stat().st_mtime_ns
    prepare([str(folder)], target, vocab_size=300)
    assert (target / "index.json").stat().st_mtime_ns == stamp
    (folder / "99.txt").write_text("one more document")
    again = prepare([str(folder)], target, vocab_size=300)
    assert (target / "index.json").stat().st_mtime_ns != stamp
    documents_now = sum(again.index["splits"][split]["documents"] for split in ("train", "validation"))
    assert documents_now == 41


def test_one_document_still_makes_two_splits(tmp_path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[-1])
    corpus = prepare([str(tmp_path / "a.txt")], tmp_path / "corpus", vocab_size=300)
    assert all(corpus.index["splits"][split]["tokens"] > 0 for split in ("train", "validation"))


def test_a_full_disk_is_named_and_leaves_nothing(folder, tmp_path, monkeypatch) -> None:
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write", full)
    with pytest.raises(UsageError, match="the disk is full"):
        prepare([str(folder)], tmp_path / "corpus", vocab_size=300)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts"]


def test_settings_that_cannot_be_are_named(folder, tmp_path) -> None:
    with pytest.raises(UsageError, match="at least 257 tokens"):
        train_tokenizer(["a"], 100)
    with pytest.raises(UsageError, match="between 0 and 1"):
        prepare([str(folder)], tmp_path / "c", vocab_size=300, validation=1.5)
    with pytest.raises(UsageError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UsageError, match="not a prepared corpus"):
        Corpus.open(tmp_path / "nothing")
    corpus = prepare([str(folder)], tmp_path / "corpus", vocab_size=300)
    with pytest.raises(UsageError, match="less than one block"):
        PackedDataset(corpus, "validation", 10**6)
    with pytest.raises(UsageError, match=r"set model\.vocab_size=300"):
        prepare([str(folder)], tmp_path / "c", vocab_size=290, tokenizer=str(tmp_path / "corpus" / "tokenizer"))


def test_a_folder_that_is_no_corpus_is_not_replaced(folder, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not a prepared corpus"):
        prepare([str(folder)], tmp_path / "mine", vocab_size=300)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("index", ["{}", "[]", None])
def test_a_folder_with_an_index_of_its_own_is_no_corpus(folder, tmp_path, index) -> None:
    mine = tmp_path / "mine"
    if index is None:  # a corpus, to which its owner added something
        prepare([str(folder)], mine, vocab_size=300)
        (folder / "new.txt").write_text("so that it would be prepared anew")
    else:
        mine.mkdir()
        (mine / "index.json").write_text(index)
    (mine / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"it holds notes\.md"):
        prepare([str(folder)], mine, vocab_size=300)
    assert (mine / "notes.md").read_text() == "mine"
    (mine / "notes.md").unlink()
    if index is not None:
        with pytest.raises(UsageError, match="is not a prepared corpus"):
            prepare([str(folder)], mine, vocab_size=300)


def test_with_nothing_held_out_every_document_is_kept(folder, tmp_path) -> None:
    corpus = prepare([str(folder)], tmp_path / "corpus", vocab_size=300, validation=0.0)
    stream = np.concatenate(corpus.tokens("train"))
    starts = [*corpus.document_starts("train"), len(stream)]
    assert sorted(corpus.tokenizer.decode(stream[a : b - 1]) for a, b in itertools.pairwise(starts)) == sorted(TEXTS)
    assert corpus.index["splits"]["validation"]["tokens"] == 0


def test_line_ends_of_other_kinds_may_stand_in_json_strings(tmp_path) -> None:
    text = "a\u2028b\x85c"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [d.text for d in documents([str(tmp_path / "a.jsonl")])] == [text]


def test_a_column_of_numbers_is_no_text(tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet, row 1: \"text\" must be a string; got int"):
        list(documents([str(tmp_path / "a.parquet")]))


@pytest.mark.parametrize("source", ["", " ", 3])
def test_sources_that_name_nothing_are_refused(source) -> None:
    with pytest.raises(UsageError, match="a source is a file"):
        list(documents([source]))


def test_a_failed_corpus_leaves_no_folder_above_it(tmp_path) -> None:
    (tmp_path / "blank.txt").write_text(" ")
    with pytest.raises(UsageError, match="no text in"):
        prepare([str(tmp_path / "blank.txt")], tmp_path / "run" / "corpus", vocab_size=300)
    assert [p.name for p in tmp_path.iterdir()] == ["blank.txt"]


BAD_LINES = [
    b"null",
    b"[1, 2]",
    b'"text"',
    b'{"text": null}',
    b'{"text": ' + b"9" * 5000 + b"}",
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"text": "caf\xe9"}',
    b'{"text": "cut',
]


def test_a_bad_line_of_a_table_is_skipped_alone_and_counted(tmp_path) -> None:
    good = [json.dumps({"text": f"good {i}"}).encode() for i in range(len(BAD_LINES) + 1)]
    lines = [line for pair in itertools.zip_longest(good, BAD_LINES) for line in pair if line is not None]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    skipped: list[str] = []
    read = [d.text for d in documents([str(tmp_path / "a.jsonl")], errors="skip", skipped=skipped)]
    assert read == [f"good {i}" for i in range(len(good))]
    assert [message.split(", line ")[1].split()[0].rstrip(":") for message in skipped] == [
        str(2 * i) for i in range(1, len(BAD_LINES) + 1)
    ]
    for bad in BAD_LINES:
        (tmp_path / "one.jsonl").write_bytes(bad)
        with pytest.raises(UsageError, match="errors=skip"):
            list(documents([str(tmp_path / "one.jsonl")]))


def test_suffixes_count_without_case_and_other_tables_are_refused(tmp_path) -> None:
    for name in ("A.JSONL", "b.ndjson"):
        (tmp_path / name).write_text('{"text": "one"}\n')
        assert [text for _, text in documents([str(tmp_path / name)])] == ["one"]
    (tmp_path / "C.TXT").write_text("two")
    hidden = tmp_path / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "d.txt").write_text("three")
    (tmp_path / "._e.txt").write_text("four")
    assert [text for _, text in documents([str(tmp_path)])] == ["one", "two", "one"]
    for name in ("a.json", "c.csv", "t.txt.gz"):
        (tmp_path / name).write_text("x")
        with pytest.raises(UsageError, match="would be read as raw text"):
            list(documents([str(tmp_path / name)]))


def test_a_link_that_leads_nowhere_and_a_row_without_text_are_unreadable(tmp_path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    parquet.write_table(pyarrow.table({"text": ["two", None]}), tmp_path / "c.parquet")
    skipped: list[str] = []
    assert [text for _, text in documents([str(tmp_path)], errors="skip", skipped=skipped)] == ["one", "two"]
    assert len(skipped) == 2
    assert "b.txt" in skipped[0]
    assert "c.parquet, row 2" in skipped[1]
    with pytest.raises(UsageError, match=r"b\.txt"):
        list(documents([str(tmp_path)]))


def test_marks_and_surrogates_do_not_cost_a_text(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x\\ud800y"}\n{"text": "\\ud83d\\ude00"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert [d.text for d in documents([str(tmp_path)])] == ["x\ufffdy", "\U0001f600", "marked"]


def test_a_special_token_spelled_out_stays_text(tmp_path) -> None:
    text = "one <|endoftext|> two <|endoftext|>"
    (tmp_path / "a.txt").write_text(text)
    corpus = prepare([str(tmp_path / "a.txt")], tmp_path / "corpus", vocab_size=300, validation=0.0)
    stream = np.concatenate(corpus.tokens("train"))
    tokenizer = corpus.tokenizer
    assert (stream == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(stream[:-1]) == text


@pytest.mark.parametrize("held_first", [True, False])
@pytest.mark.parametrize("large", [1, 2])
def test_validation_holds_a_block(tmp_path, monkeypatch, held_first: bool, large: int) -> None:
    """Whatever the hash of the names chooses: a short document alone must not be the whole held-out split."""
    source = tmp_path / "texts"
    source.mkdir()
    (source / "__init__.py").write_text("x=1")
    for i in range(large):
        (source / f"large{i}.py").write_text("def f(x):\n    return x + 1\n" * 400)
    digest = (b"\x00" if held_first else b"\xff") * 32
    real = shards.hashlib.sha256

    def chosen(data=b""):
        return type("Digest", (), {"digest": lambda self: digest})() if data.endswith(b"__init__.py") else real(data)

    monkeypatch.setattr(shards.hashlib, "sha256", chosen)
    corpus = prepare([str(source)], tmp_path / "corpus", vocab_size=300, block=129)
    for split in ("train", "validation"):
        assert len(PackedDataset(corpus, split, 128)) >= 1
    assert corpus.index["splits"]["train"]["tokens"] > corpus.index["splits"]["validation"]["tokens"] / 2
    wider = prepare([str(source)], tmp_path / "corpus", vocab_size=300, block=513)
    assert len(PackedDataset(wider, "validation", 512)) >= 1


@pytest.mark.parametrize("file", ["index.json", "train-00000.bin", "train-documents.npy", "tokenizer/tokenizer.json"])
def test_a_damaged_corpus_is_named(folder, tmp_path, file: str) -> None:
    corpus = prepare([str(folder)], tmp_path / "corpus", vocab_size=300)
    damaged = corpus.folder / file
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(UsageError, match=r"is damaged|cannot load the tokenizer"):
        _ = Corpus.open(corpus.folder).tokenizer


def test_a_mistyped_source_is_not_looked_up_on_the_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts" / "essays").mkdir(parents=True)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UsageError, match=r"no file or folder texts/esays; texts/ holds essays"):
        list(documents(["texts/esays"]))
    with pytest.raises(UsageError, match=r"no file or folder texst; a name on the hub is written owner/name"):
        list(documents(["texst"]))
