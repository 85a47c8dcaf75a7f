"""llama.cpp in this process and in a child, on tiny models."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from ramgguf.core.errors import EngineError
from ramgguf.llama.child import Child
from ramgguf.llama.client import CrashError, Engine, ModelError
from ramgguf.llama.model import LlamaModel, chunk_size, draw
from ramgguf.llama.sampling import draw_together
from ramgguf.llama.scoring import RowPass, score_sequence
from ramgguf.llama.system import system_info
from ramgguf.llama.trial_protocol import Load, Loaded
from tiny_models import BOS, write_tiny_model

pytest.importorskip("llama_cpp")

TEXT = "tab the cat\n wrote é"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("engine") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[LlamaModel]:
    with LlamaModel(path, n_ctx=64, n_threads=1) as loaded:
        yield loaded


def test_logits_of_a_sequence_do_not_depend_on_its_chunks(model: LlamaModel) -> None:
    ids = np.arange(10, 50, dtype=np.int32)
    model.clear()
    whole = model.decode(ids).copy()
    model.clear()
    parts = [model.decode(ids[a : a + 7]).copy() for a in range(0, 40, 7)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-2)
    assert whole.shape == (40, model.vocab.n_tokens)


def test_only_the_wanted_rows_are_computed(model: LlamaModel) -> None:
    ids = np.arange(10, 30, dtype=np.int32)
    model.clear()
    whole = model.decode(ids).copy()
    model.clear()
    tail = model.decode(ids, first_output=15)
    assert tail.shape[0] == 5
    np.testing.assert_allclose(tail, whole[15:], atol=2e-2)
    model.clear()
    assert model.decode(ids, first_output=20).shape == (0, model.vocab.n_tokens)


def test_chunks_that_do_not_fit_are_refused(model: LlamaModel) -> None:
    model.clear()
    for bad in (np.zeros(0, dtype=np.int32), np.zeros(65, dtype=np.int32)):
        with pytest.raises(EngineError, match="does not fit a batch of 64 and a context of 64"):
            model.decode(bad)
    with pytest.raises(EngineError, match="llama_decode failed"):
        model.decode(np.array([10**6]))


def test_chunks_keep_their_logits_within_128_mib() -> None:
    assert chunk_size(2048, 49152) == 512
    assert chunk_size(2048, 262144) == 128
    assert chunk_size(300, 1000) == 300
    assert chunk_size(2048, 10**8) == 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_tokens_end_where_their_text_ends(tmp_path: Path, kind: str, add_bos: bool) -> None:
    other = write_tiny_model(
        tmp_path / "m.gguf", tokenizer="gpt2" if kind == "gpt2" else "llama", add_bos=add_bos
    )
    text = TEXT.encode()
    with LlamaModel(other, n_ctx=64, n_threads=1) as m:
        assert m.vocab.info.adds_bos == add_bos
        ids = m.vocab.tokenize(text, add_special=True)
        assert (ids[0] == BOS) == add_bos
        ends = m.vocab.ends(ids, len(text))
        assert ends[-1] == len(text)
        for token, start, end in zip(ids[1:], ends, ends[1:], strict=False):
            piece = m.vocab.piece(int(token))
            if kind == "llama" and start == 0:
                piece = piece.removeprefix(b" ")  # the space that this tokenizer puts in front
            assert piece == text[start:end]
        assert m.vocab.tokenize(b"", add_special=False).size == 0
        special = m.vocab.tokenize(b"<s>", add_special=False)
        assert BOS not in special  # special tokens written in the text are plain text


def test_tokenizers_are_told_apart(tmp_path: Path, model: LlamaModel) -> None:
    hashes = {model.vocab.info.sha256}
    for name, extra in (("a", 0), ("b", 1)):
        other = write_tiny_model(tmp_path / f"{name}.gguf", seed=5, extra_tokens=extra)
        with LlamaModel(other, n_ctx=64, n_threads=1) as m:
            hashes.add(m.vocab.info.sha256)
    assert len(hashes) == 2


def test_sampling_is_reproducible_and_follows_the_model(model: LlamaModel) -> None:
    drawn = [model.sample([BOS], 12, np.random.default_rng(seed)).tolist() for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = model.sample([BOS, 40], 6, np.random.default_rng(0), temperature=0)
    model.clear()
    logits = model.decode(np.array([BOS, 40, *greedy[:-1]]), first_output=1)
    np.testing.assert_array_equal(logits.argmax(axis=1), greedy)
    with pytest.raises(EngineError, match="prompt of at least one token"):
        model.sample([], 3, np.random.default_rng(0))


def test_sequences_drawn_side_by_side_follow_the_model_each_by_its_own_generator(
    tmp_path: Path,
) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", weight_type="F16")
    with LlamaModel(path, n_ctx=64, n_threads=1) as model:
        drawn, again = (
            draw_together(model, [BOS] * 5, 63, [np.random.default_rng(s) for s in range(5)])
            for _ in range(2)
        )
        np.testing.assert_array_equal(drawn, again)
        for seed, ids in enumerate(drawn):
            model.clear()
            logits = model.decode(np.array([BOS, *ids[:-1]])).astype(np.float64)
            shares = np.cumsum(np.exp(log_softmax(logits, axis=1)), axis=1)
            rows = np.arange(63)
            high, low = shares[rows, ids], np.where(ids > 0, shares[rows, ids - 1], 0.0)
            wanted = np.random.default_rng(seed).random(63)
            # Kernels for one column and for several round activations differently.
            assert ((low - 0.01 < wanted) & (wanted < high + 0.01)).all()
            assert (high - low).mean() < 0.5  # a share of 1 would contain every draw
    assert len({ids.tobytes() for ids in drawn}) == 5


def test_draws_have_the_models_probabilities() -> None:
    logits = np.log(np.array([0.2, 0.0001, 0.5, 0.2999], dtype=np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(logits, rng, 1.0) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, np.exp(logits), atol=0.03)


def test_rows_keep_their_order_over_threads() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((23, 300)).astype(np.float32)
    targets = rng.integers(0, 300, 23).astype(np.int32)
    alone, spread = RowPass(1), RowPass(3)
    np.testing.assert_array_equal(alone.score(logits, targets), spread.score(logits, targets))
    np.testing.assert_array_equal(
        alone.compare(logits, logits[::-1].copy(), targets),
        spread.compare(logits, logits[::-1].copy(), targets),
    )


@pytest.mark.parametrize("first_target", [1, 33, 63])
def test_sequences_are_scored_as_numpy_scores_raw_logits(
    model: LlamaModel, first_target: int
) -> None:
    ids = np.random.default_rng(1).integers(3, 250, 64).astype(np.int32)
    (found,) = score_sequence([model], ids, first_target, RowPass(1), has_reference=False)
    model.clear()
    logits = model.decode(ids).astype(np.float64)
    nll = -log_softmax(logits[:-1], axis=1)[np.arange(63), ids[1:]]
    np.testing.assert_allclose(found.scores["nll"], nll[first_target - 1 :], atol=1e-6)
    assert 0 < found.decode_seconds <= found.seconds


def test_system_info_names_the_build() -> None:
    info = system_info()
    assert info.llama_cpp_python
    assert "ggml" in info.build


def test_files_that_are_no_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"missing\.gguf: no such file"):
        LlamaModel(tmp_path / "missing.gguf", n_ctx=64, n_threads=1)
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"junk\.gguf: llama\.cpp cannot load it") as caught:
        Engine([junk], n_ctx=64, n_threads=1)
    assert (caught.value.model, caught.value.index) == (0, None)


def test_a_child_gives_the_same_numbers_as_this_process(path: Path, model: LlamaModel) -> None:
    ids = np.random.default_rng(2).integers(3, 250, 64).astype(np.int32)
    (here,) = score_sequence([model], ids, 1, RowPass(1), has_reference=False)
    with Engine([path, path], n_ctx=64, n_threads=1) as engine:
        assert engine.opened.models[0] == model.info
        tokens, ends = engine.tokenize(TEXT, add_special=False)
        np.testing.assert_array_equal(
            tokens, model.vocab.tokenize(TEXT.encode(), add_special=False)
        )
        assert ends[-1] == len(TEXT.encode())
        first, second = engine.score(7, ids, 1, has_reference=True)
    assert first.nll_sum == second.nll_sum == here.scores["nll"].sum()
    assert first.divergences is None
    assert second.divergences is not None
    assert second.divergences.kld_sum == 0
    assert second.divergences.n_same_top == second.n_scored == 63


def test_a_killed_child_is_an_error_that_names_the_signal(path: Path) -> None:
    with Engine([path], n_ctx=64, n_threads=1) as engine:
        ids = np.arange(10, 74, dtype=np.int32)
        list(engine.score(3, ids, 1, has_reference=False))
        os.kill(engine.pid, signal.SIGSEGV)
        with pytest.raises(CrashError) as caught:
            list(engine.score(4, ids, 1, has_reference=False))
    message = str(caught.value)
    assert str(path) in message
    assert "signal SIGSEGV (a bad memory access)" in message
    assert "--safe-kernels" in message
    assert caught.value.model == 0


def test_a_child_ends_with_its_parent(path: Path) -> None:
    engine = Engine([path], n_ctx=64, n_threads=1)
    child = engine._child
    child.hang_up()  # what the system does when the parent is killed
    assert child.wait() == 0
    engine.close()


def test_children_do_not_import_from_the_working_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    with Engine([path], n_ctx=64, n_threads=1) as engine:
        assert engine.opened.models
    with Child("ramgguf.llama.trial") as child:
        assert child.ask(Load(path=str(path), n_ctx=64, n_threads=1), Loaded).kind == "loaded"
