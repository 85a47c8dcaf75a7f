"""Several texts in one evaluation: domains, long windows, files, WikiText as it is published."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from bigram_model import write_bigram_model
from made_results import eval_result
from ramgguf.core import wikitext
from ramgguf.core.corpus import Corpus, Text, default_corpus
from ramgguf.core.errors import EngineError
from ramgguf.core.mix import by_domain
from ramgguf.evaluate.continuations import trajectories
from ramgguf.evaluate.corpora import DOMAIN_N_CTX, DOMAINS, LONG_N_CTX, NAMES, scored_texts
from ramgguf.evaluate.domains import by_text, pooled
from ramgguf.evaluate.evaluation import evaluate
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.result_files import read_material
from ramgguf.report.page import page
from ramgguf.report.results import POOLED, eval_csv, eval_json, eval_markdown, reports

pytest.importorskip("llama_cpp")

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bigram_model(tmp_path_factory.mktemp("corpora") / "base.gguf", template=TEMPLATE)


def test_every_domain_is_text_that_nothing_is_calibrated_on(model: Path) -> None:
    texts = scored_texts(list(NAMES), model)
    assert [t.corpus.name for t in texts] == [*DOMAINS, "long", "wikitext-2-test"]
    by_name = {t.corpus.name: t for t in texts}
    for name, domain in DOMAINS.items():
        corpus = by_name[name].corpus
        used = [d for part in ("score", "gate") for d in by_domain(part)[domain]]
        assert len(corpus.documents) == len(used) >= 4
        for document in by_domain("calibrate")[domain]:
            words = document.text or document.turns[0].content
            assert words[:200] not in corpus.text
    assert "<|assistant|>" in by_name["chat"].corpus.text
    assert by_name["chat"].corpus.has_control_tokens
    assert not by_name["code"].corpus.has_control_tokens
    assert [by_name[n].n_ctx for n in ("prose", "long")] == [DOMAIN_N_CTX, LONG_N_CTX]
    assert LONG_N_CTX >= 8192


def test_a_documents_source_is_its_article(model: Path) -> None:
    (text,) = scored_texts(["code"], model)
    corpus = text.corpus
    sources = [d.source for part in ("score", "gate") for d in by_domain(part)["code"]]
    starts = [start for start, _ in corpus.documents]
    assert [corpus.title_at(s) for s in starts] == sources
    assert corpus.title_at(starts[1] - 1) == sources[0]


def test_names_of_nothing_are_refused(model: Path) -> None:
    with pytest.raises(EngineError, match="is none of prose, code, math"):
        scored_texts(["verse"], model)
    with pytest.raises(EngineError, match="given twice"):
        scored_texts(["code", "code"], model)
    with pytest.raises(EngineError, match="not several of these"):
        evaluate([model], corpus=["code"], text="x.txt")


@pytest.mark.parametrize(
    ("names", "n_ctx"),
    [
        (["a.txt", "./a.txt"], None),
        (["a.txt", "b.txt"], None),
        (["a.txt"], [64, 64]),
        (["wikitext", "long"], 64),
    ],
)
def test_one_text_under_two_names_is_refused(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    n_ctx: int | list[int] | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("The cat sat on the mat. " * 100)
    with pytest.raises(EngineError, match="one text, twice in sequences of one length"):
        evaluate([model], corpus=names, n_ctx=n_ctx, threads=1)
    if len(names) > 1:
        with pytest.raises(EngineError, match="one text, twice"):
            trajectories([model], model, domains=names, threads=1)


@pytest.fixture(scope="module")
def two_texts(model: Path) -> tuple[EvalResult, ...]:
    own = model.with_name("own.txt")
    own.write_text("The cat sat on the mat. " * 100)
    near = write_bigram_model(model.with_name("near.gguf"), template=TEMPLATE, noise=0.3)
    out = model.with_name("out.jsonl")
    found = evaluate(
        [near], model, corpus=["code", str(own)], n_ctx=[64, 128], n_seq=9, jsonl=out, threads=1
    )
    assert found.failures == ()
    return found.results


def test_every_text_and_length_has_a_result(two_texts: tuple[EvalResult, ...]) -> None:
    found = [(r.text.name, r.protocol.n_ctx, len(r.sequences)) for r in two_texts]
    assert found == [("code", 64, 9), ("code", 128, 9), ("own.txt", 64, 9), ("own.txt", 128, 9)]
    assert [d.label for d in by_text(two_texts)] == [
        "code, 64 tokens",
        "code, 128 tokens",
        "own.txt, 64 tokens",
        "own.txt, 128 tokens",
    ]
    assert pooled(by_text(two_texts)) is None  # a text twice is no more text


def test_one_file_has_them_all(model: Path, two_texts: tuple[EvalResult, ...]) -> None:
    read = read_material([model.with_name("out.jsonl")]).results
    assert [(r.text.name, r.protocol.n_ctx, r.kld_mean) for r in read] == [
        (r.text.name, r.protocol.n_ctx, r.kld_mean) for r in two_texts
    ]


def test_the_pool_is_the_sum_of_its_texts(two_texts: tuple[EvalResult, ...]) -> None:
    parts = two_texts[::2]
    found = pooled(by_text(parts))
    assert found is not None
    (whole,) = found
    nll = sum(s.nll_sum for r in parts for s in r.sequences)
    assert sum(s.nll_sum for s in whole.sequences) == pytest.approx(nll)
    assert whole.n_scored == sum(r.n_scored for r in parts)
    kld = sum(s.kld_sum or 0 for r in parts for s in r.sequences)
    assert whole.kld_mean == pytest.approx(kld / whole.n_scored)
    assert whole.complete
    assert whole.kld_quantiles is not None
    values = [k for r in parts for s in r.sequences if (k := s.kld_per_token()) is not None]
    assert whole.kld_quantiles.at(0.5) == pytest.approx(np.median(np.concatenate(values)))
    titles = {s.title for s in whole.sequences}
    assert sum(t is not None and t.startswith("own.txt: #") for t in titles) == 9  # no articles


def test_every_output_has_a_table_per_text_and_a_pooled_one(
    two_texts: tuple[EvalResult, ...],
) -> None:
    parts = two_texts[::2]
    labels = [label for label, _ in reports(parts)]
    assert labels == ["code", "own.txt", POOLED]
    document = json.loads(eval_json(parts))
    assert list(document["texts"]) == ["code", "own.txt"]
    near = [m for m in document["models"] if m["model"] == "near"]
    assert near[0]["text"] == "code + own.txt"
    assert near[0]["n_sequences"] == 18
    assert len(document["results"]) == 2
    markdown = eval_markdown(parts)
    assert markdown.index("**code**") < markdown.index("**own.txt**") < markdown.index("### Eval")
    assert {line.split(",")[0] for line in eval_csv(parts).splitlines()} == {
        "model",
        "near",
        "base",
    }
    *domains, (_, report) = reports(parts)
    html = page(report, domains=domains)
    assert "Text by text" in html
    assert html.index("code (9 × 64 tokens)") < html.index("own.txt (9 × 64 tokens)")


def test_texts_of_other_models_are_no_domains() -> None:
    a, b = eval_result("A", [9.0] * 9), eval_result("B", [9.0] * 9)
    b = b.model_copy(update={"text": Text(name="other", n_bytes=9, sha256="0" * 64)})
    assert len(by_text([a, b])) == 1


# --- WikiText-2 ---


def test_the_packages_wikitext_says_that_its_ppl_is_its_own(model: Path) -> None:
    assert wikitext.note_of(default_corpus()) == wikitext.BUNDLED_NOTE
    assert default_corpus().text.count("\n") == 2891
    assert wikitext.note_of(Corpus("x", "text of another kind")) is None


def test_other_blank_lines_than_the_canonical_are_said() -> None:
    lines = default_corpus().text.split("\n")
    for join in ("\n\n", "\r\n", "\n \n"):
        copy = Corpus("wiki.txt", join.join(lines))
        assert wikitext.note_of(copy) == wikitext.OTHER_NOTE


def test_the_canonical_file_is_recognized_and_scored_as_llama_perplexity_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["", " = Cat = \n", "", *[" The cat sat on the mat .\n"] * 30, ""]
    text = "".join(row or " \n" for row in rows)
    monkeypatch.setattr(wikitext, "CANONICAL_SHA256", hashlib.sha256(text.encode()).hexdigest())
    assert wikitext.from_rows(rows) == text
    assert wikitext.from_rows(rows[1:]) is None
    path = tmp_path / "wiki.test.raw"
    path.write_text(text)
    (result,) = evaluate([model], text=path, n_ctx=64, threads=1).results
    assert result.protocol.name == "llama"
    assert wikitext.CANONICAL_NOTE in result.notes
    (other,) = evaluate([model], text=path, n_ctx=64, threads=1, protocol="ram").results
    assert other.protocol.name == "ram"
