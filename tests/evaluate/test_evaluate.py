"""Evaluations end to end on tiny models: numbers, crashes, resuming."""

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import log_softmax, rel_entr

from gguf_samples import finish_gguf
from ramgguf.core.corpus import Corpus, default_corpus
from ramgguf.core.errors import EngineError, GGUFError, ResultError
from ramgguf.evaluate.eval_report import eval_report
from ramgguf.evaluate.evaluation import Evaluation, identify, score_models
from ramgguf.evaluate.protocol import EvalProtocol
from ramgguf.evaluate.result import BrokenSequence, EvalResult, incomparable
from ramgguf.evaluate.summary import summarize
from ramgguf.evaluate.token_groups import TOKEN_CLASSES
from ramgguf.llama import client
from ramgguf.llama.model import LlamaModel
from tiny_models import BOS, write_tiny_model

pytest.importorskip("llama_cpp")

CORPUS = Corpus("excerpt", default_corpus().text[:3000])
RECIPE = EvalProtocol(CORPUS, n_ctx=64, n_seq=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "base.gguf")
    write_tiny_model(folder / "near.gguf", noise=0.02)
    write_tiny_model(folder / "far.gguf", noise=0.2)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Evaluation:
    """base and near against base, uninterrupted."""
    return run(folder, ["base", "near"])


def run(
    folder: Path,
    names: list[str],
    *,
    protocol: EvalProtocol = RECIPE,
    reference: str | None = "base",
) -> Evaluation:
    return score_models(
        [folder / f"{name}.gguf" for name in names],
        reference=folder / f"{reference}.gguf" if reference else None,
        protocol=protocol,
        threads=1,
    )


def log_probabilities(path: Path, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Return log p of every next token, in float64 from llama.cpp's raw logits."""
    with LlamaModel(path, n_ctx=len(ids), n_threads=1) as model:
        logits = model.decode(ids).astype(np.float64)
    found: npt.NDArray[np.float64] = log_softmax(logits[:-1], axis=1)
    return found


def untimed(evaluation: Evaluation) -> list[EvalResult]:
    zero = {"seconds": 0.0, "decode_seconds": 0.0}
    return [r.model_copy(update=zero) for r in evaluation.results]


def test_results_equal_numpy_on_raw_logits(folder: Path, plain: Evaluation) -> None:
    base, near = plain.results
    assert plain.failures == ()
    assert base.complete
    assert base.protocol.n_seq == len(near.sequences) == 12
    text = CORPUS.bytes
    for sequence in near.sequences[:3]:
        span = text[sequence.text_start : sequence.text_end]
        ids = np.frombuffer(span, np.uint8).astype(np.int32) + 3
        if len(ids) != 64:
            continue  # an "ab" in it is one token
        p, q = (log_probabilities(folder / f"{n}.gguf", ids) for n in ("base", "near"))
        at = (np.arange(63), ids[1:])
        assert sequence.n_scored == 63
        assert sequence.nll_sum == pytest.approx(-q[at].sum(), rel=1e-5)
        assert sequence.reference_nll_sum == pytest.approx(-p[at].sum(), rel=1e-5)
        kld = rel_entr(np.exp(p), np.exp(q)).sum(axis=1)
        assert sequence.kld_sum == pytest.approx(kld.sum(), rel=1e-3)
        per_token = sequence.kld_per_token()
        assert per_token is not None
        np.testing.assert_allclose(per_token, kld, rtol=1e-3, atol=1e-5)
        assert sequence.kld_max == pytest.approx(kld.max(), rel=1e-3)
        assert sequence.n_same_top == (p.argmax(1) == q.argmax(1)).sum()
        delta = np.exp(q[at]) - np.exp(p[at])
        assert sequence.delta_p_sum == pytest.approx(delta.sum(), abs=1e-4)
        assert sequence.delta_p_squared_sum == pytest.approx((delta**2).sum(), rel=1e-3)


def test_a_model_does_not_diverge_from_itself(plain: Evaluation) -> None:
    base, near = plain.results
    assert all(s.kld_sum == 0 and s.n_same_top == s.n_scored for s in base.sequences)
    assert base.kld_quantiles is not None
    assert near.kld_quantiles is not None
    assert base.kld_quantiles.at(1.0) == 0 < near.kld_quantiles.at(0.5)
    nll = [s.nll_sum for s in base.sequences]
    assert nll == [s.reference_nll_sum for s in near.sequences]


def test_results_say_what_was_scored(folder: Path, plain: Evaluation) -> None:
    base, near = plain.results
    assert near.model == identify(folder / "near.gguf")
    assert near.reference == identify(folder / "base.gguf")
    assert near.text == CORPUS.identity
    assert incomparable(base, near) == ()
    assert near.sequences[0].title == "Robert Boulter"
    assert near.sequences[0].excerpt in CORPUS.text
    assert EvalResult.from_json(near.to_json()) == near
    slim = near.without_tokens()
    assert slim.sequences[0].kld_per_token() is None
    # 4 + 4 bytes and a bit per token, in base64
    n_tokens = near.n_scored
    assert len(near.to_json()) - len(slim.to_json()) > n_tokens * (8 + 1 / 8) * 4 / 3 * 0.95


def test_other_settings_are_not_ranked_together(folder: Path, plain: Evaluation) -> None:
    safe = score_models([folder / "base.gguf"], protocol=RECIPE, threads=1, safe_kernels=True)
    reasons = incomparable(plain.results[0], safe.results[0])
    assert len(reasons) == 1
    assert reasons[0].startswith("safe kernels: False for base, True for base")
    other = run(
        folder, ["base"], protocol=EvalProtocol(CORPUS, n_ctx=64, n_seq=3, seed=1), reference=None
    )
    assert any("protocol" in r for r in incomparable(plain.results[0], other.results[0]))


def test_positions_classes_and_worst_tokens_are_those_of_the_text(plain: Evaluation) -> None:
    near = plain.results[1]
    text = CORPUS.bytes
    for s in near.sequences:
        kld = s.kld_per_token()
        assert kld is not None
        assert s.by_position is not None
        assert s.by_class is not None
        assert s.by_position.n == (0, 1, 2, 4, 8, 16, 32)  # targets 1 … 63
        assert sum(s.by_position.kld_sum[:4]) == pytest.approx(float(kld[:7].sum()), rel=1e-6)
        assert sum(s.by_class.n_same_top) == sum(s.by_position.n_same_top) == s.n_same_top
        worst = s.worst_tokens[0]
        assert worst.position == 8 + int(np.argmax(kld[7:]))
        assert worst.kld == pytest.approx(float(kld[7:].max()))
        assert (worst.before + worst.text).encode() in text
    spans = [text[s.text_start + 1 : s.text_end] for s in near.sequences]
    digits = sum(chr(b).isdigit() for span in spans for b in span)
    number = [name for name, _ in TOKEN_CLASSES].index("number")
    assert sum(s.by_class.n[number] for s in near.sequences if s.by_class) == digits > 0
    assert near.kld_worst_share is not None
    assert 0 < near.kld_worst_share < 1


@pytest.mark.parametrize("template", [False, True])
def test_warm_windows_start_with_bos_or_the_chat_template(
    folder: Path, tmp_path: Path, template: bool
) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", add_bos=not template)
    start = b""
    if template:
        template_text = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}{% endfor %}"
        path = with_metadata(path, tmp_path / "chat.gguf", "tokenizer.chat_template", template_text)
        start = b"user:"
    protocol = EvalProtocol(CORPUS, protocol="warm", n_ctx=64, n_seq=3)
    (result,) = score_models([path], reference=path, protocol=protocol, threads=1).results
    assert result.protocol.n_warm_up == result.protocol.first_target == 1 + len(start)
    n_text = 64 - 1 - len(start)
    assert {s.n_scored for s in result.sequences} == {n_text}
    first = result.sequences[0]
    own = CORPUS.bytes[first.text_start : first.text_end]
    ids = np.array([BOS, *(b + 3 for b in start + own)], np.int32)
    assert len(ids) == 64  # no merged token in it
    p = log_probabilities(path, ids)
    at = (np.arange(len(start), 63), ids[1 + len(start) :])
    assert first.nll_sum == pytest.approx(-p[at].sum(), rel=1e-5)
    assert first.by_position is not None
    assert first.by_position.n[0] == 1


def with_metadata(source: Path, target: Path, key: str, value: str) -> Path:
    """Write a copy of the model with one more string in its metadata."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "general.architecture")):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    writer.add_string(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish_gguf(writer)
    return target


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_llama_protocol_equals_llama_perplexity(tmp_path: Path, add_bos: bool) -> None:
    """Against an implementation of its own: tokens, windows, BOS, second halves, raw logits."""
    path = write_tiny_model(tmp_path / "m.gguf", add_bos=add_bos, tokenizer="llama")
    text = CORPUS.text[:1000] + "\n"
    protocol = EvalProtocol(Corpus("excerpt", text), protocol="llama", n_ctx=128)
    (result,) = score_models([path], protocol=protocol, threads=1).results
    with LlamaModel(path, n_ctx=128, n_threads=1) as model:
        ids = model.vocab.tokenize(text[:-1].encode(), add_special=True)
    nll, n = 0.0, 0
    for start in range(0, len(ids) - 127, 128):
        window = ids[start : start + 128].copy()
        if add_bos:
            window[0] = BOS
        log_p = log_probabilities(path, window)
        for position in range(64, 127):
            nll -= log_p[position, window[position + 1]]
            n += 1
    assert result.n_scored == n
    assert result.protocol.bos == add_bos
    found = sum(s.nll_sum for s in result.sequences) / result.n_scored
    assert np.exp(found) == pytest.approx(np.exp(nll / n), rel=1e-5)


@pytest.fixture
def crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models called crash-N or fragile crash the engine's process, see crashing_worker.py."""
    worker = Path(__file__).parents[1].joinpath("crashing_worker.py")
    monkeypatch.setattr(client, "_WORKER", (sys.executable, str(worker)))


@pytest.mark.usefixtures("crashes")
def test_a_crash_leaves_the_other_models_whole(
    folder: Path, plain: Evaluation, tmp_path: Path
) -> None:
    crashing = write_tiny_model(tmp_path / "crash-3.gguf", noise=0.1)
    journal = tmp_path / "run.jsonl"
    got = score_models(
        [folder / "base.gguf", crashing, folder / "near.gguf"],
        reference=folder / "base.gguf",
        protocol=RECIPE,
        threads=1,
        safe_kernels=False,
        jsonl=journal,
    )
    base, crashed, near = got.results
    (message,) = got.failures
    third = base.sequences[2].index
    assert f"{crashing}: llama.cpp crashed in sequence {third}: signal SIGSEGV (a bad" in message
    assert "--safe-kernels" in message
    assert crashed.failure == message
    assert not crashed.complete
    assert [s.index for s in crashed.sequences] == [s.index for s in base.sequences[:2]]
    for found, expected in zip((base, near), plain.results, strict=True):
        assert found.sequences == expected.sequences
    assert '"record":"failure"' in journal.read_text()


@pytest.mark.usefixtures("crashes")
def test_nothing_scored_at_all_is_an_error(tmp_path: Path) -> None:
    crashing = write_tiny_model(tmp_path / "crash-1.gguf")
    with pytest.raises(EngineError, match="crashed in sequence"):
        score_models([crashing], protocol=RECIPE, threads=1)


@pytest.mark.usefixtures("crashes")
def test_a_crashing_reference_fails_all_that_need_it(folder: Path, tmp_path: Path) -> None:
    crashing = write_tiny_model(tmp_path / "crash-2.gguf")
    got = score_models([folder / "near.gguf"], reference=crashing, protocol=RECIPE, threads=1)
    assert [len(r.sequences) for r in got.results] == [1]
    assert "crash-2.gguf" in got.failures[0]


@pytest.mark.usefixtures("crashes")
def test_one_crash_takes_all_models_to_safe_kernels(folder: Path, tmp_path: Path) -> None:
    fragile = write_tiny_model(tmp_path / "fragile.gguf", noise=0.1)
    journal = tmp_path / "run.jsonl"

    def go_on() -> Evaluation:
        return score_models(
            [folder / "base.gguf", fragile],
            reference=folder / "base.gguf",
            protocol=RECIPE,
            threads=1,
            jsonl=journal,
            resume=True,
        )

    got = go_on()
    assert got.failures == ()
    for result in got.results:
        assert result.complete
        assert result.engine.safe_kernels
        assert "because" in result.notes[-1]
        assert "SIGSEGV" in result.notes[-1]
    assert incomparable(*got.results) == ()
    data = journal.read_bytes()
    assert untimed(go_on()) == untimed(got)
    assert journal.read_bytes().count(b'"sequence"') == data.count(b'"sequence"')


@pytest.mark.parametrize("weight_type", ["Q4_1", "Q8_0"])
def test_safe_kernels_score_what_may_crash_otherwise(tmp_path: Path, weight_type: str) -> None:
    """llama.cpp built by GCC 12 crashes in its AMX kernels on the CPUs that have AMX."""
    path = write_tiny_model(tmp_path / "m.gguf", weight_type=weight_type)
    protocol = EvalProtocol(CORPUS, n_ctx=64, n_seq=2)
    (safe,) = score_models([path], protocol=protocol, threads=1, safe_kernels=True).results
    assert safe.complete
    assert safe.engine.safe_kernels
    message = ""
    try:
        (fast,) = score_models([path], protocol=protocol, threads=1).results
    except EngineError as e:
        message = str(e)
        fast = safe
    if message:
        assert re.search(r"m\.gguf: llama\.cpp crashed in sequence \d+: signal SIG", message)
        assert "--safe-kernels" in message
    nll = [sum(s.nll_sum for s in r.sequences) / r.n_scored for r in (safe, fast)]
    assert nll[0] == pytest.approx(nll[1], rel=0.02)


def test_broken_logits_are_reported_and_never_averaged(folder: Path, tmp_path: Path) -> None:
    broken = write_tiny_model(tmp_path / "nan.gguf", nan_in_output=True)
    got = score_models([broken], reference=folder / "base.gguf", protocol=RECIPE, threads=1)
    (result,) = got.results
    assert result.sequences == ()
    assert len(result.broken) == 12
    assert result.broken[0].n_broken == 63
    assert result.kld_quantiles is None
    assert all(b.in_model and not b.in_reference for b in result.broken)
    (failure,) = got.failures
    assert failure.endswith(
        "nan.gguf: no sequence was scored (nan gave NaN or infinite logits in all 12 sequences)"
    )


def test_nan_of_a_reference_is_not_its_candidates_fault(folder: Path, tmp_path: Path) -> None:
    broken = write_tiny_model(tmp_path / "nan.gguf", nan_in_output=True)
    got = score_models([folder / "near.gguf"], reference=broken, protocol=RECIPE, threads=1)
    (result,) = got.results
    assert all(b.in_reference and not b.in_model for b in result.broken)
    said = "near: no sequence was scored (nan gave NaN or infinite logits in all 12 sequences)"
    assert eval_report(got.results).failures == (said,)
    assert "near gave" not in got.failures[0]
    with pytest.raises(ResultError, match="nan gave NaN or infinite logits in all 12 sequences"):
        summarize(result)


def test_broken_sequences_of_older_files_are_their_models() -> None:
    found = BrokenSequence.model_validate_json('{"index":1,"n_broken":3,"first_broken":0}')
    assert found.in_model
    assert not found.in_reference


def test_only_models_with_the_same_tokens_are_compared(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", extra_tokens=2)
    with pytest.raises(EngineError, match="only models with the same tokens"):
        score_models([other], reference=folder / "base.gguf", protocol=RECIPE, threads=1)
    got = score_models([folder / "base.gguf", other], protocol=RECIPE, threads=1)
    assert any("tokenizer" in reason for reason in incomparable(*got.results))


def test_a_reference_with_bos_does_not_decide_for_a_model_without(
    folder: Path, tmp_path: Path
) -> None:
    with_bos = write_tiny_model(tmp_path / "bos.gguf", add_bos=True)
    llama = EvalProtocol(RECIPE.corpus, "llama", n_ctx=64, n_seq=2)
    for model, reference in ((folder / "base.gguf", with_bos), (with_bos, folder / "base.gguf")):
        with pytest.raises(EngineError, match=r"puts BOS before a text and .* does not") as raised:
            score_models([model], reference=reference, protocol=llama, threads=1)
        assert "use the protocol ram" in str(raised.value)
    got = score_models([with_bos, folder / "base.gguf"], protocol=llama, threads=1)
    assert [r.protocol.bos for r in got.results] == [True, False]
    assert any("no BOS" in reason for reason in incomparable(*got.results))
    ram = EvalProtocol(RECIPE.corpus, n_ctx=64, n_seq=2, bos=True)
    (same,) = score_models(
        [folder / "base.gguf"], reference=with_bos, protocol=ram, threads=1
    ).results
    assert same.protocol.bos


def test_files_that_are_no_models_are_refused_before_work_starts(tmp_path: Path) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"nothing")
    with pytest.raises(GGUFError, match=r"junk\.gguf"):
        score_models([junk], protocol=RECIPE, threads=1)


def test_resuming_after_a_cut_at_any_byte_gives_the_same_numbers(
    folder: Path, plain: Evaluation, tmp_path: Path
) -> None:
    journal = tmp_path / "run.jsonl"
    models = [folder / "base.gguf", folder / "near.gguf"]

    def go_on() -> Evaluation:
        return score_models(
            models, reference=models[0], protocol=RECIPE, threads=1, jsonl=journal, resume=True
        )

    whole = go_on()
    assert untimed(whole) == untimed(plain)
    data = journal.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(data), 4):
        journal.write_bytes(data[:position])
        again = go_on()
        assert untimed(again) == untimed(plain)
        assert journal.read_bytes().count(b"\n") == data.count(b"\n")
        assert journal.read_bytes().startswith(data[: data.rfind(b"\n", 0, position) + 1])


_SCRIPT = """
import sys
from pathlib import Path
from ramgguf.core.corpus import Corpus, default_corpus
from ramgguf.evaluate.evaluation import score_models
from ramgguf.evaluate.protocol import EvalProtocol
protocol = EvalProtocol(Corpus("excerpt", default_corpus().text[:8000]), n_ctx=64, n_seq=110)
models = [Path(p) for p in sys.argv[2:]]
journal = Path(sys.argv[1])
score_models(models, reference=models[0], protocol=protocol, threads=1, jsonl=journal, resume=True)
"""


def test_ten_kills_at_random_points_change_no_number(folder: Path, tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    models = [folder / "base.gguf", folder / "near.gguf"]
    protocol = EvalProtocol(Corpus("excerpt", default_corpus().text[:8000]), n_ctx=64, n_seq=110)
    rng = np.random.default_rng()
    n_killed, deadline = 0, time.monotonic() + 60
    for _ in range(10):
        before = journal.stat().st_size if journal.exists() else 0
        until = before + int(rng.integers(1, 25_000))
        process = subprocess.Popen([sys.executable, "-c", _SCRIPT, journal, *models])
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.stat().st_size > until:
                break
        n_killed += process.poll() is None
        process.kill()
        process.wait()
    assert n_killed >= 5  # the last ones may have found nothing left to do
    again = score_models(
        models, reference=models[0], protocol=protocol, threads=1, jsonl=journal, resume=True
    )
    assert again.results[0].complete
    assert untimed(again) == untimed(
        score_models(models, reference=models[0], protocol=protocol, threads=1)
    )


def test_a_journal_is_neither_overwritten_nor_misread(folder: Path, tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    journal.write_text('{"record": "nonsense"}\n')
    models = [folder / "base.gguf"]
    with pytest.raises(EngineError, match="exists; add --resume"):
        score_models(models, protocol=RECIPE, threads=1, jsonl=journal)
    with pytest.raises(EngineError, match="line 1 is no record"):
        score_models(models, protocol=RECIPE, threads=1, jsonl=journal, resume=True)
    assert journal.read_text() == '{"record": "nonsense"}\n'


def test_other_runs_in_the_journal_are_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    protocol = EvalProtocol(CORPUS, n_ctx=64, n_seq=2)
    other = EvalProtocol(CORPUS, n_ctx=64, n_seq=2, bos=True)
    models = [folder / "base.gguf"]
    first = score_models(models, protocol=protocol, threads=1, jsonl=journal)
    second = score_models(models, protocol=other, threads=1, jsonl=journal, resume=True)
    assert untimed(first) != untimed(second)
    again = score_models(models, protocol=protocol, threads=1, jsonl=journal, resume=True)
    assert again == first


@pytest.mark.parametrize(("add_bos", "bos"), [(True, False), (True, True), (False, False)])
def test_a_model_that_expects_bos_is_told_where_there_is_none(
    tmp_path: Path, add_bos: bool, bos: bool
) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", add_bos=add_bos)
    made = score_models([path], protocol=replace(RECIPE, bos=bos), threads=1)
    told = [note for note in made.results[0].notes if "expects BOS" in note]
    assert len(told) == (add_bos and not bos)
