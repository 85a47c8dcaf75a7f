"""Models that predict no next token: embeddings compared, all others refused by name.

The embeddings are checked against llama.cpp asked directly, the ranks against SciPy.
"""

import ctypes
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import PoolingType
from scipy import stats
from typer.testing import CliRunner

import ramgguf
from made_results import model_file
from ramgguf.cli.app import app
from ramgguf.core.corpus import Corpus
from ramgguf.core.errors import EngineError, RamggufError
from ramgguf.evaluate.embedding_report import embedding_report
from ramgguf.evaluate.embedding_result import EmbeddingResult, TextScore
from ramgguf.evaluate.embeddings import draw_lines, rank_agreement, text_lines
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.result_files import read_material
from ramgguf.llama.embedding import EmbeddingModel
from ramgguf.llama.model import LlamaModel
from ramgguf.report.embeddings import near_one, verdict_lines
from small_models import ARCHITECTURES, N_CONTEXT, WIDTH, write_small_model
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")
BY_NAME = {a.name: a for a in ARCHITECTURES}
WORDS = ("fox", "dog", "river", "stone", "cloud", "seven", "green", "quick", "lazy", "bird")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT, two worse copies of it, a T5, and a text of 14 lines."""
    folder = tmp_path_factory.mktemp("models")
    bert = BY_NAME["bert"]
    write_small_model(folder / "bert.gguf", bert, tokenizer=True)
    write_small_model(folder / "near.gguf", bert, tokenizer=True, noise=0.02)
    write_small_model(folder / "far.gguf", bert, tokenizer=True, noise=0.1)
    write_small_model(folder / "t5.gguf", BY_NAME["t5"], tokenizer=True)
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, size=20 + i)) for i in range(14)]
    text = "a heading\n" + "\n\n".join(lines) + "\n"
    (folder / "text.txt").write_text(text, "utf-8")
    return folder


def _evaluated(folder: Path, *names: str, reference: str = "bert") -> tuple[EmbeddingResult, ...]:
    found = ramgguf.evaluate(
        [folder / f"{n}.gguf" for n in names],
        folder / f"{reference}.gguf",
        text=folder / "text.txt",
        n_seq=12,
        threads=1,
    )
    assert found.results == ()
    return found.embeddings


def _asked(llama: ModuleType, path: Path, text: str) -> np.ndarray:
    """Return the embedding of a text as llama.cpp's own calls give it, cut to the context."""
    parameters = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(bytes(path), parameters)
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = N_CONTEXT
    options.n_threads = options.n_threads_batch = 1
    options.embeddings = True
    context = llama.llama_init_from_model(model, options)
    try:
        vocab, data = llama.llama_model_get_vocab(model), text.encode()
        tokens = (llama.llama_token * 1000)()
        n = llama.llama_tokenize(vocab, data, len(data), tokens, 1000, True, False)
        ids = list(tokens[:n])
        if n > N_CONTEXT:
            ids = [*ids[: N_CONTEXT - 1], ids[-1]]
        kept = (llama.llama_token * len(ids))(*ids)  # the batch points to it
        batch = llama.llama_batch_get_one(kept, len(ids))
        assert llama.llama_encode(context, batch) == 0
        pointer = llama.llama_get_embeddings_seq(context, 0)
        values = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * WIDTH)).contents
        return np.array(values, np.float64)
    finally:
        llama.llama_free(context)
        llama.llama_model_free(model)


def test_cosines_and_ranks_are_those_of_llama_cpps_own_embeddings(
    folder: Path, llama_cpp: ModuleType
) -> None:
    (found,) = _evaluated(folder, "far")
    text = (folder / "text.txt").read_bytes()
    assert len(found.texts) == 12
    assert any("of 12 texts" in note for note in found.notes)
    lines = [text[t.text_start : t.text_end].decode() for t in found.texts]
    a, b = (
        np.stack([_asked(llama_cpp, folder / f"{name}.gguf", line) for line in lines])
        for name in ("bert", "far")
    )
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose([t.cosine for t in found.texts], (a * b).sum(1), atol=1e-5)
    for i, t in enumerate(found.texts):
        others = [j for j in range(len(lines)) if j != i]
        first, second = (x[others] @ x[i] for x in (a, b))
        assert t.spearman == pytest.approx(stats.spearmanr(first, second).statistic, abs=0.02)
        assert t.same_nearest == (first.argmax() == second.argmax())
        ten = [{others[k] for k in np.argsort(-x)[:10]} for x in (first, second)]
        assert t.same_neighbours == pytest.approx(len(ten[0] & ten[1]) / 10, abs=0.11)


def test_ranks_agree_as_scipy_says_ties_and_flat_similarities_included() -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(-1, 2, (9, 5)).astype(float) + 0.5
    b = rng.integers(-1, 2, (9, 5)).astype(float) + 0.5
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    found = rank_agreement(a, b)
    for i in range(9):
        others = [j for j in range(9) if j != i]
        # The products of a whole matrix and of a row may differ in the last bit: no ties by luck.
        first, second = ((x @ x.T)[i, others] for x in (a, b))
        expected = stats.spearmanr(first, second).statistic
        assert found.spearman[i] == pytest.approx(expected)
    same = rank_agreement(a, a)
    assert (same.spearman == 1).all()
    assert same.same_nearest.all()
    assert (same.same_neighbours == 1).all()
    assert (rank_agreement(np.ones((9, 1)), a).spearman == 0).all()


def test_a_copy_is_at_no_distance_and_a_worse_copy_further_than_a_better_one(folder: Path) -> None:
    copy, far, near = _evaluated(folder, "bert", "far", "near")
    assert all(t.cosine > 1 - 1e-9 and t.spearman == 1 and t.same_nearest for t in copy.texts)
    report = embedding_report([far, near])
    assert [s.label for s in report.summaries] == ["near", "far"]
    (pair,) = report.pairs
    assert pair.cosine.high is not None
    assert pair.cosine.high < 0.5
    cosine = report.summaries[1].estimates["mean_cosine"]
    assert cosine.value == pytest.approx(np.mean([t.cosine for t in far.texts]))
    assert cosine.low is not None
    assert cosine.high is not None
    assert cosine.low < cosine.value < cosine.high <= 1
    (line,) = verdict_lines(report)
    assert line.startswith("near: nearer to the original than far: 1 − cosine 0.0")
    assert EmbeddingResult.from_json(far.to_json()) == far


def test_a_decoder_that_pools_its_tokens_is_an_embedding_model(folder: Path) -> None:
    for name, noise in (("pooled", 0.0), ("pooled-far", 0.05)):
        write_small_model(
            folder / f"{name}.gguf", BY_NAME["llama"], tokenizer=True,
            pooling=PoolingType.LAST, noise=noise,
        )  # fmt: skip
    (found,) = _evaluated(folder, "pooled-far", reference="pooled")
    assert found.pooling == "last"
    assert 0.5 < np.mean([t.cosine for t in found.texts]) < 0.9999


def test_a_file_without_a_pooling_type_is_pooled_by_the_mean(folder: Path, tmp_path: Path) -> None:
    silent = write_small_model(
        tmp_path / "none.gguf", BY_NAME["bert"], tokenizer=True, pooling=PoolingType.NONE
    )
    ids = np.array([2, 10, 20, 3], np.int32)
    with (
        EmbeddingModel(silent, n_ctx=64, n_threads=1) as one,
        EmbeddingModel(folder / "bert.gguf", n_ctx=64, n_threads=1) as other,
    ):
        assert (one.info.pooling, other.info.pooling) == ("mean", "mean")
        np.testing.assert_allclose(one.embed(ids), other.embed(ids), rtol=1e-6)
        with pytest.raises(EngineError, match="65 tokens, expected 1 to 64"):
            one.embed(np.zeros(65, np.int32))


WHAT = {
    "embedding": "is an embedding model, which predicts no next token",
    "encoder-decoder": "has an encoder beside its decoder",
    "reranker": "is a reranker",
}


@pytest.fixture(scope="module", params=WHAT)
def other_kind(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, str]:
    """A model that predicts no next token, and how it is called."""
    path = folder / {"embedding": "bert.gguf", "encoder-decoder": "t5.gguf"}.get(
        request.param, "reranker.gguf"
    )
    if request.param == "reranker":
        write_small_model(path, BY_NAME["llama"], tokenizer=True, pooling=PoolingType.RANK)
    return path, WHAT[request.param]


def _refine(model: Path, folder: Path) -> None:
    ramgguf.quantize(model, "9bpw", folder / "out.gguf", refine=2, threads=1)


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "eval": lambda model, _: ramgguf.evaluate([model], n_ctx=64, n_seq=2, threads=1),
    "sensitivity": lambda model, _: ramgguf.sensitivity(model, n_ctx=16, threads=1),
    "calibrate": lambda model, at: ramgguf.calibrate(model, at / "i.gguf", n_ctx=16, threads=1),
    "refine": _refine,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_predicts_no_next_token_is_refused_by_name_in_one_line(
    other_kind: tuple[Path, str], command: str, tmp_path: Path
) -> None:
    path, what = other_kind
    with pytest.raises(RamggufError) as caught:
        COMMANDS[command](path, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path} {what}")  # the file itself, not a copy of it
    assert "quantize it by priors" in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_such_a_model_is_quantized_and_effort_falls_back_to_fast_with_a_note(
    other_kind: tuple[Path, str], tmp_path: Path
) -> None:
    path, what = other_kind
    said: list[str] = []
    made = ramgguf.quantize(
        path, "9bpw", tmp_path / "out.gguf", effort="auto", seconds=60, score=True, threads=1,
        announce=said.append,
    )  # fmt: skip
    assert made.paths[0].exists()
    assert made.score is None
    assert any("falls back to fast" in line and what in line for line in made.plan.notes)
    assert any(line.startswith("not scored: ") and what in line for line in said)


def test_prompts_of_an_embedding_model_are_timed_and_nothing_is_generated(folder: Path) -> None:
    found = ramgguf.check(folder / "bert.gguf", context=128, repeats=2, threads=1)
    assert found.passed
    assert (found.model_kind, found.n_ctx) == ("embedding", N_CONTEXT)
    assert found.speed is not None
    assert found.speed.prompt.n == 2
    assert found.speed.prompt.low > 0
    assert found.speed.generation is found.speed.first_token_seconds is None
    assert found.answers == ()
    assert found.known_ppl is None
    with pytest.raises(EngineError, match="says nothing for --reference to judge"):
        ramgguf.check(
            folder / "bert.gguf", context=64, repeats=1, reference=folder / "bert.gguf", threads=1
        )
    with pytest.raises(EngineError, match="has an encoder beside its decoder"):
        ramgguf.check(folder / "t5.gguf", context=64, repeats=1, threads=1)


def test_a_model_that_gives_all_tokens_one_logit_is_not_scored(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "zeros.gguf")
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "output.weight").data[:] = 0
    reader.data.flush()
    with (
        LlamaModel(path, n_ctx=16, n_threads=1) as model,
        pytest.raises(EngineError, match="gives all tokens one logit, 0; is it a language model"),
    ):
        model.decode([1, 2, 3])
    with pytest.raises(EngineError, match="gives all tokens one logit"):
        ramgguf.evaluate([path], n_ctx=64, n_seq=2, threads=1)


def test_models_of_two_kinds_are_not_compared(folder: Path, tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny.gguf")
    options: dict[str, Any] = {"text": folder / "text.txt", "n_ctx": 32, "n_seq": 8, "threads": 1}
    with pytest.raises(EngineError, match=r"tiny\.gguf is a causal language model"):
        ramgguf.evaluate([tiny], folder / "bert.gguf", **options)
    with pytest.raises(EngineError, match=r"bert\.gguf is an embedding model"):
        ramgguf.evaluate([folder / "bert.gguf"], tiny, **options)
    cls = write_small_model(
        tmp_path / "cls.gguf", BY_NAME["bert"], tokenizer=True, pooling=PoolingType.CLS
    )
    found = ramgguf.evaluate([cls, folder / "near.gguf"], folder / "bert.gguf", **options)
    assert len(found.embeddings) == 1
    (failure,) = found.failures
    assert "pools its tokens by cls" in failure


def test_options_that_mean_nothing_for_embeddings_are_refused(folder: Path) -> None:
    model, reference = [folder / "near.gguf"], folder / "bert.gguf"
    text = folder / "text.txt"
    with pytest.raises(EngineError, match="protocol llama scores predicted tokens"):
        ramgguf.evaluate(model, reference, protocol="llama", text=text, threads=1)
    with pytest.raises(EngineError, match="--bos starts sequences to predict"):
        ramgguf.evaluate(model, reference, bos=True, text=text, threads=1)
    with pytest.raises(EngineError, match="need at least 8 texts"):
        ramgguf.evaluate(model, reference, n_seq=7, text=text, threads=1)
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(EngineError, match="leave out the executor"),
    ):
        ramgguf.evaluate(model, reference, text=text, threads=1, executor=executor)


def test_results_are_kept_resumed_and_compared(folder: Path, tmp_path: Path) -> None:
    kept, run = tmp_path / "scores.jsonl", CliRunner()
    options = ["-r", str(folder / "bert.gguf"), "--text", str(folder / "text.txt"), "-t", "1"]
    near, far = str(folder / "near.gguf"), str(folder / "far.gguf")
    first = run.invoke(app, ["eval", near, *options, "-o", str(kept)])
    assert first.exit_code == 0, first.output
    assert "near: mean cosine 0.999" in first.output
    assert "14 of 14 lines of text.txt" in first.output.replace("\n", " ")
    before = kept.read_bytes()
    again = run.invoke(app, ["eval", near, far, *options, "-o", str(kept), "--resume", "--json"])
    assert again.exit_code == 0, again.output
    assert kept.read_bytes().startswith(before)
    assert kept.read_bytes().count(b"\n") == before.count(b"\n") + 1  # near was not run again
    document = json.loads(again.stdout)
    assert [m["model"] for m in document["models"]] == ["near", "far"]
    assert document["pairs"][0]["cosine_distance_high"] < 1
    (tmp_path / "scores.json").write_text(again.stdout)
    assert read_material([kept]).embeddings == read_material([tmp_path / "scores.json"]).embeddings
    for style in ("--markdown", "--csv"):
        shown = run.invoke(app, ["compare", str(kept), style])
        assert shown.exit_code == 0
        assert "near" in shown.output
        assert "PPL" not in shown.output
        assert "KLD" not in shown.output
    refused = run.invoke(app, ["report", str(kept), "-o", str(tmp_path / "page.html")])
    assert refused.exit_code == 1


def test_results_of_other_texts_are_not_ranked_together(folder: Path) -> None:
    (near,) = _evaluated(folder, "near")
    (far,) = ramgguf.evaluate(
        [folder / "far.gguf"], folder / "bert.gguf", text=folder / "text.txt", n_seq=9, threads=1
    ).embeddings
    report = embedding_report([near, far])
    assert report.pairs == ()
    assert report.refusal is not None
    assert "texts: 12, seed 42 for near, 9, seed 42 for far" in report.refusal


def test_lines_are_drawn_as_long_as_they_are_texts() -> None:
    corpus = Corpus("c", "short\n" + "x" * 80 + "\n" + "ü" * 40 + "\n  " + "y" * 79 + " \n")
    lines = text_lines(corpus)
    assert [corpus.bytes[s.start : s.end].strip()[:1] for s in lines] == [b"x", "ü".encode()[:1]]
    many = text_lines(Corpus("m", "\n".join(f"{i:03d}" + "z" * 80 for i in range(50))))
    drawn = draw_lines(many, 10, seed=3)
    assert drawn == draw_lines(many, 10, seed=3) == tuple(sorted(drawn, key=lambda s: s.start))
    assert drawn != draw_lines(many, 10, seed=4)
    assert draw_lines(many, 99, seed=3) == many


def test_a_cosine_near_one_has_digits_that_tell_it_from_one() -> None:
    assert near_one(Estimate(0.987654)) == "0.9877"
    assert near_one(Estimate(0.99998765, 0.999981, 0.999992)) == "0.9999877 (0.9999810–0.9999920)"
    assert near_one(Estimate(0.5)) == "0.500"
    assert near_one(Estimate(1.0)) == "1.0000"


@pytest.mark.parametrize("cosine", [0.75, -1.0])
def test_intervals_of_embeddings_lie_within_what_is_possible(cosine: float) -> None:
    """One text of ten, or all of them, lie far from the original."""
    texts = [
        TextScore(
            text_start=i, text_end=i + 1, excerpt="x", n_tokens=9,
            cosine=cosine if i == 0 or (cosine < 0 and i % 2) else 1.0, spearman=cosine,
            same_nearest=True, same_neighbours=0.1 * (i % 2),
        )
        for i in range(10)
    ]  # fmt: skip
    result = EmbeddingResult.model_construct(
        texts=tuple(texts), model=model_file("m"), reference=model_file("r")
    )
    (summary,) = embedding_report([result]).summaries
    for name, found in summary.estimates.items():
        if found.has_interval:
            assert found.low is not None
            assert found.high is not None
            least = 0 if name.startswith("same") else -1
            assert least <= found.low <= found.value <= found.high <= 1, name
