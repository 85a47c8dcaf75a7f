"""Texts and the windows that the protocols cut from their tokens."""

from pathlib import Path

import numpy as np
import pytest

from ramgguf.core.corpus import Corpus, dataset, default_corpus, join_rows, text_file
from ramgguf.core.errors import EngineError
from ramgguf.evaluate.protocol import EvalProtocol, Tokens, llama_text, llama_windows, ram_windows


def tokens(n: int, *, bos: int = 1, adds_bos: bool = False) -> Tokens:
    """Return n different tokens of two bytes each."""
    ids = np.arange(100, 100 + n, dtype=np.int32)
    return Tokens(ids, 2 * np.arange(1, n + 1, dtype=np.int64), bos, adds_bos)


def test_the_default_corpus_is_wikitext() -> None:
    corpus = default_corpus()
    assert corpus.bytes.startswith(b" = Robert Boulter = \n")
    assert b"\r" not in corpus.bytes
    assert corpus.identity.n_bytes == len(corpus.bytes) > 1_280_000
    assert corpus.title_at(0) == "Robert Boulter"
    titles = {corpus.title_at(i) for i in range(0, len(corpus.bytes), 500)}
    assert 55 < len(titles) < 70  # the test split has about 60 articles


def test_titles_are_first_level_headings_only() -> None:
    corpus = Corpus("made up", "x\n = One = \n text\n = = Part = = \n = Two = \n é\n")
    positions = [corpus.text.index(word) for word in ("x", "One", "text", "Part", "Two")]
    titles = [corpus.title_at(p) for p in positions]
    assert titles == [None, "One", "One", "One", "Two"]


def test_excerpts_hold_no_half_characters() -> None:
    corpus = Corpus("made up", "aé" * 10)
    assert corpus.excerpt(0, 30, n_bytes=5) == "aéa"


def test_ram_windows_are_drawn_without_replacement_in_the_order_of_the_text() -> None:
    cut = ram_windows(tokens(1000), n_ctx=10, n_seq=30)
    indices = [w.index for w in cut.windows]
    assert len(set(indices)) == 30
    assert indices == sorted(indices)
    assert max(indices) < 100
    assert cut.protocol.n_windows == 100
    assert cut.protocol.n_scored == 9
    assert cut.notes == ()
    window = cut.windows[3]
    assert window.ids.tolist() == list(range(100 + 10 * window.index, 110 + 10 * window.index))
    assert (window.text_start, window.text_end) == (20 * window.index, 20 * window.index + 20)


def test_the_seed_decides_which_ram_windows_are_drawn() -> None:
    drawn = [
        tuple(w.index for w in ram_windows(tokens(1000), n_ctx=10, n_seq=30, seed=seed).windows)
        for seed in (42, 42, 43)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_too_few_windows_are_all_used_and_said_so() -> None:
    cut = ram_windows(tokens(59), n_ctx=10, n_seq=30)
    assert [w.index for w in cut.windows] == [0, 1, 2, 3, 4]
    assert cut.protocol.n_seq == 5
    assert cut.protocol.n_seq_wanted == 30
    assert "5 windows" in cut.notes[0]


def test_bos_goes_in_front_of_ram_windows() -> None:
    plain = ram_windows(tokens(100), n_ctx=10, n_seq=4)
    with_bos = ram_windows(tokens(100), n_ctx=10, n_seq=4, bos=True)
    for a, b in zip(plain.windows, with_bos.windows, strict=True):
        assert b.ids.tolist() == [1, *a.ids[:-1].tolist()]
    assert with_bos.protocol.bos
    with pytest.raises(EngineError, match="no BOS token"):
        ram_windows(tokens(100, bos=-1), n_ctx=10, n_seq=4, bos=True)


def test_llama_windows_are_consecutive_and_score_their_second_half() -> None:
    cut = llama_windows(tokens(2000), n_ctx=512)
    assert [w.index for w in cut.windows] == [0, 1, 2]
    assert cut.windows[1].ids[0] == 100 + 512
    assert cut.protocol.first_target == 257
    assert cut.protocol.n_scored == 255
    assert cut.protocol.seed is None
    assert llama_windows(tokens(2000), n_ctx=512, n_seq=2).protocol.n_seq == 2


def test_llama_windows_begin_with_bos_where_the_model_adds_it() -> None:
    cut = llama_windows(tokens(100, adds_bos=True), n_ctx=10)
    assert cut.protocol.bos
    for window in cut.windows:
        assert window.ids[0] == 1
        assert window.ids[1] == 101 + 10 * window.index


def test_llama_text_loses_one_newline() -> None:
    assert llama_text("a\n\n") == "a\n"
    assert llama_text("a") == "a"


def test_texts_that_are_too_short_are_refused() -> None:
    with pytest.raises(EngineError, match="has 9 tokens; 1 × 10 are needed"):
        ram_windows(tokens(9), n_ctx=10)
    with pytest.raises(EngineError, match="2 × 10"):
        llama_windows(tokens(19), n_ctx=10)
    with pytest.raises(EngineError, match="too short"):
        ram_windows(tokens(100), n_ctx=3)


def test_recipes_have_the_protocols_own_defaults() -> None:
    assert EvalProtocol().sequence_length == 2048
    assert EvalProtocol(protocol="llama").sequence_length == 512
    assert EvalProtocol(protocol="llama", corpus=Corpus("x", "a\n")).text == "a"
    cut = EvalProtocol(protocol="llama", n_ctx=16, n_seq=3).windows(tokens(100))
    assert (cut.protocol.n_ctx, cut.protocol.n_seq) == (16, 3)


def test_files_are_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("é\r\n".encode())
    assert text_file(path) == Corpus("text.txt", "é\r\n")
    path.write_bytes(b"ab\xff")
    with pytest.raises(EngineError, match="byte 2 is not UTF-8"):
        text_file(path)
    with pytest.raises(EngineError, match="cannot be read"):
        text_file(tmp_path / "missing.txt")


def test_rows_that_are_lines_are_joined_as_they_are() -> None:
    assert join_rows(["", " = A = \n", "", " b \n"]) == " = A = \n b \n"
    assert join_rows(["one", "", "two"]) == "one\n\ntwo"


@pytest.mark.filterwarnings("ignore")
def test_parquet_files_are_read_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a\n", "b\n"]}), path)
    assert text_file(path) == Corpus("rows.parquet", "a\nb\n")
    parquet.write_table(pyarrow.table({"words": ["a"]}), path)
    with pytest.raises(EngineError, match="no column 'text'; it has words"):
        text_file(path)


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(EngineError, match=r"dataset parquet, split train: .*missing"):
        dataset("parquet", split="train", files=tmp_path / "missing.parquet")
