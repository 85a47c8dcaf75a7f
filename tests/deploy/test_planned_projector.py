"""`--quantize-mmproj`: both files fit the memory together, and no two plans would be better."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from scipy.optimize import Bounds, LinearConstraint, milp
from typer.testing import CliRunner

import ramgguf
from made_speeds import made_speeds
from ramgguf.cli.app import app
from ramgguf.cli.model_commands import check_request
from ramgguf.core.errors import BudgetError, GGUFError, PlanError
from ramgguf.deploy import MemoryLimit, MemoryRequest
from ramgguf.deploy.beside import BesideModel
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.gguf.layout import padded
from ramgguf.measure.result import Measurement
from ramgguf.plan import ByteLimit, JointLimit
from ramgguf.plan.input_rounding import added_nmse
from ramgguf.plan.priors import ModelShape, prior
from ramgguf.plan.result import MemoryBudget, Plan
from small_projector import POSITIONS, projector_tensors, write_projector
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")

SHAPE = ContextShape(512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    write_tiny_model(folder / "m-f16.gguf", weight_type="F16", n_layers=12)
    write_projector(folder / "mmproj-f16.gguf", projector_tensors())
    for name in ("m", "mmproj"):
        ramgguf.measure(folder / f"{name}-f16.gguf", threads=1).save(folder / f"{name}.rd.json")
    return folder


@pytest.fixture(scope="module")
def projector(folder: Path) -> Measurement:
    return Measurement.load(folder / "mmproj.rd.json")


@pytest.fixture(scope="module")
def limit(folder: Path) -> int:
    """Memory in which model and projector take about half of their bytes."""
    whole = MemoryRequest(SHAPE, 10**9, beside=BesideModel(folder / "mmproj-f16.gguf"))
    memory = ramgguf.plan(folder / "m.rd.json", MemoryLimit(whole), min_sqnr_db=0).memory
    assert memory is not None
    return memory.ram.total - (memory.ram.weights + memory.beside[0].weights) // 2


def _request(folder: Path, projector: Measurement, limit: int) -> MemoryRequest:
    beside = BesideModel(folder / "mmproj-f16.gguf", projector=projector)
    return MemoryRequest(SHAPE, limit, beside=beside)


def _memory(plan: Plan) -> MemoryBudget:
    assert plan.memory is not None
    return plan.memory


def _least_cost(measured: list[Measurement], n_bytes: int) -> float:
    """Return the least cost of both files' tensors in so many bytes, by scipy's solver."""
    rows: list[tuple[int, int, float]] = []
    item = 0
    for measurement in measured:
        shape = ModelShape.of(measurement)
        for t in measurement.tensors:
            rows += [
                (item, padded(p.n_bytes, 32),
                 0.0 if t.kept else t.n_weights * prior(t, shape) * (p.nmse + added_nmse(t, p)))
                for p in t.points if t.kept or p.format in ("Q8_0", "Q4_0", "F16")
            ]  # fmt: skip
            item += 1
    owner, sizes, costs = (np.array(column) for column in zip(*rows, strict=True))
    one = np.zeros((item, len(rows)))
    one[owner, np.arange(len(rows))] = 1
    room = n_bytes - sum(m.n_overhead_bytes for m in measured)
    found = milp(
        costs / costs.max(), integrality=np.ones(len(rows)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(sizes[None, :], 0, room)],
        options={"mip_rel_gap": 1e-6},
    )  # fmt: skip
    assert found.success
    return float(found.fun * costs.max())


def test_both_files_are_written_verified_and_fit_the_memory(
    folder: Path, projector: Measurement, limit: int, tmp_path: Path
) -> None:
    made = ramgguf.quantize(
        folder / "m-f16.gguf", MemoryLimit(_request(folder, projector, limit)),
        tmp_path / "m.gguf", mmproj_output=tmp_path / "mmproj.gguf", effort="fast",
        min_sqnr_db=0, threads=1,
    )  # fmt: skip
    assert made.mmproj is not None
    memory, beside = _memory(made.plan), _memory(made.plan).beside[0]
    assert memory.ram.total <= limit
    assert beside.path == str(tmp_path / "mmproj.gguf")
    written = {name: GGUFReader(tmp_path / f"{name}.gguf") for name in ("m", "mmproj")}
    assert beside.weights == sum(t.n_bytes for t in written["mmproj"].tensors)
    source = GGUFReader(folder / "mmproj-f16.gguf")
    assert beside.weights < 0.8 * sum(t.n_bytes for t in source.tensors)
    for name, part in (("m", made), ("mmproj", made.mmproj)):
        assert part.worst_departure is not None
        assert part.worst_departure < 1e-9
        formats = {t.name: t.tensor_type.name for t in written[name].tensors}
        assert formats == {a.name: a.format for a in part.plan.assignments}
        assert len(set(formats.values())) > 2
        assert (tmp_path / f"{name}.gguf").stat().st_size == part.plan.n_bytes
    kept = {t.name: t for t in written["mmproj"].tensors}[POSITIONS]
    assert kept.tensor_type.name == "F32"


def test_no_plan_of_both_of_these_bytes_costs_less(
    folder: Path, projector: Measurement, limit: int
) -> None:
    model = Measurement.load(folder / "m.rd.json")
    made = ramgguf.plan(
        model, MemoryLimit(_request(folder, projector, limit)), min_sqnr_db=0,
        formats=["Q8_0", "Q4_0"],
    )  # fmt: skip
    assert made.mmproj is not None
    least = _least_cost([model, projector], made.n_bytes + made.mmproj.n_bytes)
    assert made.total_cost + made.mmproj.total_cost == pytest.approx(least, rel=1e-4)
    smallest_step = min(
        b.n_bytes - a.n_bytes
        for m in (model, projector) for t in m.tensors if t.kept is None
        for a, b in itertools.pairwise(p for p in t.points if p.format in ("Q4_0", "Q8_0"))
    )  # fmt: skip
    assert 0 <= limit - _memory(made).ram.total < 2 * smallest_step


def test_more_memory_lowers_both_costs_together_and_errors_say_the_least(
    folder: Path, projector: Measurement, limit: int
) -> None:
    model = Measurement.load(folder / "m.rd.json")
    costs = []
    for more in (0, 300_000, 900_000):
        made = ramgguf.plan(
            model, MemoryLimit(_request(folder, projector, limit + more)), min_sqnr_db=0
        )
        assert made.mmproj is not None
        costs.append(made.total_cost + made.mmproj.total_cost)
    assert costs[0] > costs[1] > costs[2]
    with pytest.raises(BudgetError, match=r"smallest plan of model and projector is .*raise the"):
        ramgguf.plan(
            model, MemoryLimit(_request(folder, projector, limit - 2_000_000)), min_sqnr_db=0
        )


def test_an_effort_keeps_the_projectors_first_plan(
    folder: Path, projector: Measurement, limit: int
) -> None:
    model = Measurement.load(folder / "m.rd.json")
    both = MemoryLimit(_request(folder, projector, limit))
    assert isinstance(both, JointLimit)
    assert not isinstance(ByteLimit("50%"), JointLimit)
    first = ramgguf.plan(model, both, min_sqnr_db=0)
    assert first.mmproj is not None
    later = ramgguf.plan(model, both.settled(first.mmproj), objective="nmse", min_sqnr_db=0)
    assert later.mmproj == first.mmproj
    assert _memory(later).beside == _memory(first).beside
    assert later.objective == "nmse"
    assert _memory(later).ram.total <= limit


def test_the_command_prints_both_plans_and_how_to_run_both(
    folder: Path, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    run = CliRunner().invoke
    size = ["--memory", str(limit), "--context", "512", "--min-sqnr", "0"]
    command = ["quantize", "m-f16.gguf", *size, "--effort", "fast", "-t", "1"]
    both = [*command, "--mmproj", "mmproj-f16.gguf", "-o", str(tmp_path / "m.gguf")]
    done = run(app, [*both, "--quantize-mmproj", "--save-plan", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    (written,) = folder.glob("mmproj-ram-*bpw.gguf")
    assert f"--mmproj {written.name}" in text
    assert "the projector, mmproj-f16.gguf:" in text
    assert "no image was looked at" in text
    assert text.count("every tensor decoded again") == 2
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.mmproj is not None
    assert written.stat().st_size == plan.mmproj.n_bytes
    # A ready plan writes both again, elsewhere; a plan without a projector has none to write.
    again = ["quantize", "m-f16.gguf", "--plan", str(tmp_path / "plan.json"), "-t", "1", "--json"]
    others = ["-o", str(tmp_path / "n.gguf"), "--mmproj-output", str(tmp_path / "np.gguf")]
    done = run(app, [*again, *others])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["mmproj"]["paths"] == [str(tmp_path / "np.gguf")]
    assert (tmp_path / "np.gguf").read_bytes() == written.read_bytes()
    written.unlink()


@pytest.mark.parametrize(
    "options",
    [
        {"effort": "fast", "min_speed": 1.0, "speeds": made_speeds()},
        {"effort": "auto", "seconds": 8.0},
    ],
    ids=["speed", "effort"],
)
def test_a_least_speed_and_an_effort_write_both_files(
    folder: Path, projector: Measurement, limit: int, tmp_path: Path, options: dict[str, Any]
) -> None:
    first = ramgguf.plan(
        folder / "m.rd.json", MemoryLimit(_request(folder, projector, limit)), min_sqnr_db=0
    ).mmproj
    made = ramgguf.quantize(
        folder / "m-f16.gguf", MemoryLimit(_request(folder, projector, limit)),
        tmp_path / "m.gguf", mmproj_output=tmp_path / "mmproj.gguf", min_sqnr_db=0, threads=1,
        **options,
    )  # fmt: skip
    assert made.mmproj is not None
    assert first is not None
    assert made.mmproj.plan.sha256() == first.sha256()
    assert (tmp_path / "mmproj.gguf").stat().st_size == first.n_bytes
    assert _memory(made.plan).ram.total <= limit
    assert made.worst_departure is not None
    assert (tmp_path / "m.gguf").stat().st_size == made.plan.n_bytes


def test_a_trial_has_the_memory_that_what_runs_beside_leaves(
    folder: Path, projector: Measurement, limit: int
) -> None:
    request = _request(folder, projector, limit)
    assert check_request(request, 1).limit.n_bytes == limit
    less = check_request(request, 1, 5_000_000).limit
    assert less.n_bytes == limit - 5_000_000
    assert "beside" in less.source


def test_plan_takes_what_was_measured_of_the_projector(
    folder: Path, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    command = ["plan", "m.rd.json", "--memory", str(limit), "--context", "512", "--min-sqnr", "0"]
    both = ["--mmproj", "mmproj-f16.gguf", "--mmproj-measurement", "mmproj.rd.json"]
    done = CliRunner().invoke(app, [*command, *both, "-o", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    plan = Plan.load(tmp_path / "p.json")
    assert plan.mmproj is not None
    assert _memory(plan).ram.total <= limit
    assert f"mmproj-ram-{plan.mmproj.bpw:.2f}bpw.gguf" in done.output.replace("\n", "")


def test_what_cannot_be_planned_together_is_refused(
    folder: Path, projector: Measurement, limit: int, tmp_path: Path
) -> None:
    model, out = folder / "m-f16.gguf", tmp_path / "m.gguf"
    request = _request(folder, projector, limit)
    with pytest.raises(BudgetError, match="--budget limits the model's file"):
        ramgguf.quantize(model, MemoryLimit(request, "50%"), out, effort="fast")
    gpu = MemoryRequest(SHAPE, limit, vram=10**9, beside=request.beside)
    with pytest.raises(BudgetError, match="in RAM only"):
        ramgguf.quantize(model, MemoryLimit(gpu), out, effort="fast")
    with pytest.raises(PlanError, match="no projector is planned"):
        ramgguf.quantize(model, "50%", out, effort="fast", mmproj_output=tmp_path / "p.gguf")
    with pytest.raises(GGUFError, match="two outputs"):
        ramgguf.quantize(model, MemoryLimit(request), out, effort="fast", mmproj_output=out)
    (tmp_path / "p.gguf").write_bytes(b"there")
    with pytest.raises(GGUFError, match=r"p\.gguf"):
        ramgguf.quantize(
            model, MemoryLimit(request), out, effort="fast", mmproj_output=tmp_path / "p.gguf"
        )
    assert not out.exists()
    other = projector.model_copy(
        update={"source": projector.source.model_copy(update={"sample_sha256": "0" * 64})}
    )
    with pytest.raises(PlanError, match="the projector's measurement is of"):
        ramgguf.plan(folder / "m.rd.json", MemoryLimit(_request(folder, other, limit)))


@pytest.mark.parametrize(
    "options",
    [
        ["-b", "50%", "--quantize-mmproj"],
        ["--memory", "1GB", "--context", "512", "--quantize-mmproj"],
        ["--memory", "1GB", "--context", "512", "--mmproj-output", "p.gguf"],
    ],
)
def test_a_projector_to_quantize_must_be_named(folder: Path, options: list[str]) -> None:
    done = CliRunner().invoke(app, ["quantize", str(folder / "m-f16.gguf"), *options])
    assert done.exit_code == 2
    assert "--mmproj" in done.output
