"""Drawing many sequences at a time: what is drawn, how many fit, and what a tap sees meanwhile."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ramgguf.core.errors import BudgetError, EngineError
from ramgguf.core.machine import Available
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama import sampling
from ramgguf.llama.capture import Taken, Tap
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.sampling import draw_together, most_together, sampled
from ramgguf.llama.tokens import TokenRequest, batches, draw_sequences, drawn_together
from small_models import ARCHITECTURES, write_small_model
from tiny_models import BOS, write_tiny_model

pytest.importorskip("llama_cpp")
SELF = TokenRequest(encoder="rtn", n_ctx=40)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="F16")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[LlamaModel]:
    with LlamaModel(path, n_ctx=64, n_threads=1, safe_kernels=True) as found:
        yield found


@pytest.mark.parametrize("n_vocab", [3, 512, 513, 2000])
def test_the_token_is_where_the_cumulative_probability_passes_the_uniform_number(
    n_vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(n_vocab)
    logits = 3 * rng.standard_normal((50, n_vocab), np.float32)
    uniforms = rng.random(50)
    shares = np.exp(logits.astype(np.float64))
    ends = (shares / shares.sum(axis=1, keepdims=True)).cumsum(axis=1)
    whole = sampled(logits, uniforms)
    every = np.arange(50)
    before = np.where(whole > 0, ends[every, whole - 1], 0.0)
    assert ((before - 1e-6 <= uniforms) & (uniforms < ends[every, whole] + 1e-6)).all()
    monkeypatch.setattr(sampling, "_SAMPLED_BYTES", 7 * 4 * n_vocab)  # seven rows at a time
    np.testing.assert_array_equal(sampled(logits, uniforms), whole)


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = np.log(np.array([0.2, 0.0001, 0.5, 0.2999], np.float32))
    uniforms = np.random.default_rng(0).random(20000)
    drawn = sampled(np.tile(logits, (20000, 1)), uniforms)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, np.exp(logits), atol=0.015)


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("n_vocab", [700, 1024])
def test_a_token_of_no_probability_is_never_drawn(uniform: float, n_vocab: int) -> None:
    logits = np.full((1, n_vocab), -1e4, np.float32)
    logits[0, [5, 600]] = 1.0
    (token,) = sampled(logits, np.array([uniform]))
    assert token == (5 if uniform < 0.5 else 600)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    for bad in (np.nan, np.inf):
        logits = np.zeros((2, 600), np.float32)
        logits[1, 3] = bad
        with pytest.raises(EngineError, match="nothing can be drawn"):
            sampled(logits, np.array([0.5, 0.5]))


def test_batches_are_few_and_of_about_one_size() -> None:
    assert batches(range(3), 64) == [(0, 1, 2)]
    assert batches(range(5, 9), 2) == [(5, 6), (7, 8)]
    assert [len(b) for b in batches(range(100), 64)] == [50, 50]
    assert [len(b) for b in batches(range(129), 64)] == [43, 43, 43]
    assert batches([], 64) == []


def test_short_memory_draws_fewer_at_a_time(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = sampling._bytes_each(model, 512)
    assert each > 3 * 4 * model.vocab.n_tokens  # a cache, too
    assert sampling._bytes_each(model, 4096) > 2 * each
    weights = model.llama.llama_model_size(model.handle)
    for n_bytes, expected in ((200 * each, 64), (2 * 63 * each, 32), (0, 1)):
        monkeypatch.setattr(
            sampling, "available_memory", lambda n=n_bytes: Available(n + weights, "a test")
        )
        assert most_together(model, 512, 64) == expected

    def untold() -> Available:
        raise BudgetError("this system does not tell")

    monkeypatch.setattr(sampling, "available_memory", untold)
    assert most_together(model, 512, 64) == 64


def test_sequences_depend_on_seed_number_and_batch_alone(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, again = (draw_sequences(model, SELF, range(6)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert len({ids.tobytes() for ids in once}) == 6
    monkeypatch.setattr("ramgguf.llama.tokens.most_together", lambda *_: 4)
    parts = list(drawn_together(model, SELF, range(6)))
    assert [len(batch) for batch in parts] == [3, 3]


def _read(path: Path, sequences: list[np.ndarray], names: list[str], grams: list[str]) -> Taken:
    tap = Tap(names, grams)
    with LlamaModel(
        path, n_ctx=64, n_threads=1, safe_kernels=True, eval_callback=tap.callback
    ) as model:
        for ids in sequences:
            model.clear()
            model.decode(ids)
            tap.check()
    return tap.taken


@pytest.mark.parametrize("architecture", ["tiny", "qwen3", "qwen3moe", "mamba"])
def test_what_is_taken_while_drawing_is_what_reading_the_tokens_takes(
    architecture: str, path: Path, tmp_path: Path
) -> None:
    if architecture != "tiny":
        chosen = next(a for a in ARCHITECTURES if a.name == architecture)
        path = write_small_model(tmp_path / "m.gguf", chosen)
    with LlamaModel(path, n_ctx=64, n_threads=1, safe_kernels=True) as model:
        every = Tap(_weights(path))
        drawn = _drawn(model, every)
        tap = Tap(_weights(path), set(every.taken.owners.values()))
        np.testing.assert_array_equal(drawn, _drawn(model, tap))
        np.testing.assert_array_equal(drawn, _drawn(model, None))  # a tap changes nothing
    owners = every.taken.owners
    read = _read(path, drawn, _weights(path), sorted(set(owners.values())))
    assert set(tap.taken.sums) == set(read.sums)
    for name, sums in tap.taken.sums.items():
        assert sums.counts.sum() == read.sums[name].counts.sum()  # the last token's, too
        if "_exps" in name:  # rounding may send a token to another expert
            continue
        scale = read.sums[name].squares.mean()
        np.testing.assert_allclose(
            sums.squares, read.sums[name].squares, rtol=0.02, atol=0.01 * scale, err_msg=name
        )
    assert set(tap.taken.grams) == set(read.grams)
    for name, gram in tap.taken.grams.items():
        np.testing.assert_allclose(
            gram, read.grams[name], rtol=0.02, atol=0.01 * np.abs(gram).max(), err_msg=name
        )


def _drawn(model: LlamaModel, tap: Tap | None) -> list[np.ndarray]:
    firsts = [1, 2, 3, 4, 5]
    rngs = [np.random.default_rng(k) for k in firsts]
    rest = draw_together(model, firsts, 39, rngs, tap=tap)
    return [np.array([first, *ids], np.int32) for first, ids in zip(firsts, rest, strict=True)]


def _weights(path: Path) -> list[str]:
    with open_gguf(path) as file:
        return [t.name for t in file.tensors if len(t.shape) > 1]


def test_one_sequence_can_be_drawn_under_a_tap(model: LlamaModel, path: Path) -> None:
    tap = Tap(_weights(path))
    steps: list[None] = []
    (ids,) = draw_together(
        model, [BOS], 20, [np.random.default_rng(0)], tap=tap, on_step=lambda: steps.append(None)
    )
    assert len(ids) == 20
    assert len(steps) == 21
    assert all(sums.counts.sum() == 21 for sums in tap.taken.sums.values())
