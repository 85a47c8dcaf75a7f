"""Refinement by trials: never worse where it accepts, never over the budget, and resumable."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ramgguf
from ramgguf.cluster.runners import open_runner
from ramgguf.core.errors import EngineError, PlanError
from ramgguf.core.progress import Silent
from ramgguf.gguf.layout import padded
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.tokens import TokenRequest, draw_sets, parse_tokens
from ramgguf.measure.result import Measurement
from ramgguf.plan import DivisionRoom, Pools
from ramgguf.plan.division import Sites
from ramgguf.plan.knapsack import Choice
from ramgguf.plan.objectives import costing
from ramgguf.plan.result import Division, Plan
from ramgguf.quants.roundtrip import simulated
from ramgguf.refine.journal import RefineJournal
from ramgguf.refine.posterior import Move, Posterior, improvement
from ramgguf.refine.swaps import refine_plan
from ramgguf.refine.tokens import FIRST_SEQUENCE, Refining
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")
FORMATS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
WANTED = Refining(12, TokenRequest(encoder="search", n_ctx=48), sizes=(1, 1, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="F16")


@pytest.fixture(scope="module")
def curves(model: Path) -> Measurement:
    return ramgguf.measure(model, formats=FORMATS)


@pytest.fixture(scope="module")
def plan(curves: Measurement) -> Plan:
    """Return a plan that spends its bytes where they do little: there is something to find."""
    return ramgguf.plan(curves, "35%", objective="ram")


def _refined(
    model: Path,
    plan: Plan,
    curves: Measurement,
    folder: Path,
    n_trials: int = WANTED.n_trials,
) -> Plan:
    with open_gguf(model) as file:
        return refine_plan(
            file,
            plan,
            curves,
            costing(plan.objective, curves),
            replace(WANTED, n_trials=n_trials),
            open_runner(file, WANTED.request, scratch=folder, threads=1),
            journal_path=folder / "journal",
            progress=Silent(),
        )


@pytest.fixture(scope="module")
def refined(
    model: Path, plan: Plan, curves: Measurement, tmp_path_factory: pytest.TempPathFactory
) -> Plan:
    return _refined(model, plan, curves, tmp_path_factory.mktemp("run"))


def test_swaps_are_found_and_the_budget_holds(
    plan: Plan, refined: Plan, model: Path, tmp_path: Path
) -> None:
    assert refined.refinement is not None
    assert refined.refinement.swaps
    assert all(len(swap) in (2, 3) for swap in refined.refinement.swaps)
    assert refined.n_bytes <= refined.budget == plan.budget
    made = ramgguf.quantize(model, from_plan=refined, output=tmp_path / "out.gguf")
    assert made.n_bytes == refined.n_bytes
    now = {a.name: a.format for a in plan.assignments}
    for change in itertools.chain(*refined.refinement.swaps):
        assert now[change.name] == change.before != change.after
        now[change.name] = change.after
    assert now == {a.name: a.format for a in refined.assignments}
    assert refined.total_cost >= plan.total_cost * (1 - plan.gap)
    assert refined.total_cost * (1 - refined.gap) <= plan.total_cost


def test_swaps_of_a_plan_for_two_memories_keep_to_both(
    plan: Plan, model: Path, curves: Measurement, tmp_path: Path
) -> None:
    with open_gguf(model) as file:
        n_layers, tied = file.n_layers or 0, file.has_tied_embedding
    division = Division(n_gpu_layers=n_layers // 2 + 1)
    sites = Sites.of([a.name for a in plan.assignments], n_layers, tied=tied)
    lies = sites.in_ram(division), sites.in_vram(division)

    def used(made: Plan) -> list[int]:
        sizes = np.array([padded(a.n_bytes, curves.alignment) for a in made.assignments])
        return [int(sizes[mask].sum()) for mask in lies]

    ram, vram = used(plan)
    rooms = (DivisionRoom(division, ram, vram),)
    formats = ("Q4_0", "Q4_1", "Q8_0")
    pools = Pools(rooms, n_layers, tied, formats)
    divided = ramgguf.plan(curves, plan.budget, objective="ram", pools=pools, min_sqnr_db=0)
    assert divided.division is not None
    after = _refined(model, divided, curves, tmp_path)
    assert after.refinement is not None
    assert after.refinement.n_tried
    assert after.division == divided.division
    # Without a record of memory, both take what they took, at most.
    assert all(a <= b for a, b in zip(used(after), used(divided), strict=True))
    on_cpu = sites.on_cpu(division)
    chosen = {a.format for a, cpu in zip(after.assignments, on_cpu, strict=True)
              if cpu and a.note is None}  # fmt: skip
    assert chosen
    assert chosen <= set(formats)


def test_what_it_says_of_the_acceptance_tokens_is_so_and_is_no_worse(
    plan: Plan, refined: Plan, model: Path, tmp_path: Path
) -> None:
    """Both plans are run from files of their own, on tokens drawn here, by plain numpy."""
    with _open(model) as base:
        sets = draw_sets(base, WANTED.request, WANTED.sizes, FIRST_SEQUENCE)
        before, after = (
            _kld(base, _as_planned(model, p, tmp_path / f"{i}.gguf"), sets[1][0])
            for i, p in enumerate((plan, refined))
        )
    told = refined.refinement
    assert told is not None
    assert told.acceptance.before == pytest.approx(before, rel=1e-3)
    assert told.acceptance.after == pytest.approx(after, rel=1e-3)
    assert after < before
    assert len({part.sha256 for part in (told.proposal, told.acceptance, told.report)}) == 3


def _open(path: Path) -> LlamaModel:
    return LlamaModel(path, n_ctx=48, n_threads=1, safe_kernels=True)


def _as_planned(model: Path, plan: Plan, path: Path) -> Path:
    """Write the model with every tensor decoded from its planned format."""
    data = bytearray(model.read_bytes())
    with open_gguf(model) as file:
        for a in plan.assignments:
            tensor = file.tensor(a.name)
            if a.format != a.source_format:
                rows, nmse = simulated(file, tensor, a.format, encoder=plan.encoder)
                assert nmse == pytest.approx(a.nmse, rel=1e-2)  # but for the rounding to F16
                data[tensor.offset : tensor.offset + tensor.n_bytes] = rows.tobytes()
    path.write_bytes(data)
    return path


def _kld(base: LlamaModel, other: Path, ids: NDArray[np.int32]) -> float:
    logs = []
    with _open(other) as changed:
        for model in (base, changed):
            model.clear()
            logits = model.decode(ids).astype(np.float64)
            logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean())


def test_a_run_that_ended_early_goes_on_to_the_same_plan(
    model: Path, plan: Plan, curves: Measurement, refined: Plan, tmp_path: Path
) -> None:
    before = model.read_bytes()
    _refined(model, plan, curves, tmp_path, n_trials=4)
    journal = tmp_path / "journal"
    with journal.open("ab") as f:
        f.write(b'{"swap": [{"na')  # cut short by a kill
    again = _refined(model, plan, curves, tmp_path)
    assert again == refined
    assert model.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]  # the copy is gone
    with RefineJournal(journal) as read:
        assert len(read.steps) == WANTED.n_trials
        for trial in read.steps:
            accepted = trial.accepting
            assert trial.taken == (accepted is not None and accepted.change < -accepted.error)
            assert (accepted is not None) == (trial.proposing.change < 0)


def test_a_journal_of_another_plan_is_refused(
    model: Path, plan: Plan, curves: Measurement, tmp_path: Path
) -> None:
    _refined(model, plan, curves, tmp_path, n_trials=1)
    other = ramgguf.plan(curves, "50%", objective="ram")
    with pytest.raises(PlanError, match="another plan or choice of tokens"):
        _refined(model, other, curves, tmp_path)


def test_what_does_not_belong_to_the_plan_is_refused(
    model: Path, plan: Plan, curves: Measurement
) -> None:
    with pytest.raises(PlanError, match="not among what the measurement allows"):
        ramgguf.refine(model, plan, ramgguf.measure(model, formats=["Q8_0"]), n_trials=1)
    with pytest.raises(EngineError, match="none of self, mix, random, wikitext"):
        parse_tokens("no such text")


def test_quantize_refines_and_leaves_no_journal(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made = ramgguf.quantize(
        model,
        "35%",
        tmp_path / "out.gguf",
        formats=FORMATS,
        objective="ram",
        refine=3,
        announce=said.append,
    )
    assert made.plan.refinement is not None
    assert made.plan.refinement.n_tried == 3
    assert made.n_bytes <= made.plan.budget
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert "3 swaps to try" in said[0]


def test_swaps_are_tried_on_tokens_of_several_sources(
    model: Path, plan: Plan, curves: Measurement, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i:05d} " for i in range(4000)))
    said: list[str] = []
    found = ramgguf.refine(
        model, plan, curves, n_trials=2, tokens=f"random,{text}", threads=1, announce=said.append
    )
    assert found.refinement is not None
    assert found.n_bytes <= plan.budget
    assert "(random-drawn tokens 50% + text.txt 50%)" in said[0]


def _move(*costs: float) -> Move:
    return Move(tuple((i, 1) for i in range(len(costs))), 0, costs)


def test_what_is_observed_is_believed_in_proportion_to_its_surety() -> None:
    belief = Posterior(2.0, [0.5, 0.5, 0.5])
    move = _move(1.0, -1.0)
    assert belief.expected(move) == pytest.approx((0.0, 2**0.5))
    belief.observe(move, -0.8, error=1e-6)
    assert belief.expected(move)[0] == pytest.approx(-0.8, abs=1e-5)
    assert belief.expected(move)[1] < 1e-5
    assert belief.mean[2] == 2.0  # nothing was said of the third
    unsure = Posterior(2.0, [0.5, 0.5, 0.5])
    unsure.observe(move, -0.8, error=2**0.5)
    assert unsure.expected(move)[0] == pytest.approx(-0.4)


def test_expected_improvement_is_the_mean_of_what_is_gained() -> None:
    rng = np.random.default_rng(0)
    for mean, deviation in ((0.0, 1.0), (1.0, 0.5), (-0.3, 2.0)):
        drawn = np.maximum(-rng.normal(mean, deviation, 1_000_000), 0).mean()
        found = improvement(np.array(mean), np.array(deviation**2))
        assert float(found) == pytest.approx(drawn, rel=0.02)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), room=st.integers(0, 100))
def test_every_proposal_fits_and_changes_two_or_three_items(seed: int, room: int) -> None:
    rng = np.random.default_rng(seed)
    items = [
        [Choice(int(b), float(10.0 / b)) for b in np.sort(rng.integers(1, 100, 4))]
        for _ in range(5)
    ]
    chosen = rng.integers(0, 4, 5).tolist()
    belief = Posterior(1.0, rng.uniform(0.1, 1, 5).tolist())
    moves = list(itertools.islice(belief.proposals(items, chosen, room, 0.1), 50))
    assert len({m.changes for m in moves}) == len(moves)
    for move in moves:
        assert len(move.changes) in (2, 3)
        assert len({i for i, _ in move.changes}) == len(move.changes)
        assert all(chosen[i] != j for i, j in move.changes)
        extra = [items[i][j].n_bytes - items[i][chosen[i]].n_bytes for i, j in move.changes]
        assert sum(extra) == move.n_bytes <= room
        costs = [items[i][j].cost - items[i][chosen[i]].cost for i, j in move.changes]
        assert move.cost == pytest.approx(costs)


def test_windows_of_a_text_do_not_overlap(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i:05d} " for i in range(500)))
    kind, corpus = parse_tokens(str(text))
    request = TokenRequest(encoder="search", tokens=kind, corpus=corpus, n_ctx=49)
    with LlamaModel(model, n_ctx=49, n_threads=1, safe_kernels=True) as loaded:
        sets = draw_sets(loaded, request, (2, 3, 4), 1000)
        ids = [s for part in sets for s in part]
        assert [len(part) for part in sets] == [2, 3, 4]
        whole = loaded.vocab.tokenize(text.read_bytes(), add_special=False).tobytes()
        starts = sorted(whole.find(s[1:].tobytes()) // 4 for s in ids)
        assert starts[0] >= 0
        assert all(b - a >= 48 for a, b in itertools.pairwise(starts))
        with pytest.raises(EngineError, match="give a longer text"):
            draw_sets(loaded, request, (50, 50, 50), 1000)
