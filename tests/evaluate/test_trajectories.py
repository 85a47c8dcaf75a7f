"""Greedy continuations: what is generated, where it parts, what is said of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from bigram_model import write_bigram_model
from ramgguf.cli.app import app
from ramgguf.core.errors import EngineError
from ramgguf.evaluate.continuations import (
    PROMPT_TOKENS,
    TrajectoryResult,
    agreed,
    read_trajectories,
    trajectories,
)
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.result_files import read_material
from ramgguf.llama.generation import generate_together
from ramgguf.llama.model import LlamaModel
from ramgguf.report.page import page
from ramgguf.report.trajectories import survival_figure, trajectories_markdown, trajectory_grid
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")

EOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trajectories")
    write_bigram_model(folder / "base.gguf")
    write_bigram_model(folder / "near.gguf", noise=0.6)
    return folder


def run(folder: Path, name: str = "near", **options: Any) -> TrajectoryResult:
    settings = {"n_prompts": 12, "n_tokens": 20, "domains": ["code", "prose"], "batch": 5}
    found = trajectories(
        [folder / f"{name}.gguf"],
        folder / "base.gguf",
        threads=1,
        **{**settings, **options},
    )
    return found.results[0]


@pytest.fixture(scope="module")
def near(folder: Path) -> TrajectoryResult:
    return run(folder, jsonl=folder / "near.jsonl")


def test_a_batch_generates_what_each_prompt_does_alone(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 250, n).astype(np.int32) for n in (5, 40, 9)]
    with LlamaModel(path, n_ctx=64, n_threads=1) as model:
        together = generate_together(model, prompts, 15)
        for prompt, found in zip(prompts, together, strict=True):
            alone = model.sample(prompt, 15, rng, temperature=0)
            ends = np.flatnonzero(alone == EOS)
            expected = alone[: ends[0] + 1] if len(ends) else alone
            np.testing.assert_array_equal(found, expected)
        assert len({tuple(ids) for ids in together}) == 3


def test_prompts_longer_than_a_batch_are_read_in_parts(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 250, 400).astype(np.int32) for _ in range(3)]
    with LlamaModel(path, n_ctx=512, n_threads=1) as model:
        for prompt, found in zip(prompts, generate_together(model, prompts, 4), strict=True):
            np.testing.assert_array_equal(found, model.sample(prompt, 4, rng, temperature=0))


def test_generation_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    path = write_bigram_model(tmp_path / "ends.gguf")
    with LlamaModel(path, n_ctx=64, n_threads=1) as model:
        (ids,) = generate_together(model, [np.array([5, 70], np.int32)], 8)
        assert len(ids) == 8
        stop = int(ids[3])
        model.vocab._ends_generation[stop] = True
        (cut,) = generate_together(model, [np.array([5, 70], np.int32)], 8)
    first = int(np.flatnonzero(ids == stop)[0])
    np.testing.assert_array_equal(cut, ids[: first + 1])


def test_agreed_counts_tokens_before_the_first_other_one() -> None:
    def ids(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    assert agreed(ids(1, 2, 3), ids(1, 2, 3)) is None
    assert agreed(ids(1, 2, 3), ids(1, 9, 3)) == 1
    assert agreed(ids(1, 2), ids(1, 2, 3)) == 2  # one ended, the other went on
    assert agreed(ids(9), ids(1)) == 0


def test_a_model_agrees_with_itself_for_ever(folder: Path) -> None:
    same = run(folder, "base", n_prompts=8)
    assert set(same.agreed) == {None}
    assert same.survival(20).value == 1
    assert same.median().value == 20


def test_prompts_are_spread_over_the_domains(near: TrajectoryResult) -> None:
    assert near.domains == ("code",) * 6 + ("prose",) * 6
    assert len(set(near.documents)) >= 8
    assert any(a is not None for a in near.agreed)
    assert near.seconds > 0


def test_shares_and_medians_are_those_of_the_counts(near: TrajectoryResult) -> None:
    counts: tuple[int | None, ...] = (0, 3, 3, 7, None, None, 12, 19, 1, None, None, 5)
    made = near.model_copy(update={"agreed": counts, "documents": tuple(str(i) for i in range(12))})
    assert made.survival(4).value == pytest.approx(8 / 12)
    assert made.survival(20).value == pytest.approx(4 / 12)
    assert made.median().value == np.median([20 if c is None else c for c in counts])
    found = made.survival(4)
    exact = stats.binomtest(8, 12).proportion_ci(method="exact")
    assert found.low == pytest.approx(exact.low, abs=0.03)
    assert found.high == pytest.approx(exact.high, abs=0.03)
    curve = made.curve()
    assert [n for n, _ in curve] == [0, 1, 2, 4, 6, 8, 13, 20]
    shares = [e.value for _, e in curve]
    assert shares == sorted(shares, reverse=True)
    assert made.survival(4, "code").value == pytest.approx(3 / 6)


def test_what_is_there_is_not_generated_again(folder: Path, near: TrajectoryResult) -> None:
    path = folder / "near.jsonl"
    assert read_trajectories(path)[0].agreed == near.agreed
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 * (1 + 3)  # two models, three batches
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed in the last batch
    assert read_trajectories(path) == ()
    kept = path.read_bytes().splitlines()[1:4]
    resumed = run(folder, jsonl=path, resume=True)
    assert resumed.agreed == near.agreed
    again = path.read_bytes().splitlines()
    assert again[1:4] == kept
    assert len(again) == len(lines)
    with pytest.raises(EngineError, match="add --resume"):
        run(folder, jsonl=path)


def test_texts_too_short_for_their_prompts_are_named(folder: Path) -> None:
    own = folder / "own.txt"
    own.write_text("a short text" * 10)
    with pytest.raises(EngineError, match=rf"gives 3 prompts of {PROMPT_TOKENS} tokens, 8 are"):
        run(folder, domains=[str(own)], n_prompts=8)


def test_another_tokenizer_is_refused(folder: Path) -> None:
    write_tiny_model(folder / "other.gguf", tokenizer="llama")
    with pytest.raises(EngineError, match="tokenizer is not the reference's"):
        run(folder, "other", n_prompts=8)


def test_tables_and_pages_show_where_texts_part(folder: Path, near: TrajectoryResult) -> None:
    grid = trajectory_grid([near])
    assert [row[2] for row in grid.rows] == ["all", "code", "prose"]
    assert "identical after 20" in [c.heading for c in grid.columns]
    assert "12 prompts, 20 tokens each" in trajectories_markdown([near])
    drawn = survival_figure([near]).to_dict()["data"][-1]
    shares = list(drawn["y"])
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(near.survival(20).value)
    assert len(drawn["x"]) == len(drawn["y"])
    html = page(EvalReport((), None, None, (), 100.0), trajectories=[near])
    assert "Where texts part" in html
    assert "<title>near · ramgguf report" in html


def test_the_command_prints_a_table_and_json(folder: Path, near: TrajectoryResult) -> None:
    path = folder / "again.jsonl"
    command = ["trajectories", str(folder / "near.gguf"), "-r", str(folder / "base.gguf")]
    command += ["--prompts", "12", "--tokens", "20", "--corpus", "code,prose", "--batch", "5"]
    runner = CliRunner()
    first = runner.invoke(app, [*command, "-o", str(path), "-t", "1"])
    assert first.exit_code == 0, first.output
    assert "median equal tokens" in first.output
    second = runner.invoke(app, [*command, "-o", str(path), "--resume", "--json"])
    (document,) = json.loads(second.output)
    assert document["agreed"] == list(near.agreed)
    assert document["summary"]["survival"][0] == {
        "tokens": 0,
        "value": 1.0,
        "low": document["summary"]["survival"][0]["low"],
        "high": 1.0,
    }
    assert read_material([path]).trajectories[0].agreed == near.agreed
    compared = runner.invoke(app, ["compare", str(path)])
    assert "median equal tokens" in compared.output
