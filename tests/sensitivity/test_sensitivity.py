"""Sensitivity by forward passes: against one's own files, repeated, killed and resumed."""

import importlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

import ramgguf
from ramgguf import _core
from ramgguf.cli import model_commands, sensitivity_commands
from ramgguf.cluster.runners import open_runner
from ramgguf.core.corpus import Corpus
from ramgguf.core.errors import PlanError
from ramgguf.core.progress import Silent
from ramgguf.core.values import TokenKind
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.sources import in_turn
from ramgguf.llama.token_statistics import standard_error
from ramgguf.llama.tokens import TokenRequest, TokenSource
from ramgguf.plan.input_rounding import rounding_nmse
from ramgguf.plan.objectives import costing
from ramgguf.quants.encoders import EncoderName
from ramgguf.sensitivity import timing
from ramgguf.sensitivity.alpha import measure_alpha
from ramgguf.sensitivity.result import Sensitivity
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")
QUICK = TokenRequest(encoder="rtn", n_sequences=2, n_ctx=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="F16")


def _measured(model: Path, folder: Path, request: TokenRequest = QUICK) -> Sensitivity:
    with open_gguf(model) as file:
        return measure_alpha(
            file,
            request,
            open_runner(file, request, scratch=folder, threads=1),
            journal_path=folder / "journal",
            progress=Silent(),
        )


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Sensitivity:
    return _measured(model, tmp_path_factory.mktemp("first"))


def test_every_quantizable_tensor_is_measured_and_the_model_left_alone(
    model: Path, tmp_path: Path, measured: Sensitivity
) -> None:
    before = model.read_bytes()
    _measured(model, tmp_path)
    assert model.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]  # the copy is gone
    with open_gguf(model) as file:
        names = [t.name for t in file.tensors if len(t.shape) == 2]
    assert [t.name for t in measured.tensors] == names
    assert all(t.origin == "measured" and t.alpha > 0 for t in measured.tensors)


def test_a_reading_is_the_kld_of_the_file_with_that_tensor_quantized(
    model: Path, tmp_path: Path, measured: Sensitivity
) -> None:
    name = "blk.1.ffn_down.weight"
    reading = next(t.reading for t in measured.tensors if t.name == name)
    assert reading is not None
    changed = tmp_path / "changed.gguf"
    data = bytearray(model.read_bytes())
    with open_gguf(model) as file:
        tensor = file.tensor(name)
        rows = file.read_rows(tensor, 0, tensor.n_rows)
    values = _round_trip(rows, tensor.row_length, reading.format)
    data[tensor.offset : tensor.offset + tensor.n_bytes] = values.tobytes()
    changed.write_bytes(data)
    original = np.frombuffer(rows, np.float16).astype(np.float64)
    error = float(((values.astype(np.float64).ravel() - original) ** 2).sum())
    assert reading.nmse == pytest.approx(error / float((original**2).sum()), rel=1e-6)
    rng = [np.random.default_rng([0, i]) for i in range(2)]
    with _open(model) as base, _open(changed) as other:
        kld = [_kld(base, other, r) for r in rng]
    assert reading.kld == pytest.approx(float(np.mean(kld)), rel=1e-4)


def _round_trip(rows: NDArray[np.uint8], length: int, name: str) -> NDArray[np.float16]:
    block = {f.name: f for f in _core.formats()}[name]
    blocks = np.empty((len(rows), length // block.block_size * block.block_bytes), np.uint8)
    _core.encode(name, "F16", rows, blocks)
    values = np.empty((len(rows), length), np.float32)
    _core.decode(name, blocks, values)
    return values.astype(np.float16)


def _open(path: Path) -> LlamaModel:
    return LlamaModel(path, n_ctx=64, n_threads=1, safe_kernels=True)


def _kld(base: LlamaModel, other: LlamaModel, rng: np.random.Generator) -> float:
    """Return the mean KLD over tokens drawn from base, by plain numpy."""
    ids = [1, *base.sample([1], 63, rng)]
    logs = []
    for model in (base, other):
        model.clear()
        logits = model.decode(ids).astype(np.float64)
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean())


def test_a_run_does_not_go_on_from_the_readings_of_a_twin(model: Path, tmp_path: Path) -> None:
    _measured(model, tmp_path)
    (tmp_path / "twin").mkdir()
    twin = write_tiny_model(tmp_path / "twin" / "tiny.gguf", weight_type="F16", noise=0.01)
    with open_gguf(model) as a, open_gguf(twin) as b:
        assert (a.header_sha256, a.n_bytes) == (b.header_sha256, b.n_bytes)
    with pytest.raises(PlanError, match="imatrix, stand-in or choice of tokens"):
        _measured(twin, tmp_path)


def test_two_runs_with_one_seed_agree_exactly_and_another_seed_does_not(
    model: Path, tmp_path: Path, measured: Sensitivity
) -> None:
    again = _measured(model, tmp_path)
    assert again.tensors == measured.tensors
    assert again.sha256() == measured.sha256()
    (tmp_path / "other").mkdir()
    other = _measured(
        model, tmp_path / "other", TokenRequest(encoder="rtn", n_sequences=2, n_ctx=64, seed=1)
    )
    assert other.tokens.sha256 != measured.tokens.sha256
    assert other.tensors != measured.tensors


@pytest.mark.parametrize("kind", ["random", "text"])
def test_other_tokens_can_be_used(model: Path, tmp_path: Path, kind: TokenKind) -> None:
    corpus = Corpus("letters", "the quick brown fox " * 50) if kind == "text" else None
    found = _measured(
        model,
        tmp_path,
        TokenRequest(encoder="rtn", tokens=kind, corpus=corpus, n_sequences=1, n_ctx=64),
    )
    assert found.tokens.kind == kind
    assert found.tokens.n_tokens == 64
    assert all(t.alpha > 0 for t in found.tensors)


def test_several_sources_take_turns_and_the_result_names_them(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    run: dict[str, Any] = {"encoder": "rtn", "n_ctx": 64, "n_sequences": 4, "threads": 1}
    found = ramgguf.sensitivity(model, tokens=f"random,{text}:3", **run)
    assert found.tokens.kind == "several"
    assert found.tokens.text == "random-drawn tokens 25% + a.txt 75%"
    assert found.tokens.n_sequences == 4
    assert all(t.alpha > 0 for t in found.tensors)
    again = ramgguf.sensitivity(model, tokens=f"random,{text}:3", **run)
    assert again.tensors == found.tensors
    alone = ramgguf.sensitivity(model, tokens=str(text), **run)
    assert (alone.tokens.kind, alone.tokens.text) == ("text", "a.txt")
    assert alone.tokens.sha256 != found.tokens.sha256


def test_a_run_of_other_sources_is_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"encoder": "rtn", "n_ctx": 64, "n_sequences": 2, "threads": 1}
    journal = tmp_path / "journal"
    ramgguf.sensitivity(model, tokens="self,random", journal=journal, **run)
    with pytest.raises(PlanError, match="choice of tokens"):
        ramgguf.sensitivity(model, tokens="self,random:3", journal=journal, **run)


def test_any_first_few_sequences_are_in_proportion_to_the_weights() -> None:
    sources = [TokenSource(name, w, "random") for name, w in (("a", 0.5), ("b", 0.25), ("c", 0.25))]
    order = in_turn(sources, 40)
    for n in range(1, 41):
        for number, source in enumerate(sources):
            assert abs(order[:n].count(number) - source.weight * n) < 1


def test_a_short_time_measures_fewer_tensors_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "LATE", 100.0)  # a machine that gets busy meanwhile is not late
    model = write_tiny_model(tmp_path / "deep.gguf", weight_type="F16", n_layers=12)
    (tmp_path / "run").mkdir()
    found = _measured(model, tmp_path / "run", TokenRequest(encoder="rtn", n_ctx=64, seconds=1e-3))
    origins = {t.layer: t.origin for t in found.tensors if t.role == "ffn_down"}
    assert origins[0] == origins[1] == origins[10] == origins[11] == "measured"
    assert "interpolated" in origins.values()
    assert found.tokens.n_sequences == 1
    assert any("interpolated within their role" in note for note in found.notes)


def test_a_killed_run_goes_on_where_it_was(
    model: Path, tmp_path: Path, measured: Sensitivity
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from test_sensitivity import QUICK, _measured\n"
        "from ramgguf.sensitivity import journal as j\n"
        "add = j.Journal.add\n"
        "def slow(self, reading):\n"
        "    add(self, reading)\n"
        "    time.sleep(0.2)\n"
        "j.Journal.add = slow\n"
        "_measured(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(p) for p in Path(__file__).parents[:2]),
    }
    child = subprocess.Popen(
        [sys.executable, str(script), str(model), str(tmp_path)], env=environment
    )
    journal = tmp_path / "journal"
    try:
        for _ in range(300):
            if journal.exists() and journal.read_bytes().count(b"\n") >= 4:
                break
            time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    n_before = journal.read_bytes().count(b"\n")
    assert 4 <= n_before < len(measured.tensors)
    with journal.open("ab") as f:
        f.write(b'{"name": "blk.1.ffn_d')  # cut short
    resumed = _measured(model, tmp_path)
    assert resumed.tensors == measured.tensors


def test_a_journal_of_something_else_is_refused(model: Path, tmp_path: Path) -> None:
    _measured(model, tmp_path)
    with pytest.raises(PlanError, match="imatrix, stand-in or choice of tokens"):
        _measured(model, tmp_path, TokenRequest(encoder="rtn", n_sequences=2, n_ctx=64, seed=5))
    with pytest.raises(PlanError, match="choice of tokens"):
        _measured(model, tmp_path, TokenRequest(encoder="rtn", n_sequences=2, n_ctx=32))
    (tmp_path / "journal").write_text('{"record": "run"}\n')
    with pytest.raises(PlanError, match="line 1 is not of a sensitivity run"):
        _measured(model, tmp_path)


def test_the_standard_error_is_that_of_independent_values() -> None:
    rng = np.random.default_rng(0)
    values = rng.exponential(size=64 * 200)
    assert standard_error(values) == pytest.approx(1 / np.sqrt(len(values)), rel=0.2)
    # Neighbours that are alike tell less.
    assert standard_error(np.repeat(values[::16], 16)) > 3 * standard_error(values)


def test_plans_by_sensitivity_predict_the_kld_that_the_readings_add_up_to(
    model: Path, measured: Sensitivity
) -> None:
    measurement = ramgguf.measure(model, formats=["Q4_0", "Q5_0", "Q8_0"])
    plan = ramgguf.plan(measurement, "35%", sensitivity=measured, objective="sensitivity")
    alpha = {t.name: t.alpha for t in measured.tensors}
    expected = [
        alpha[a.name] * (a.nmse + rounding_nmse(a.role, a.format))
        for a in plan.assignments
        if a.nmse > 0
    ]
    assert plan.objective == "sensitivity"
    assert plan.total_cost == pytest.approx(sum(expected))
    assert plan.predicted_kld is not None
    assert 0 < plan.predicted_kld.low < plan.predicted_kld.kld < plan.predicted_kld.high
    explained = ramgguf.explain(plan, measurement, measured)
    assert len(explained.tensors) == len(plan.assignments)
    curve = ramgguf.curve(measurement, sensitivity=measured, objective="sensitivity")
    on_curve = ramgguf.plan(curve, plan.n_bytes)
    assert on_curve.sensitivity_sha256 == plan.sensitivity_sha256 == measured.sha256()
    assert on_curve.total_cost >= plan.total_cost * (1 - 1e-9)
    assert on_curve.predicted_kld is not None
    if on_curve.sha256() == plan.sha256():
        assert on_curve.predicted_kld.kld == pytest.approx(plan.predicted_kld.kld)
    assert ramgguf.plan(measurement, "35%").predicted_kld is None


def test_by_default_costs_are_the_geometric_mean_of_measured_ones_and_priors(
    model: Path, measured: Sensitivity
) -> None:
    measurement = ramgguf.measure(model, formats=["Q4_0", "Q5_0", "Q8_0"])
    plan = ramgguf.plan(measurement, "35%", sensitivity=measured)
    assert plan.objective == "posterior"
    own, by_alpha, by_priors = (
        costing(name, measurement, measured if name != "weighted" else None).cost
        for name in ("posterior", "sensitivity", "weighted")
    )
    logs = []
    for tensor in measurement.tensors:
        if tensor.kept is not None:
            continue
        for point in (p for p in tensor.points if p.nmse > 0):
            a, b = by_alpha(tensor, point), by_priors(tensor, point)
            logs.append((math.log(own(tensor, point)), math.log(a), math.log(b)))
    found, alphas, priors = np.array(logs).T
    assert np.ptp(2 * found - alphas - priors) < 1e-9  # but for one unit
    assert np.mean(found - alphas) == pytest.approx(0, abs=1e-9)  # which is that of the KLD
    assert np.ptp(found - alphas) > 0.1  # the test tells the two apart
    # What it predicts are the readings alone.
    fixed = ramgguf.plan(
        measurement, "35%", sensitivity=measured, objective="sensitivity",
        pins=[f"^{re.escape(a.name)}$={a.format}" for a in plan.assignments if a.nmse > 0],
    )  # fmt: skip
    assert [a.format for a in fixed.assignments] == [a.format for a in plan.assignments]
    assert fixed.predicted_kld == plan.predicted_kld
    with pytest.raises(PlanError, match="objective posterior needs a file"):
        ramgguf.plan(measurement, "35%", objective="posterior")


def test_a_plan_says_when_its_errors_are_of_another_encoder_than_its_sensitivities(
    model: Path, measured: Sensitivity
) -> None:
    cases: tuple[tuple[EncoderName, int], ...] = (("rtn", 0), ("search", 1))
    for encoder, notes in cases:
        curves = ramgguf.measure(model, encoder=encoder, threads=1)
        plan = ramgguf.plan(curves, "60%", sensitivity=measured)
        curve = ramgguf.curve(curves, sensitivity=measured)
        for said in (plan.notes, curve.notes):
            found = [note for note in said if "encoder rtn, the errors with search" in note]
            assert len(found) == notes


def test_a_sensitivity_that_does_not_belong_to_the_model_is_refused(
    model: Path, tmp_path: Path, measured: Sensitivity
) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", weight_type="F16", extra_tokens=8)
    measurement = ramgguf.measure(other, formats=["Q8_0"])
    with pytest.raises(PlanError, match="another model"):
        ramgguf.plan(measurement, "80%", sensitivity=measured)
    with pytest.raises(PlanError, match="give it with --sensitivity"):
        ramgguf.plan(measurement, "80%", objective="sensitivity")
    own = ramgguf.measure(model, formats=["Q8_0"])
    plan = ramgguf.plan(own, "80%", sensitivity=measured)
    first = measured.tensors[0].model_copy(update={"alpha": 1.0})
    changed = measured.model_copy(update={"tensors": (first, *measured.tensors[1:])})
    with pytest.raises(PlanError, match="another sensitivity file"):
        ramgguf.explain(plan, own, changed)


def test_the_command_writes_the_file_and_clears_up(model: Path, tmp_path: Path) -> None:
    application = typer.Typer()
    sensitivity_commands.register(application)
    output = tmp_path / "s.json"
    arguments = [str(model), "-o", str(output), "--sequences", "2", "--tokens", "random"]
    arguments += ["--context", "64"]
    done = CliRunner().invoke(application, arguments)
    assert done.exit_code == 0, done.output
    assert "ffn_down" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]
    assert Sensitivity.load(output).tokens.n_tokens == 128
    again = CliRunner().invoke(application, arguments)
    assert isinstance(again.exception, PlanError)


def test_quantize_measures_first_when_asked_and_uses_what_it_measured(
    model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.gguf"
    own.write_bytes(model.read_bytes())
    arguments = ["--budget", "40%", "--sensitivity", "measure", "--sensitivity-time", "1s"]
    application = typer.Typer()
    model_commands.register(application)
    done = CliRunner().invoke(
        application, ["quantize", str(own), *arguments, "-o", str(tmp_path / "out.gguf")]
    )
    assert done.exit_code == 0, done.output
    assert "objective posterior" in done.stdout
    assert "tensors × " in done.stderr  # the cost, said before it is spent
    kept = Sensitivity.load(tmp_path / "own.sens.json")
    assert {p.name for p in tmp_path.iterdir()} == {"own.gguf", "own.sens.json", "out.gguf"}
    again = CliRunner().invoke(
        application, ["quantize", str(own), *arguments, "-o", str(tmp_path / "again.gguf")]
    )
    assert "measured before" in again.stderr
    assert Sensitivity.load(tmp_path / "own.sens.json") == kept
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_what_was_not_read_has_its_roles_median_share_of_late_tokens(
    measured: Sensitivity,
) -> None:
    shares = measured.late_shares()
    assert set(shares) == {t.name for t in measured.tensors}
    for t in measured.tensors:
        assert t.reading is not None
        assert t.reading.late_kld is not None
        assert shares[t.name] * t.reading.kld == pytest.approx(t.reading.late_kld)
    role = next(r for r in {t.role for t in measured.tensors} if r.startswith("ffn"))
    (first, *others) = (t for t in measured.tensors if t.role == role)
    unread = measured.model_copy(
        update={
            "tensors": tuple(
                t.model_copy(update={"reading": None}) if t.name == first.name else t
                for t in measured.tensors
            )
        }
    )
    median = np.median([shares[t.name] for t in others])
    assert unread.late_shares()[first.name] == pytest.approx(median)
    older = tuple(
        t.model_copy(
            update={"reading": t.reading and t.reading.model_copy(update={"late_kld": None})}
        )
        for t in measured.tensors
    )
    assert measured.model_copy(update={"tensors": older}).late_shares() == {}


def test_carried_alpha_is_near_what_whole_passes_read_and_can_be_weighed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(tmp_path / "deep.gguf", weight_type="F16", n_layers=14)
    whole = ramgguf.sensitivity(model, tokens="random", n_sequences=1, n_ctx=128, threads=1)
    alpha = importlib.import_module("ramgguf.sensitivity.alpha")
    monkeypatch.setattr(
        alpha,
        "choose",
        lambda works, seconds_of, timer, announce: next(
            (work, seconds_of(work)) for work in works if work.carried and work.n_sequences == 1
        ),
    )
    found = ramgguf.sensitivity(model, tokens="random", n_ctx=128, threads=1)
    assert found.tokens.sha256 == whole.tokens.sha256
    carried = [t for t in found.tensors if t.origin == "carried"]
    assert len(carried) > 0.4 * len(found.tensors)
    read = {t.name: t.alpha for t in whole.tensors}
    away = np.abs(np.log([t.alpha / read[t.name] for t in carried]))
    assert np.median(away) < 0.25
    in_role = {
        t.role: np.median([read[u.name] for u in carried if u.role == t.role]) for t in carried
    }
    assert np.median(away) < 0.8 * np.median(
        np.abs(np.log([in_role[t.role] / read[t.name] for t in carried]))
    )
    same = ramgguf.reweigh(found, model, None)
    assert [t.origin for t in same.tensors] == [t.origin for t in found.tensors]
    assert [t.alpha for t in same.tensors] == pytest.approx([t.alpha for t in found.tensors])
