"""Multiple choice by log-likelihood: items, answers, flips, and lm-evaluation-harness."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax
from typer.testing import CliRunner

from bigram_model import write_bigram_model
from made_results import model_file
from ramgguf.cli.app import app
from ramgguf.core.errors import EngineError
from ramgguf.core.mix import by_domain
from ramgguf.evaluate.multiple_choice import (
    ItemScore,
    TaskResult,
    encoded,
    prompt_ids,
    tasks,
)
from ramgguf.evaluate.task_items import Item, items_of
from ramgguf.llama.client import Engine
from ramgguf.llama.likelihood import LikelihoodScorer
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.scoring import RowPass
from ramgguf.report.tasks import task_grid, tasks_markdown
from small_models import ARCHITECTURES, write_small_model
from tiny_models import EOS, write_tiny_model

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_bigram_model(folder / "base.gguf")
    write_bigram_model(folder / "near.gguf", noise=1.5)
    return folder


def write_items(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- items ---


def test_the_documented_schema_and_known_rows_are_items(tmp_path: Path) -> None:
    question = "Which is a gas?"
    texts = ["iron", "air"]
    rows = [
        {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0, "task": "sums"},
        {"context": ["A ", "B "], "choices": ["x", "x"], "answer": 1},
        {"ctx": "A man", "endings": ["runs.", "flies."], "label": "1"},
        {"sentence": "It hit _ hard.", "option1": "Ann", "option2": "Bob", "answer": "2"},
        {"question": question, "choices": {"text": texts, "label": ["A", "B"]}, "answerKey": "B"},
        {
            "question": {
                "stem": question,
                "choices": [{"text": t, "label": x} for t, x in zip(texts, "AB", strict=True)],
            },
            "answerKey": "A",
        },
        {"question": question, "choices": texts, "answer": 1},
        {"question": question, "choices": texts, "answer": "A"},
    ]
    found = items_of(write_items(tmp_path / "mine.jsonl", *rows))
    arc = f"Question: {question}\nAnswer:"
    mmlu = f"{question}\nA. iron\nB. air\nAnswer:"
    assert found == (
        Item("sums", ("2 + 2 =",) * 2, (" 4", " 5"), 0),
        Item("mine", ("A ", "B "), ("x", "x"), 1),
        Item("mine", ("A man",) * 2, (" runs.", " flies."), 1),
        Item("mine", ("It hit Ann", "It hit Bob"), (" hard.", " hard."), 1),
        Item("mine", (arc,) * 2, (" iron", " air"), 1),
        Item("mine", (arc,) * 2, (" iron", " air"), 0),
        Item("mine", (mmlu,) * 2, (" A", " B"), 1),
        Item("mine", (mmlu,) * 2, (" A", " B"), 0),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "x", "choices": ["a"], "answer": 0}, "fewer than 2 choices"),
        ({"context": "x", "choices": ["a", "b"], "answer": 2}, "answer 2, expected 0 … 1"),
        ({"context": ["x"], "choices": ["a", "b"], "answer": 0}, "1 contexts for 2 choices"),
        ({"text": "x"}, "line 1 is no multiple choice"),
        (7, "line 1 is no multiple choice"),
        ({"question": "x", "choices": [], "answer": 0}, "line 1 is no multiple choice"),
        ({"context": "x", "choices": ["a", "b"], "answer": 1e999}, "line 1 is no mul.*inf"),
        ({"context": "x", "choices": ["a", "b"], "answer": 0.5}, "line 1 is no mul.*0.5"),
        ({"context": "x", "choices": ["a", "b"], "answer": True}, "line 1 is no mul.*True"),
        ({"context": [1, 2], "choices": ["a", "b"], "answer": 0}, "line 1 is no mul.*1 is no text"),
        ({"context": "x", "choices": "ab", "answer": 0}, "line 1 is no mul.*no list of texts"),
        ({"context": "x", "choices": ["a", None], "answer": 0}, "line 1 is no mul.*None"),
        ({"context": "x\ud800", "choices": ["a", "b"], "answer": 0}, "line 1 .*written as UTF-8"),
        ({"context": "x", "choices": ["a", "\udc00"], "answer": 0}, "line 1 .*written as UTF-8"),
        ({"context": "x", "choices": ["a", "b"], "answer": 0, "task": "\ud800"}, "as UTF-8"),
        ({"ctx": 5, "endings": ["a", "b"], "label": "0"}, "line 1 is no mul.*5 is no text"),
        ({"ctx": "x", "endings": [["a"], "b"], "label": "0"}, "line 1 is no multiple choice"),
        (
            {
                "question": ["x"],
                "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                "answerKey": "A",
            },
            "line 1 is no multiple choice",
        ),
    ],
)
def test_items_that_are_none_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        items_of(write_items(tmp_path / "bad.jsonl", row))


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c"])
def test_only_newlines_end_lines(tmp_path: Path, sign: str) -> None:
    row = {"context": f"a{sign}b", "choices": [" c", " d"], "answer": 0}
    path = tmp_path / "signs.jsonl"
    text = json.dumps(row, ensure_ascii=False)
    path.write_text(f"\n{text}\r\n{text}\n", encoding="utf-8", newline="")
    assert [i.contexts[0] for i in items_of(str(path))] == [f"a{sign}b"] * 2
    path.write_text(f"\n{text}\n7\n", encoding="utf-8")
    with pytest.raises(EngineError, match=r"signs\.jsonl: line 3 is no multiple choice"):
        items_of(str(path))


def test_files_that_hold_no_items_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"context": \n')
    with pytest.raises(EngineError, match="line 1 is not JSON"):
        items_of(str(path))
    path.write_text("\n")
    with pytest.raises(EngineError, match="has no item"):
        items_of(str(path))
    with pytest.raises(EngineError, match="none of cloze, arithmetic, no file"):
        items_of("nothing.jsonl")


def test_the_made_sets_are_the_same_every_time_and_right() -> None:
    sums = items_of("arithmetic")
    assert sums == items_of("arithmetic")
    assert len(sums) == 100
    for item in sums:
        for line in [*item.contexts[0].splitlines()[:-1]]:
            left, right = line.split(" =")
            assert eval(left) == int(right)
        question = item.contexts[0].splitlines()[-1].removesuffix(" =")
        values = [int(c) for c in item.choices]
        assert values[item.answer] == eval(question)
        assert len(set(values)) == 4
    assert len({i.answer for i in sums}) == 4  # the right one is at no fixed place


def test_a_cloze_continues_a_text_that_nothing_is_calibrated_on() -> None:
    found = items_of("cloze")
    assert found == items_of("cloze")
    domains = {i.task.removeprefix("cloze-") for i in found}
    assert domains == set(by_domain("score"))
    assert len(found) >= 100
    for item in found[::7]:
        texts = [
            d.text or "\n".join(t.content for t in d.turns)
            for d in by_domain("score")[item.task.removeprefix("cloze-")]
        ]
        whole = [c + e for c, e in zip(item.contexts, item.choices, strict=True)]
        assert [any(w in t for t in texts) for w in whole] == [
            i == item.answer for i in range(len(whole))
        ]


# --- log-likelihoods ---


def test_likelihoods_are_those_of_the_whole_text(tmp_path: Path) -> None:
    """Whatever was decoded before, and however long the common start is."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(0)
    start = rng.integers(3, 250, 30).astype(np.int32)
    sequences = [np.concatenate([start[:n], rng.integers(3, 250, 6)]) for n in (30, 30, 12, 1, 25)]
    sequences.append(sequences[0])
    with LlamaModel(path, n_ctx=64, n_threads=1) as model:
        scorer = LikelihoodScorer(model, RowPass(1))
        found = [scorer.score(ids.astype(np.int32), 5) for ids in sequences]
        for ids, (value, greedy) in zip(sequences, found, strict=True):
            model.clear()
            log_p = log_softmax(model.decode(ids).astype(np.float64), axis=1)
            at = np.arange(len(ids) - 6, len(ids) - 1)
            assert value == pytest.approx(log_p[at, ids[at + 1]].sum(), abs=2e-2)
            assert greedy == bool((log_p[at].argmax(axis=1) == ids[at + 1]).all())
        best = np.concatenate([start, model.sample(start, 4, rng, temperature=0)])
        assert LikelihoodScorer(model, RowPass(1)).score(best.astype(np.int32), 4)[1]


def test_a_model_with_a_state_decodes_again_what_it_cannot_go_back_to(tmp_path: Path) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == "mamba")
    path = write_small_model(tmp_path / "mamba.gguf", architecture)
    with LlamaModel(path, n_ctx=64, n_threads=1) as model:
        ids = np.arange(3, 23, dtype=np.int32)
        scorer = LikelihoodScorer(model, RowPass(1))
        first = scorer.score(ids, 4)
        other = ids.copy()
        other[-2] = 99
        assert scorer.score(other, 4)[0] != first[0]
        assert scorer.score(ids, 4)[0] == pytest.approx(first[0], abs=1e-3)
        assert model.rewind(0) == 0


def test_a_continuation_needs_a_token_before_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    with LlamaModel(path, n_ctx=64, n_threads=1) as model:
        scorer = LikelihoodScorer(model, RowPass(1))
        for n in (0, 5):
            with pytest.raises(EngineError, match="one must precede"):
                scorer.score(np.arange(5, 10, dtype=np.int32), n)
    broken = write_tiny_model(tmp_path / "nan.gguf", nan_in_output=True)
    with (
        LlamaModel(broken, n_ctx=64, n_threads=1) as model,
        pytest.raises(EngineError, match="NaN or infinite"),
    ):
        LikelihoodScorer(model, RowPass(1)).score(np.arange(5, 10, dtype=np.int32), 2)


def test_context_and_continuation_are_one_text(folder: Path) -> None:
    with Engine([folder / "base.gguf"], n_ctx=64, n_threads=1) as engine:
        ids, n = encoded(engine, "ab", "cd")
        assert (len(ids), n) == (3, 2)  # "ab" is one token
        assert encoded(engine, "x  ", "cd")[1] == 4  # its spaces go with the continuation
        ids, n = encoded(engine, "xa", "bc")  # the token "ab" lies on the border: it is scored
        assert (len(ids), n) == (3, 2)
        ids, n = encoded(engine, "", "cd")
        assert (ids[0], n) == (engine.opened.models[0].vocab.bos, 2)


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_an_eos_that_the_tokenizer_adds_is_no_part_of_the_continuation(
    tmp_path: Path, tokenizer: Literal["gpt2", "llama"], add_bos: bool
) -> None:
    found = []
    for add_eos in (False, True):
        path = tmp_path / f"{add_eos}.gguf"
        write_tiny_model(path, tokenizer=tokenizer, add_bos=add_bos, add_eos=add_eos)
        with Engine([path], n_ctx=64, n_threads=1) as engine:
            assert bool(engine.tokenize("x", add_special=True)[0][-1] == EOS) is add_eos
            ids, n = encoded(engine, "The sea", " is")
            prompt = prompt_ids(engine, "The sea")
            found.append((ids.tolist(), n, prompt.tolist(), engine.likelihoods(0, [(ids, n)])))
    assert found[0] == found[1]
    assert EOS not in found[1][0]


# --- answers ---


def test_a_model_answers_with_what_it_finds_likely(folder: Path) -> None:
    """The bigram model knows its own text, and nothing of an order that it never saw."""
    path = write_items(
        folder / "own.jsonl",
        *(
            {"context": "th", "choices": c, "answer": a}
            for c, a in ((["e ", "qx"], 0), (["zj", "e "], 1)) * 8
        ),
    )
    (result,) = tasks([folder / "base.gguf"], [path], threads=1).results
    assert result.accuracy().value == 1
    assert result.accuracy().low == pytest.approx(0.025 ** (1 / 16), abs=0.02)
    assert result.flips() is None
    with pytest.raises(EngineError, match="no reference"):
        result.reference_accuracy()


@pytest.fixture(scope="module")
def result(folder: Path) -> TaskResult:
    return tasks(
        [folder / "near.gguf"], ["arithmetic", "cloze"], folder / "base.gguf", limit=10, threads=1
    ).results[0]


def test_flips_are_counted_item_by_item(result: TaskResult) -> None:
    assert result.tasks[0] == "arithmetic"
    assert len(result.items) == 10 * len(result.tasks)
    mine = [int(np.argmax(i.log_p)) for i in result.items]
    theirs = [int(np.argmax(i.reference_log_p or ())) for i in result.items]
    right = np.array([m == i.answer for m, i in zip(mine, result.items, strict=True)])
    was = np.array([t == i.answer for t, i in zip(theirs, result.items, strict=True)])
    flips = result.flips()
    assert flips is not None
    assert flips.n_changed == (np.array(mine) != np.array(theirs)).sum() > 0
    assert flips.n_lost == (was & ~right).sum()
    assert flips.n_gained == (right & ~was).sum()
    assert result.accuracy().value - result.reference_accuracy().value == pytest.approx(
        (flips.n_gained - flips.n_lost) / flips.n
    )


def made(counts: dict[tuple[bool, bool], int]) -> TaskResult:
    """Return a result with so many items right under (reference, model)."""
    scores = {True: (-1.0, -2.0), False: (-2.0, -1.0)}
    items = [
        ItemScore(
            task="made", answer=0, n_characters=(4, 1), log_p=scores[m], reference_log_p=scores[r]
        )
        for (r, m), n in counts.items()
        for _ in range(n)
    ]
    return TaskResult(
        ramgguf_version="0",
        model=model_file("m"),
        reference=model_file("r"),
        llama_cpp_build="b",
        safe_kernels=False,
        items=tuple(items),
    )


def test_mcnemar_tells_one_sided_flips_from_noise() -> None:
    even = made({(True, True): 60, (False, False): 20, (True, False): 10, (False, True): 10})
    flips = even.flips()
    assert flips is not None
    assert even.accuracy() == even.reference_accuracy()
    assert (flips.n_changed, flips.n_lost, flips.n_gained, flips.p) == (20, 10, 10, 1.0)
    worse = made({(True, True): 60, (False, False): 20, (True, False): 18, (False, True): 2})
    flips = worse.flips()
    assert flips is not None
    assert flips.p == pytest.approx(stats.binomtest(2, 20).pvalue)
    assert flips.p < 0.001
    same = made({(True, True): 9}).flips()
    assert same is not None
    assert same.p == 1
    exact = stats.binomtest(62, 100).proportion_ci(method="exact")
    found = worse.accuracy()
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.01)
    # per character, the choice of four wins where it has the smaller loss for each
    assert made({(True, True): 9, (False, False): 1}).accuracy(norm=True).value == 1


def test_a_choice_counts_its_characters_without_the_space_before_it(
    folder: Path, tmp_path: Path
) -> None:
    """As lm-evaluation-harness does, whose choices have the space apart."""
    row = {"context": "Ort:", "choices": [" Zürich", "Ulm", " "], "answer": 0}
    names = [write_items(tmp_path / "t.jsonl", row)]
    (item,) = tasks([folder / "base.gguf"], names, threads=1).results[0].items
    assert item.n_characters == (6, 3, 0)
    older = item.model_dump(mode="json")
    older["n_bytes"] = older.pop("n_characters")
    assert ItemScore.model_validate(older) == item


def test_the_table_names_tasks_models_and_flips(result: TaskResult) -> None:
    grid = task_grid([result])
    assert [c.heading for c in grid.columns][-3:] == ["lost", "gained", "p McNemar"]
    names = [row[0] for row in grid.rows if row[0]]
    assert names == [*result.tasks, "all"]
    assert {row[2] for row in grid.rows} == {"base", "near"}
    assert "exact McNemar test" in tasks_markdown([result])
    assert TaskResult.from_json(result.to_json()) == result


def test_the_command_prints_a_table_and_json(folder: Path) -> None:
    command = ["tasks", str(folder / "near.gguf"), "-r", str(folder / "base.gguf"), "-t", "1"]
    command += ["-k", "arithmetic", "--limit", "9"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    (document,) = json.loads(done.output)
    assert document["schema"] == "ramgguf.tasks/1"
    assert document["summary"]["arithmetic"]["accuracy"]["value"] * 9 == pytest.approx(
        sum(int(np.argmax(i["log_p"])) == i["answer"] for i in document["items"])
    )
    assert "p_mcnemar" in document["summary"]["all"]


def test_items_longer_than_the_context_lose_their_start(folder: Path) -> None:
    path = write_items(
        folder / "long.jsonl", {"context": "xy" * 1500, "choices": ["a", "b"], "answer": 0}
    )
    (result,) = tasks([folder / "base.gguf"], [path], threads=1).results
    assert result.n_truncated == 1
    assert "1 were cut to the context" in tasks_markdown([result])


# --- lm-evaluation-harness ---

TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_lm_eval_runs_its_tasks_and_agrees(folder: Path, tmp_path: Path) -> None:
    """lm_eval's own command line, in a process of its own: its imports take half a minute."""
    if "RAMGGUF_LM_EVAL" not in os.environ:
        pytest.skip("lm_eval's own command line takes half a minute: `make soak`")
    pytest.importorskip("lm_eval", exc_type=ImportError)
    rows = [
        {"context": i.contexts[0], "choices": list(i.choices), "answer": i.answer}
        for i in items_of("cloze")[::10]
    ]
    items = write_items(tmp_path / "own.jsonl", *rows)
    (tmp_path / "own.yaml").write_text(TASK.replace("ITEMS", items))
    (mine,) = tasks([folder / "base.gguf"], [items], threads=1).results
    command = [sys.executable, "-m", "ramgguf.evaluate.lm_eval_model", "--model", "ramgguf"]
    command += ["--model_args", f"pretrained={folder / 'base.gguf'},threads=1", "--tasks", "own"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["own"]
    assert found["acc,none"] == pytest.approx(mine.accuracy().value)
    assert found["acc_norm,none"] == pytest.approx(mine.accuracy(norm=True).value)


def test_lm_evals_other_requests_are_answered(folder: Path) -> None:
    pytest.importorskip("lm_eval", exc_type=ImportError)
    script = f"""
import types
from ramgguf.evaluate.lm_eval_model import RamggufLM
lm = RamggufLM({str(folder / "base.gguf")!r}, n_ctx=32, threads=1)
ask = lambda *args: types.SimpleNamespace(args=args)
whole, short = lm.loglikelihood_rolling([ask("the cat sat on the mat " * 4), ask("the cat ")])
assert whole < short < 0
value, greedy = lm.loglikelihood([ask("", "the cat ")])[0]
assert abs(value - short) < 1e-3, (value, short)
text, = lm.generate_until([ask("the", {{"until": [], "max_gen_toks": 12}})])
assert len(text) >= 12, text
cut, = lm.generate_until([ask("the", {{"until": text[5], "max_gen_toks": 12}})])
assert text.startswith(cut) and len(cut) <= 5, (text, cut)
try:
    lm.generate_until([ask("the", {{"temperature": 0.7}})])
except Exception as e:
    assert "greedily" in str(e)
else:
    raise SystemExit("sampled")
lm.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
