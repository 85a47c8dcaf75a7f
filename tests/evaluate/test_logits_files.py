"""llama-perplexity's files of logits, against bytes and sums written out after its source."""

import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ramgguf.core.corpus import Corpus, default_corpus
from ramgguf.core.errors import EngineError
from ramgguf.evaluate.evaluation import evaluate
from ramgguf.evaluate.llama_statistics import KLD_QUANTILES, llama_statistics
from ramgguf.evaluate.result import EvalResult
from ramgguf.llama.logits_file import Layout, LogitsFile, pack_rows, part_of
from ramgguf.llama.model import LlamaModel
from tiny_models import BOS, write_tiny_model

pytest.importorskip("llama_cpp")

N_CTX, N_WINDOWS = 64, 3
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logits")
    write_tiny_model(folder / "base.gguf", add_bos=True, tokenizer="llama")
    write_tiny_model(folder / "near.gguf", add_bos=True, tokenizer="llama", noise=0.05)
    (folder / "text.txt").write_text(Corpus("x", default_corpus().text[1000:1300]).text)
    return folder


def windows_of(path: Path, text: str) -> tuple[npt.NDArray[np.int32], list[Floats]]:
    """Return the text's first tokens and llama.cpp's logits of each window, BOS in front."""
    with LlamaModel(path, n_ctx=N_CTX, n_threads=1) as model:
        ids = model.vocab.tokenize(text.removesuffix("\n").encode(), add_special=True)
        ids = ids[: N_WINDOWS * N_CTX]
        found = []
        for start in range(0, len(ids), N_CTX):
            window = ids[start : start + N_CTX].copy()
            window[0] = BOS
            model.clear()
            found.append(model.decode(window).copy())
    return ids, found


def bytes_of_row(logits: Floats) -> bytes:
    """One row as perplexity.cpp's log_softmax with log_prob writes it, one value at a time."""
    top = np.float32(max(logits))
    low = np.float32(max(np.float32(min(logits)), np.float32(top - np.float32(16))))
    log_sum = np.float32(math.log(sum(float(np.exp(np.float32(x - top))) for x in logits)))
    scale = np.float32(np.float32(top - low) / np.float32(65535))
    inverse = np.float32(1) / scale
    steps = [
        int(np.rint(np.float32(inverse * np.float32(x - low)))) if x > low else 0 for x in logits
    ]
    padding = [0] * (len(logits) % 2)
    head = struct.pack("<2f", scale, np.float32(np.float32(low - top) - log_sum))
    return head + struct.pack(f"<{len(steps) + len(padding)}H", *steps, *padding)


def file_bytes(ids: npt.NDArray[np.int32], windows: list[Floats]) -> bytes:
    n_vocab = windows[0].shape[1]
    out = b"_logits_" + struct.pack("<3i", N_CTX, n_vocab, len(windows))
    out += struct.pack(f"<{len(ids)}i", *ids)
    for logits in windows:
        out += b"".join(bytes_of_row(logits[i]) for i in range(N_CTX // 2, N_CTX - 1))
    return out


@pytest.fixture(scope="module")
def base_bytes(folder: Path) -> bytes:
    return file_bytes(*windows_of(folder / "base.gguf", (folder / "text.txt").read_text()))


def test_what_is_saved_is_what_llama_perplexity_writes(folder: Path, base_bytes: bytes) -> None:
    out = folder / "saved.kld"
    (result,) = evaluate(
        [folder / "base.gguf"],
        save_logits=out,
        n_ctx=N_CTX,
        n_seq=N_WINDOWS,
        text=folder / "text.txt",
        threads=1,
    ).results
    assert result.protocol.name == "llama"
    found = out.read_bytes()
    assert len(found) == len(base_bytes)
    assert not part_of(out).exists()
    mine, theirs = LogitsFile(out), LogitsFile(write(folder / "theirs.kld", base_bytes))
    assert mine.layout == theirs.layout
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
    n_vocab, first = mine.layout.n_vocab, mine.layout.first_row
    start = mine.layout.rows_at
    assert found[:start] == base_bytes[:start]
    # exp is not the same to the last bit in NumPy's scalars and arrays: a step may part
    words = [np.frombuffer(b, "<u2", offset=start).astype(int) for b in (found, base_bytes)]
    rows = [w.reshape(-1, mine.layout.row_words) for w in words]
    assert (rows[0][:, 4 : 4 + n_vocab] - rows[1][:, 4 : 4 + n_vocab]).max() <= 1
    assert np.mean(rows[0] == rows[1]) > 0.999
    for window in range(N_WINDOWS):
        a, b = (f.log_probabilities(window, first, N_CTX - 1) for f in (mine, theirs))
        np.testing.assert_allclose(a, b, atol=3e-4)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_odd_vocabularies_have_a_word_more_and_flat_rows_no_steps() -> None:
    rng = np.random.default_rng(0)
    for n_vocab in (7, 8):
        logits = (8 * rng.standard_normal((5, n_vocab))).astype(np.float32)
        packed = pack_rows(logits)
        assert packed.shape == (5, 8 + 4)
        for row, expected in zip(packed, logits, strict=True):
            wanted = np.frombuffer(bytes_of_row(expected), "<u2")
            assert np.abs(row.astype(int) - wanted)[4:].max() <= 1
    flat = pack_rows(np.full((1, 4), 3, np.float32))
    assert not flat[0, 4:].any()
    assert np.frombuffer(flat[0, :4].tobytes(), "<f4")[1] == pytest.approx(-math.log(4))
    with pytest.raises(EngineError, match="NaN"):
        pack_rows(np.full((1, 4), np.nan, np.float32))


def expected_kld(
    base: bytes, ids: npt.NDArray[np.int32], windows: list[Floats]
) -> list[list[tuple[float, float, float]]]:
    """KLD, NLL and base NLL per token as perplexity.cpp's kl_divergence computes them."""
    n_vocab = windows[0].shape[1]
    row_bytes = 2 * (2 * ((n_vocab + 1) // 2) + 4)
    at = 20 + 4 * len(ids)
    found = []
    for w, logits in enumerate(windows):
        tokens = []
        for i in range(N_CTX // 2, N_CTX - 1):
            scale, low = struct.unpack_from("<2f", base, at)
            steps = struct.unpack_from(f"<{n_vocab}H", base, at + 8)
            at += row_bytes
            x = logits[i].astype(np.float64)
            lse = float(np.log(np.exp(x - x.max()).sum()) + x.max())
            log_p = [scale * s + low for s in steps]
            kld = sum(
                math.exp(p) * (p - float(q) + lse) for p, q in zip(log_p, x, strict=True) if p > -16
            )
            target = ids[w * N_CTX + i + 1]
            tokens.append((kld, lse - float(x[target]), -log_p[target]))
        found.append(tokens)
    return found


@pytest.fixture(scope="module")
def against_file(folder: Path, base_bytes: bytes) -> EvalResult:
    path = write(folder / "reference.kld", base_bytes)
    found = evaluate(
        [folder / "near.gguf"], reference_logits=path, text=folder / "text.txt", threads=1
    )
    assert found.failures == ()
    return found.results[0]


def test_kld_against_a_file_is_what_llama_perplexity_prints(
    folder: Path, base_bytes: bytes, against_file: EvalResult
) -> None:
    ids, windows = windows_of(folder / "near.gguf", (folder / "text.txt").read_text())
    expected = expected_kld(base_bytes, ids, windows)
    assert len(against_file.sequences) == N_WINDOWS
    for sequence, tokens in zip(against_file.sequences, expected, strict=True):
        kld, nll, base = np.array(tokens).T
        values = sequence.kld_per_token(), sequence.nll_per_token()
        for found, wanted in zip(values, (kld, nll), strict=True):
            assert found is not None
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-6)
        reference = sequence.reference_nll_per_token()
        assert reference is not None
        np.testing.assert_allclose(reference, base, rtol=1e-5)
    assert any("16 bits" in note for note in against_file.notes)
    assert against_file.reference is not None
    assert not against_file.reference.is_model


def test_a_file_and_its_model_are_references_alike(folder: Path, against_file: EvalResult) -> None:
    (direct,) = evaluate(
        [folder / "near.gguf"],
        folder / "base.gguf",
        protocol="llama",
        n_ctx=N_CTX,
        n_seq=N_WINDOWS,
        text=folder / "text.txt",
        threads=1,
    ).results
    assert against_file.kld_mean == pytest.approx(direct.kld_mean, rel=0.02)
    mine, theirs = against_file.as_llama_perplexity(), direct.as_llama_perplexity()
    assert mine is not None
    assert theirs is not None
    assert mine.ppl_base.value == pytest.approx(theirs.ppl_base.value, rel=1e-3)
    assert mine.ln_ratio.error == pytest.approx(theirs.ln_ratio.error, rel=1e-2)
    assert direct.without_tokens().as_llama_perplexity() == theirs


def test_without_a_text_the_files_own_tokens_are_scored(
    folder: Path, against_file: EvalResult
) -> None:
    (result,) = evaluate(
        [folder / "near.gguf"], reference_logits=folder / "reference.kld", threads=1
    ).results
    assert result.kld_mean == against_file.kld_mean
    assert result.text.name == "the tokens of reference.kld"
    text = (folder / "text.txt").read_text()
    assert result.sequences[0].excerpt.strip() in text
    assert len(result.sequences[0].excerpt) > 20
    assert result.token_ids_sha256 == against_file.token_ids_sha256
    other = folder / "other.txt"
    other.write_text("b" * 300)
    with pytest.raises(EngineError, match=r"other tokens than other\.txt from token 2 on"):
        evaluate(
            [folder / "near.gguf"],
            reference_logits=folder / "reference.kld",
            text=other,
            threads=1,
        )


def test_an_interrupted_file_goes_on_and_is_whole(folder: Path, base_bytes: bytes) -> None:
    out, journal = folder / "resumed.kld", folder / "resumed.jsonl"

    def run(*, resume: bool) -> None:
        evaluate(
            [folder / "base.gguf"],
            save_logits=out,
            n_ctx=N_CTX,
            n_seq=N_WINDOWS,
            text=folder / "text.txt",
            jsonl=journal,
            resume=resume,
            threads=1,
        )

    run(resume=False)
    whole = out.read_bytes()
    out.rename(part_of(out))
    cut = LogitsFile(part_of(out)).layout
    with part_of(out).open("rb+") as file:  # the last window was never written
        file.seek(cut.n_bytes - 2 * cut.n_rows * cut.row_words)
        file.write(bytes(2 * cut.n_rows * cut.row_words))
    run(resume=True)
    assert out.read_bytes() == whole
    with pytest.raises(EngineError, match="exists; choose another name"):
        run(resume=True)


def _one_window(token: int) -> bytes:
    """A file of one window of four tokens, of which the third is this, and nine in all."""
    ids = struct.pack("<3i4i", 4, 9, 1, 0, 8, token, 3)
    return b"_logits_" + ids + bytes(2 * Layout(4, 9, 1).row_words)


def test_ids_up_to_the_vocabulary_are_read(tmp_path: Path) -> None:
    file = LogitsFile(write(tmp_path / "x.kld", _one_window(token=8)))
    assert file.tokens.tolist() == [0, 8, 8, 3]


def test_why_a_model_failed_is_said_beside_its_unfinished_file(tmp_path: Path) -> None:
    broken = write_tiny_model(tmp_path / "nan.gguf", nan_in_output=True)
    out = tmp_path / "nan.kld"
    with pytest.raises(EngineError, match=r"nan\.gguf: logits that are NaN or infinite") as e:
        evaluate([broken], save_logits=out, n_ctx=N_CTX, n_seq=N_WINDOWS, threads=1)
    assert f"{part_of(out)} lacks 3 of 3 windows" in str(e.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"_logits_", "expected b'_logits_'"),
        (b"GGUF" + bytes(40), "it is no file of llama-perplexity"),
        (b"_logits_" + struct.pack("<3i", 64, 259, 2) + bytes(100), "cut short"),
        (b"_logits_" + struct.pack("<3i", 64, -1, 2) + bytes(100), "makes no sense"),
        (_one_window(token=9), "is damaged: token 2 of its text is 9, expected 0 … 8"),
        (_one_window(token=-1), "is damaged: token 2 of its text is -1, expected 0 … 8"),
    ],
)
def test_files_that_are_none_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        LogitsFile(write(tmp_path / "x.kld", data))


def test_what_cannot_be_asked_of_files_is_refused(folder: Path, base_bytes: bytes) -> None:
    path = write(folder / "again.kld", base_bytes)
    near, base = folder / "near.gguf", folder / "base.gguf"
    with pytest.raises(EngineError, match="a model or a file of logits, not both"):
        evaluate([near], base, reference_logits=path)
    with pytest.raises(EngineError, match="not of ram"):
        evaluate([near], reference_logits=path, protocol="ram")
    with pytest.raises(EngineError, match="give one, or a reference"):
        evaluate([near, base], save_logits=folder / "two.kld")
    with pytest.raises(EngineError, match="windows of 64 tokens, not 128"):
        evaluate([near], reference_logits=path, n_ctx=128, threads=1)
    other = write_tiny_model(folder / "gpt2.gguf")
    with pytest.raises(EngineError, match="a vocabulary of 262 tokens"):
        evaluate([other], reference_logits=path, threads=1)


def test_the_statistics_are_llama_perplexitys() -> None:
    """Against its formulas, one sum at a time."""
    rng = np.random.default_rng(1)
    base = rng.exponential(2, 500)
    nll = np.abs(base + 0.1 * rng.standard_normal(500))
    kld = rng.exponential(0.01, 500)
    found = llama_statistics([nll[:200], nll[200:]], [base[:200], base[200:]], [kld], 450)
    assert found is not None
    n = 500

    def error(x: npt.NDArray[np.float64]) -> float:
        return math.sqrt((sum(x * x) / n - (sum(x) / n) ** 2) / (n - 1))

    covariance = (sum(nll * base) / n - sum(nll) / n * sum(base) / n) / (n - 1)
    assert found.ppl.value == pytest.approx(math.exp(sum(nll) / n))
    assert found.ppl.error == pytest.approx(math.exp(sum(nll) / n) * error(nll))
    assert found.correlation == pytest.approx(covariance / error(nll) / error(base))
    ln_error = math.sqrt(error(nll) ** 2 + error(base) ** 2 - 2 * covariance)
    assert found.ln_ratio.error == pytest.approx(ln_error)
    assert found.ln_ratio.value == pytest.approx(sum(nll - base) / n)
    assert found.kld.error == pytest.approx(error(kld))
    at = np.sort(kld)
    place = 0.999 * (n - 1)
    p999 = at[int(place)] + (place - int(place)) * (at[int(place) + 1] - at[int(place)])
    assert found.kld_quantiles[KLD_QUANTILES.index(0.999)] == pytest.approx(p999)
    assert found.same_top_p.error == pytest.approx(math.sqrt(0.9 * 0.1 / 499))
    delta = np.exp(-nll) - np.exp(-base)
    rms = math.sqrt(np.mean(delta**2))
    assert found.rms_delta_p.error == pytest.approx(0.5 / rms * error(delta**2))
    rows = dict(found.rows())
    assert rows["Maximum KLD"] == f"{kld.max():.6f}"
    assert rows["Same top p"] == "90.000 ± 1.343 %"
    assert llama_statistics([nll[:5]], [base[:5]], [kld[:5]], 5) is None


def test_tables_and_json_use_llama_perplexitys_words(
    folder: Path, against_file: EvalResult
) -> None:
    from ramgguf.report.evaluation import llama_grid, perplexity_grid, report_json
    from ramgguf.report.results import report_of

    report = report_of([against_file])
    grid = llama_grid(report)
    assert grid is not None
    names = [row[0] for row in grid.rows]
    assert names[:3] == ["Mean PPL(Q)", "Mean PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))"]
    assert {"99.9% KLD", "0.1% Δp", "Same top p"} <= set(names)
    models = report_json(report)["models"]
    assert isinstance(models, list)
    found = next(m["llama_perplexity"] for m in models if "llama_perplexity" in m)
    assert found["n"] == against_file.n_scored
    sizes = {row[0]: row[1] for row in perplexity_grid(report).rows}
    assert sizes["reference.kld"] == ""  # a file of logits has no size of weights
    assert sizes["near"]
