"""Effort: what is tried is gated and kept, and explicit options are never overruled."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ramgguf
from ramgguf.calibrate import Calibration
from ramgguf.cli.app import app
from ramgguf.core import parallel
from ramgguf.core.errors import BudgetError, EngineError, GGUFError, ImatrixError, PlanError
from ramgguf.core.machine import Available
from ramgguf.evaluate import held_out
from ramgguf.evaluate.held_out import HeldOutScore, WindowScore, resamples, score_held_out
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.child import Child
from ramgguf.llama.client import Engine
from ramgguf.llama.layer_rounding_protocol import RoundLayer, SkipLayer
from ramgguf.quantize import default_effort
from ramgguf.quantize import effort as effort_module
from ramgguf.quantize import gate as gate_module
from ramgguf.quantize import placing as placing_module
from ramgguf.quantize import quantized_inputs as quantized_inputs_module
from ramgguf.quantize import schedule as schedule_module
from ramgguf.quantize import step_costs as step_costs_module
from ramgguf.quantize.gate import judge
from ramgguf.quantize.kept_blocks import KeptBlocks
from ramgguf.quantize.schedule import Costs, Effort, Schedule
from ramgguf.quantize.step_cache import StepCache
from ramgguf.quantize.step_costs import measured_costs
from ramgguf.quants import stand_in as stand_in_module
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.quants.stand_in import BESIDE_BYTES, stand_in_layout
from ramgguf.transform import scaling as scaling_module
from shown_stages import ShownStages
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")


def _score(kld: dict[str, list[float]]) -> HeldOutScore:
    windows = tuple(
        WindowScore(
            domain=domain,
            n_tokens=100,
            kld_sum=100 * value,
            nll_sum=310.0,
            reference_nll_sum=300.0,
            n_same_top=90,
        )
        for domain, values in kld.items()
        for value in values
    )
    return HeldOutScore(
        ramgguf_version="0",
        model="a",
        n_bytes=1,
        reference="b",
        part="gate",
        n_ctx=108,
        first_target=8,
        engine="e",
        windows=windows,
        seconds=1.0,
    )


BEFORE = {"prose": [0.2, 0.3, 0.25, 0.2], "code": [0.1, 0.12, 0.09, 0.11]}


def test_a_step_that_lowers_every_domain_is_taken() -> None:
    after = {d: [0.8 * x for x in values] for d, values in BEFORE.items()}
    verdict = judge(_score(BEFORE), _score(after))
    assert verdict.taken
    assert verdict.ratio == pytest.approx(0.8)
    assert "taken" in str(verdict)


def test_a_step_that_makes_one_domain_worse_is_not_taken_and_the_log_names_it() -> None:
    after = {"prose": [0.5 * x for x in BEFORE["prose"]], "code": [1.2 * x for x in BEFORE["code"]]}
    verdict = judge(_score(BEFORE), _score(after))
    assert verdict.ratio < 1
    assert not verdict.taken
    assert "not taken, code gets worse" in str(verdict)


def test_a_step_that_changes_nothing_is_not_taken() -> None:
    verdict = judge(_score(BEFORE), _score(BEFORE))
    assert not verdict.taken
    assert verdict.worse == ()


def test_scores_of_unequal_length_are_judged_on_the_windows_that_both_have() -> None:
    """One cut short still has whole rounds of domains, in the same order."""
    rounds = [_score({d: [values[i]] for d, values in BEFORE.items()}).windows for i in range(4)]
    whole = _score(BEFORE).model_copy(update={"windows": sum(rounds, ())})
    halved = [
        w.model_copy(update={"kld_sum": 0.5 * w.kld_sum}) for windows in rounds[:2] for w in windows
    ]
    verdict = judge(whole, whole.model_copy(update={"windows": tuple(halved)}))
    assert verdict.n_windows == 4
    assert verdict.ratio == pytest.approx(0.5)
    assert verdict.taken


def test_what_changes_nothing_is_harmless_and_what_harms_a_domain_is_not() -> None:
    assert judge(_score(BEFORE), _score(BEFORE)).harmless
    worse = {**BEFORE, "code": [1.2 * x for x in BEFORE["code"]]}
    assert not judge(_score(BEFORE), _score(worse)).harmless


def test_noise_of_one_domain_alone_does_not_refuse_a_step() -> None:
    after = {
        "prose": [0.5 * x for x in BEFORE["prose"]],
        "code": [0.08, 0.15, 0.11, 0.10],  # higher by 0.005, give or take 0.014
    }
    assert judge(_score(BEFORE), _score(after)).taken


def test_two_windows_of_a_domain_are_judged_by_the_noise_of_all_domains() -> None:
    before = {"a": [0.2, 0.2], "b": [0.2, 0.2], "c": [0.2, 0.2]}
    # Windows of a domain part by a fifth: a mean that is higher by 5 % is chance.
    noisy = {"a": [0.14, 0.18], "b": [0.14, 0.18], "c": [0.19, 0.23]}
    assert judge(_score(before), _score(noisy)).taken
    # The same mean where windows agree is not.
    calm = {"a": [0.16, 0.16], "b": [0.16, 0.16], "c": [0.21, 0.21]}
    assert judge(_score(before), _score(calm)).worse == ("c",)
    # One window a domain tells no noise.
    single = {d: values[:1] for d, values in before.items()}
    assert judge(_score(single), _score({"a": [0.16], "b": [0.16], "c": [0.21]})).worse == ("c",)


def test_intervals_hold_the_mean_and_few_windows_claim_none() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        values = {d: list(rng.lognormal(-2, 0.5, 12)) for d in ("a", "b")}
        kld = _score(values).overall().kld
        assert kld.low is not None
        assert kld.high is not None
        hits += kld.low <= np.exp(-2 + 0.125) <= kld.high
    assert 85 <= hits <= 100
    few = _score({"a": [0.1, 0.2]})
    assert few.of("a").kld.low is None
    counts = resamples(["a", "a", "b"], 50)
    assert (counts[:, :2].sum(1) == 2).all()
    assert (counts[:, 2] == 1).all()


def test_a_file_scored_against_itself_has_lost_nothing(tiny: Path) -> None:
    (score,) = score_held_out([tiny], tiny, n_ctx=64, max_rounds=1)
    assert set(score.domains) == {"prose", "code", "mathematics", "chat", "languages"}
    assert score.overall().kld.value == 0
    assert score.overall().ppl_ratio.value == 1
    assert score.overall().same_top.value == 1
    assert HeldOutScore.from_json(score.to_json()) == score


def test_the_score_is_what_evaluate_finds_on_the_same_tokens(tiny: Path, tmp_path: Path) -> None:
    small = ramgguf.quantize(tiny, "45%", tmp_path / "small.gguf", effort="fast").paths[0]
    one, again = (score_held_out([small], tiny, n_ctx=64, max_rounds=2)[0] for _ in range(2))
    assert one.windows == again.windows
    assert one.overall().kld.value > 0.001
    assert one.overall().n_tokens == 2 * 5 * (64 - 8)


def test_a_reference_that_is_kept_is_read_once_and_tells_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ramgguf.quantize(tiny, "45%", tmp_path / "small.gguf", effort="fast").paths[0]
    (plain,) = score_held_out([small], tiny, n_ctx=64, seconds=None, max_rounds=2)
    opened: list[list[Path]] = []

    def seen(paths: list[Path], **options: Any) -> Engine:
        opened.append(paths)
        return Engine(paths, **options)

    monkeypatch.setattr(held_out, "Engine", seen)
    kept = tmp_path / "kept"
    for _ in range(2):
        (found,) = score_held_out(
            [small], tiny, n_ctx=64, seconds=None, max_rounds=2, reference_logits=kept
        )
        for a, b in zip(found.windows, plain.windows, strict=True):
            assert (a.domain, a.n_tokens, a.n_same_top) == (b.domain, b.n_tokens, b.n_same_top)
            assert a.kld_sum == pytest.approx(b.kld_sum, rel=1e-3)
            assert a.reference_nll_sum == pytest.approx(b.reference_nll_sum, abs=0.01)
            assert a.nll_sum == b.nll_sum
    assert opened == [[tiny], [small], [small]]
    with open_gguf(tiny) as file:
        assert kept.stat().st_size == held_out.kept_bytes(file, 64, 10)
    with pytest.raises(EngineError, match="another tokenizer"):
        score_held_out([small], tiny, n_ctx=64, seconds=None, max_rounds=3, reference_logits=kept)
    with pytest.raises(ValueError, match="all windows"):
        score_held_out([small], tiny, reference_logits=kept)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read two sequences, and two windows per domain at a gate."""
    monkeypatch.setattr(schedule_module, "SIZES", ((2, 2),))
    monkeypatch.setattr(schedule_module, "LEAST_FOR_FEEDBACK", 1)


@pytest.mark.usefixtures("quick")
def test_auto_gates_each_step_keeps_what_it_measured_and_uses_it_again(
    tiny: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    shown = ShownStages()
    made = ramgguf.quantize(
        tiny, "45%", tmp_path / "auto.gguf", announce=said.append, progress=shown
    )
    assert ("calibrate", "gate", "error feedback") in shown.stages
    assert ("measure", "quantize") in shown.stages
    assert shown.stages[-1] == ("verify",)
    assert made.n_bytes <= made.plan.budget
    assert made.worst_departure is not None
    assert said[0].startswith("measured here: ")
    assert said[1].startswith("effort auto: 4 steps, about")
    notes = [n for n in made.plan.notes if n.startswith("effort auto: ")]
    assert [n.split(": ")[1] for n in notes] == [
        "importance matrix", "error feedback", "massive activations", "quantized inputs",
    ]  # fmt: skip
    assert "held-out windows" in notes[0]
    assert "no tensor needs more" in notes[2]
    kept = {p.name.split(".", 1)[1] for p in (tmp_path / "tiny-f16.effort").iterdir()}
    assert {"imatrix.gguf", "hessian.gguf", "massive.json"} <= kept
    assert not list(tmp_path.glob("ramgguf-scratch-*"))
    said.clear()
    ramgguf.quantize(tiny, "50%", tmp_path / "other.gguf", effort="auto", announce=said.append)
    taken = [Path(line.removeprefix("taking ")) for line in said if line.startswith("taking ")]
    # The Hessians serve where the gate takes the matrix that they belong to.
    names = {path.name.split(".", 1)[1] for path in taken}
    assert {"imatrix.gguf", "massive.json"} <= names <= kept


@pytest.fixture
def always_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate takes every candidate."""

    def judged(before: HeldOutScore, after: HeldOutScore) -> Any:
        return replace(judge(before, after), ratio=0.5, worse=())

    monkeypatch.setattr(gate_module, "judge", judged)


@pytest.mark.usefixtures("quick", "always_taken")
def test_the_matrix_brings_scales_which_all_later_steps_use_and_the_next_run_takes(
    tiny: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", announce=said.append)
    (scales,) = (tmp_path / "tiny-f16.effort").glob("*.scales.gguf")
    assert made.plan.imatrix is not None
    assert made.plan.imatrix.scales_path == str(scales)
    assert made.worst_departure is not None
    assert made.worst_departure < 1e-3
    assert any("importance matrix: " in line and ", and scales" in line for line in said)
    said.clear()
    ramgguf.quantize(tiny, "50%", tmp_path / "b.gguf", announce=said.append)
    assert f"taking {scales}" in said


@pytest.mark.usefixtures("quick", "always_taken")
def test_the_last_step_rounds_layer_by_layer_and_a_killed_one_is_gone_on_with(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, requests = Child.ask, list[object]()

    def until_layer_one(self: Child, request: Any, expected: Any) -> Any:
        requests.append(request)
        if isinstance(request, RoundLayer) and request.layer == 1:
            raise KeyboardInterrupt
        return ask(self, request, expected)

    monkeypatch.setattr(Child, "ask", until_layer_one)
    out, folder = tmp_path / "a.gguf", tmp_path / "tiny-f16.effort"
    with pytest.raises(KeyboardInterrupt):
        ramgguf.quantize(tiny, "45%", out)
    assert len(list(folder.glob("*.layers.partial.gguf*"))) == 2
    assert not out.exists()

    def counted(self: Child, request: Any, expected: Any) -> Any:
        requests.append(request)
        return ask(self, request, expected)

    monkeypatch.setattr(Child, "ask", counted)
    requests.clear()
    shown = ShownStages()
    made = ramgguf.quantize(tiny, "45%", out, progress=shown)
    assert [r.layer for r in requests if isinstance(r, SkipLayer)] == [0]
    assert [r.layer for r in requests if isinstance(r, RoundLayer)] == [1]
    assert ("layers", "gate", "verify") in shown.stages
    assert made.plan.quantized_inputs is not None
    assert made.plan.quantized_inputs.n_sequences == 2
    assert "quantized inputs: taken" in made.plan.notes[-1]
    assert made.worst_departure is not None
    assert made.worst_departure < 1e-9
    assert made.measurement is not None
    assert not list(folder.glob("*.partial*"))
    with open_gguf(out) as file:
        assert file.metadata.string("ramgguf.plan_sha256") == made.plan.sha256()


@pytest.mark.usefixtures("quick", "always_taken")
def test_layers_that_llama_cpp_cannot_run_alone_leave_the_file_as_it_was(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_inputs_module, "_WORKER", "crashing_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf")
    assert made.plan.encoder == "descent"
    assert made.plan.quantized_inputs is None
    assert made.plan.notes[-1].startswith(
        "effort auto: quantized inputs: left out, llama.cpp ended"
    )
    assert not list((tmp_path / "tiny-f16.effort").glob("*.partial*"))


@pytest.mark.usefixtures("quick", "always_taken")
def test_a_disk_that_is_full_in_a_step_leaves_the_file_of_the_steps_before(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    there = SimpleNamespace(**{**vars(shutil), "copyfile": full})
    monkeypatch.setattr(quantized_inputs_module, "shutil", there)
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf")
    assert made.plan.encoder == "descent"
    assert "quantized inputs: left out, [Errno 28] No space" in made.plan.notes[-1]
    assert made.paths[0].stat().st_size == made.n_bytes == made.plan.n_bytes


def test_steps_that_cannot_be_prepared_leave_the_first_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Costs:
        raise ImatrixError("probe.hessian.gguf: the disk is full")

    monkeypatch.setattr(effort_module, "measured_costs", full)
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="auto")
    assert made.plan.notes[-1].endswith(
        "ends here, with what was made so far: probe.hessian.gguf: the disk is full"
    )
    assert made.worst_departure is not None


@pytest.mark.usefixtures("quick")
def test_a_model_s_folder_that_takes_nothing_keeps_nothing_and_the_file_is_made(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny-f16.effort").write_text("no folder can be made under this name")
    (tmp_path / "out").mkdir()
    made = ramgguf.quantize(tiny, "45%", tmp_path / "out" / "a.gguf", effort="auto")
    assert any("what is measured is not kept for later runs" in n for n in made.plan.notes)
    assert any("importance matrix: " in note and "KLD ×" in note for note in made.plan.notes)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.gguf"]


def _quickly(model: Path, output: Path | None, budget: str = "45%", **options: Any) -> Any:
    """Quantize with an effort whose time allows for the first file only."""
    return ramgguf.quantize(model, budget, output, effort="auto", seconds=1e-3, **options)


def test_shards_of_an_effort_keep_to_the_budget(tiny: Path, tmp_path: Path) -> None:
    budget = tiny.stat().st_size * 45 // 100
    made = _quickly(tiny, tmp_path / "s.gguf", str(budget), split_max_bytes=20_000)
    assert len(made.paths) > 2
    assert sum(p.stat().st_size for p in made.paths) == made.n_bytes <= budget


def test_an_output_that_cannot_be_is_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "s-00001-of-00004.gguf").write_bytes(b"older")
    for output, said, options in (
        (tiny, "is an input of this command", {"force": True}),
        (tmp_path / "none" / "o.gguf", "there is no folder", {}),
        (tmp_path / "s.gguf", "s-00001-of-00004.gguf: exists", {"split_max_bytes": 20_000}),
    ):
        lines: list[str] = []
        with pytest.raises(GGUFError, match=said):
            _quickly(tiny, output, announce=lines.append, **options)
        assert lines == []
    assert not list(tmp_path.glob("*scratch*"))


def test_a_default_name_that_is_taken_gets_a_number(tiny: Path, tmp_path: Path) -> None:
    first, second, third = (_quickly(tiny, None) for _ in range(3))
    names = [made.paths[0].name for made in (first, second, third)]
    stem = names[0].removesuffix(".gguf")
    assert names == [f"{stem}.gguf", f"{stem}-2.gguf", f"{stem}-3.gguf"]
    assert _quickly(tiny, None, force=True).paths == first.paths


@pytest.mark.parametrize("effort", ["fast", "auto"])
def test_a_link_to_an_output_stays_and_its_file_is_replaced(
    tiny: Path, tmp_path: Path, effort: Effort
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        target = Path(elsewhere) / "t.gguf"
        target.write_bytes(b"older")
        target.chmod(0o600)
        link = tmp_path / "link.gguf"
        link.symlink_to(target)
        seconds = 1e-3 if effort == "auto" else None
        made = ramgguf.quantize(tiny, "45%", link, effort=effort, seconds=seconds, force=True)
        assert link.is_symlink()
        assert target.stat().st_size == made.n_bytes
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        assert list(Path(elsewhere).iterdir()) == [target]


def test_a_file_that_came_into_being_meanwhile_is_not_replaced(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, verified = tmp_path / "o.gguf", placing_module.verified

    def meanwhile(*arguments: Any) -> float:
        output.write_bytes(b"another run's")
        return verified(*arguments)

    monkeypatch.setattr(placing_module, "verified", meanwhile)
    with pytest.raises(GGUFError, match="exists; use --force"):
        _quickly(tiny, output)
    assert output.read_bytes() == b"another run's"


@pytest.mark.usefixtures("quick", "always_taken")
def test_error_feedback_that_was_killed_is_gone_on_with(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "CHUNK_WEIGHTS", 4096)
    monkeypatch.setattr(parallel, "BATCH_RUNS", 1)
    counts: list[int] = []
    add, begun = KeptBlocks.add, KeptBlocks.begun

    def add_three(self: KeptBlocks, *args: Any) -> None:
        add(self, *args)
        counts.append(1)
        if len(counts) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptBlocks, "add", add_three)
    out = tmp_path / "a.gguf"
    with pytest.raises(KeyboardInterrupt):
        ramgguf.quantize(tiny, "45%", out, threads=1)
    folder = tmp_path / "tiny-f16.effort"
    assert len(list(folder.glob("*.blocks.partial"))) == 1
    assert not out.exists()
    restored: list[int] = []

    def counted(self: KeptBlocks) -> Any:
        for one in begun(self):
            restored.append(1)
            yield one

    monkeypatch.setattr(KeptBlocks, "begun", counted)
    made = ramgguf.quantize(tiny, "45%", out, threads=1)
    assert made.plan.encoder in ("gptq", "descent")
    assert len(restored) == 3
    assert not list(folder.glob("*.blocks.partial"))
    assert made.worst_departure is not None
    assert made.worst_departure < 1e-3


@pytest.mark.usefixtures("quick", "always_taken")
def test_a_model_that_computes_something_else_with_scales_gets_none(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_module, "EXACT", -1.0)
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf")
    assert made.plan.imatrix is not None
    assert made.plan.imatrix.scales_path is None
    assert made.plan.encoder == "descent"
    assert any(
        "scales: left out, " in n and "computes something else" in n for n in made.plan.notes
    )
    assert not list((tmp_path / "tiny-f16.effort").glob("*.scales.gguf"))


@pytest.mark.usefixtures("quick")
def test_a_disk_without_room_for_the_references_logits_has_gates_that_read_the_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[list[Path]] = []

    def seen(paths: list[Path], **options: Any) -> Engine:
        opened.append(paths)
        return Engine(paths, **options)

    monkeypatch.setattr(held_out, "Engine", seen)
    monkeypatch.setattr(effort_module, "free_bytes", lambda _: 1000)
    made = ramgguf.quantize(tiny, "45%", tmp_path / "auto.gguf", effort="auto")
    assert any("held-out windows" in note for note in made.plan.notes)
    timed, *gates = opened
    assert len(timed) == 1
    assert gates
    assert all(paths[0] == tiny and len(paths) > 1 for paths in gates)


@pytest.mark.usefixtures("quick")
def test_a_step_that_would_end_late_is_left_out_and_the_log_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine gets slow after it was measured: the clock leaps while the matrix is made."""
    leaps = [0.0]

    def calibrated(run: effort_module.EffortRun, imatrix: Path, hessian: Path | None) -> None:
        leaps[0] += 400.0
        original(run, imatrix, hessian)

    original = effort_module.EffortRun._calibrated
    monkeypatch.setattr(effort_module.EffortRun, "_calibrated", calibrated)
    monkeypatch.setattr(effort_module, "clock", lambda: leaps[0])
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="auto")
    late = [note for note in made.plan.notes if "are spent" in note]
    assert len(late) == 3
    assert "error feedback: left out, 6 min 40 s of 5 min 0 s are spent" in late[0]
    assert "massive activations: left out, 6 min 40 s of 5 min 0 s are spent" in late[1]


def test_a_run_that_was_killed_leaves_what_it_measured_to_the_next(
    tiny: Path, tmp_path: Path
) -> None:
    script = (
        "import sys\n"
        "from ramgguf.quantize import schedule\n"
        "schedule.SIZES = ((2, 2),)\n"
        "from ramgguf.cli import main\n"
        "main()\n"
    )
    out, cache = tmp_path / "out.gguf", tmp_path / "tiny-f16.effort"
    arguments = ["quantize", str(tiny), "--budget", "45%", "-o", str(out), "--no-score", "-t", "1"]
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while not list(cache.glob("*.imatrix.gguf")):
            assert child.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        child.kill()
    assert not out.exists()
    assert list(tmp_path.glob("ramgguf-scratch-*"))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    (matrix,) = cache.glob("*.imatrix.gguf")
    assert f"taking {matrix}" in again.stderr
    assert out.exists()
    assert not list(tmp_path.glob("ramgguf-scratch-*"))


def test_a_model_that_llama_cpp_cannot_run_is_quantized_all_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Costs:
        raise EngineError("unknown architecture")

    monkeypatch.setattr(effort_module, "measured_costs", refuse)
    said: list[str] = []
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="auto", announce=said.append)
    fast = ramgguf.quantize(tiny, "45%", tmp_path / "b.gguf", effort="fast")
    assert made.paths[0].read_bytes() == fast.paths[0].read_bytes()
    assert any("unknown architecture" in line for line in said)


def test_a_model_that_does_not_fit_the_memory_is_not_decoded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Available(1000, "a test")
    monkeypatch.setattr(effort_module, "available_memory", lambda: few)
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="auto")
    assert any("1.00 kB are free" in note for note in made.plan.notes)


@pytest.mark.usefixtures("quick")
def test_a_model_that_does_not_fit_the_memory_has_its_passes_on_a_stand_in(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for the stand-in and a candidate, and for what is beside them, and no more."""
    monkeypatch.setattr(schedule_module, "SENSITIVITY_SECONDS", 1.0)
    with open_gguf(tiny) as file:
        stand_in = stand_in_layout(file, "Q8_0", Path("x")).n_bytes
        candidate = ramgguf.quantize(tiny, "45%", tmp_path / "fast.gguf", effort="fast").n_bytes
        room = Available(stand_in + candidate + BESIDE_BYTES, "a test")
        assert room.n_bytes < file.n_bytes + candidate + BESIDE_BYTES
    for module in (effort_module, stand_in_module):
        monkeypatch.setattr(module, "available_memory", lambda: room)
    opened: list[Path] = []

    def open_models(self: Engine, models: list[Path], **options: Any) -> None:
        opened.extend(models)
        original(self, models, **options)

    original = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", open_models)
    said: list[str] = []
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="best", announce=said.append)
    (told,) = (note for note in made.plan.notes if "stand-in in Q8_0" in note)
    assert told.endswith("are available; gates compare with it")
    assert any("importance matrix: " in note and "KLD" in note for note in made.plan.notes)
    assert any("swaps: left out" in line for line in said)
    assert any("sensitivities: left out, they run on the model" in line for line in said)
    assert opened
    assert tiny not in opened
    (matrix,) = (tmp_path / "tiny-f16.effort").glob("*.imatrix.gguf")
    assert "on a stand-in in Q8_0" in load_imatrix(matrix).datasets[0]
    assert not list((tmp_path / "tiny-f16.effort").glob("*.sens.json"))


def test_where_the_memory_is_unknown_it_is_not_required(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untold() -> Available:
        raise BudgetError("this system does not tell")

    def probe(*_: object, **_options: object) -> Costs:
        raise EngineError("it got to the probe")

    for module in (effort_module, stand_in_module):
        monkeypatch.setattr(module, "available_memory", untold)
    monkeypatch.setattr(effort_module, "measured_costs", probe)
    made = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="auto")
    assert any("it got to the probe" in note for note in made.plan.notes)


def test_the_default_effort_is_auto_and_explicit_steps_or_a_time_decide_otherwise() -> None:
    assert default_effort(is_explicit=False, has_time=False) == "auto"
    assert default_effort(is_explicit=True, has_time=False) == "fast"
    assert default_effort(is_explicit=False, has_time=True) == "best"


def test_without_llama_cpp_auto_is_fast_and_says_in_one_line_what_is_missed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort_module, "llama_installed", lambda: False)
    said: list[str] = []
    ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="auto", announce=said.append)
    (line,) = said
    assert "pip install 'ramgguf[eval]'" in line


def test_a_file_that_holds_the_source_exactly_has_no_steps(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made = ramgguf.quantize(
        tiny, "1000%", tmp_path / "out.gguf", effort="auto", threads=1, announce=said.append
    )
    assert made.plan.total_cost == 0
    assert said == ["nothing to improve: the file holds every weight of the source"]
    assert f"effort auto: {said[0]}" in made.plan.notes


def test_what_does_not_fit_the_time_is_left_out_and_said(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    ramgguf.quantize(
        tiny, "45%", tmp_path / "a.gguf", effort="auto", seconds=0.01, announce=said.append
    )
    assert any("importance matrix: left out" in line for line in said)


def test_reading_and_rounding_take_time_here(tiny: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with open_gguf(tiny) as file:
        found = measured_costs(file, scratch, 0.5, tiny, "mix", 1)
    assert found.write == 0.5
    assert found.read > 0  # or all sequences of the schedule would be free
    assert found.gram >= 0
    assert found.feedback > 0
    assert found.descent > 0
    assert found.hessian_bytes > 0
    assert not list(scratch.iterdir())


def test_a_shorter_gate_reads_the_logits_that_a_longer_one_has_kept(
    tiny: Path, tmp_path: Path
) -> None:
    small = ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="fast").paths[0]
    kept = tmp_path / "kept.logits"
    (longer,) = score_held_out(
        [small], tiny, n_ctx=64, seconds=None, max_rounds=2, reference_logits=kept
    )
    (shorter,) = score_held_out(
        [small], tiny, n_ctx=64, seconds=None, max_rounds=1, reference_logits=kept
    )
    assert len(longer.windows) == 2 * len(shorter.windows) > 0
    assert longer.windows[: len(shorter.windows)] == shorter.windows
    assert judge(longer, shorter).n_windows == len(shorter.windows)


def test_candidates_that_are_slower_than_the_source_are_decoded_for_their_gates(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def score(paths: Sequence[Path], *args: Any, **options: Any) -> tuple[HeldOutScore, ...]:
        read.extend(paths)
        with open_gguf(paths[0]) as file:
            assert {t.type_name for t in file.tensors} <= {"F16", "F32"}
        return score_held_out(paths, *args, **options)

    def slow(path: Path, **options: Any) -> float:
        return 1e-3 if path == tiny else 1e3

    monkeypatch.setattr(step_costs_module, "window_seconds", slow)
    monkeypatch.setattr(gate_module, "score_held_out", score)
    said: list[str] = []
    made = ramgguf.quantize(
        tiny, "45%", tmp_path / "a.gguf", effort="auto", seconds=60, announce=said.append
    )
    assert any("decoded, as its formats are slower" in line for line in said)
    assert read
    assert all(path.name.endswith(".decoded.gguf") for path in read)
    with open_gguf(made.paths[0]) as file:
        assert not {t.type_name for t in file.tensors} <= {"F16", "F32"}
    assert {p.name for p in tmp_path.iterdir()} == {"a.gguf", tiny.name, "tiny-f16.effort"}


def test_writing_the_first_file_and_probing_count_towards_the_time(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, limits = [0.0], list[float]()

    def slowed(original: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            now[0] += seconds
            return original(*args, **options)

        return call

    def planned(effort: Effort, limit: float, *_: object) -> Schedule:
        limits.append(limit)
        return Schedule()

    monkeypatch.setattr(effort_module, "clock", lambda: now[0])
    monkeypatch.setattr(
        effort_module.EffortRun, "_once", slowed(effort_module.EffortRun._once, 3.0)
    )
    monkeypatch.setattr(effort_module, "measured_costs", slowed(measured_costs, 2.5))
    monkeypatch.setattr(effort_module, "schedule", planned)
    ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="auto", seconds=10.0)
    assert limits == [4.5]


@pytest.mark.parametrize(("write", "limit"), [(3.0, 300.0), (400.0, 800.0)])
def test_auto_takes_five_minutes_or_twice_what_writing_takes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: float, limit: float
) -> None:
    now, limits = [0.0], list[float]()
    once = effort_module.EffortRun._once

    def slow(*args: Any, **options: Any) -> Any:
        now[0] += write
        return once(*args, **options)

    def planned(effort: Effort, seconds: float, *_: object) -> Schedule:
        limits.append(seconds)
        return Schedule()

    monkeypatch.setattr(effort_module, "clock", lambda: now[0])
    monkeypatch.setattr(effort_module.EffortRun, "_once", slow)
    monkeypatch.setattr(effort_module, "schedule", planned)
    ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="auto")
    assert limits == [limit]


@pytest.mark.usefixtures("quick", "always_taken")
def test_sensitivities_serve_the_next_budget_under_the_same_matrix_only(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_module, "SENSITIVITY_SECONDS", 1.0)
    said: list[str] = []
    for name, budget in (("a", "45%"), ("b", "50%")):
        said.clear()
        ramgguf.quantize(
            tiny, budget, tmp_path / f"{name}.gguf", effort="best", threads=1, announce=said.append
        )
    with open_gguf(tiny) as file:
        cache = StepCache.of(file, tiny, "mix")
    assert f"taking {cache.sensitivity_path}" in said
    assert cache.sensitivity(2) is not None
    assert cache.sensitivity(None) is None  # they were measured under the matrix


def test_an_explicit_step_and_an_effort_that_decides_exclude_each_other(tiny: Path) -> None:
    with pytest.raises(PlanError, match="refine was given"):
        ramgguf.quantize(tiny, "45%", effort="auto", refine=3)
    run = CliRunner().invoke
    base = ["quantize", str(tiny), "--budget", "45%"]
    assert run(app, [*base, "--effort", "auto", "--calibrate", "self"]).exit_code == 2
    assert run(app, [*base, "--effort", "fast", "--time", "20m"]).exit_code == 2
    assert run(app, [*base, "--imatrix", "i.gguf", "--time", "20m"]).exit_code == 2
    with pytest.raises(PlanError, match="seconds are for auto and best"):
        ramgguf.quantize(tiny, "45%", effort="fast", seconds=60)
    assert run(app, [*base, "--effort", "slow"]).exit_code == 2


def test_quantize_ends_with_what_was_measured(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    asked = [
        "quantize",
        str(tiny),
        "--budget",
        "45%",
        "-o",
        str(out),
        "--score",
        "--effort",
        "fast",
    ]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    assert "measured against the source on" in found.output
    assert "languages" in found.output
    again = [
        "quantize", str(tiny), "--budget", "45%", "-o", str(out), "--force", "--no-score",
        "--effort", "fast",
    ]  # fmt: skip
    assert "measured against" not in CliRunner().invoke(app, again).output


@pytest.mark.usefixtures("quick")
def test_a_matrix_that_a_killed_run_has_begun_is_gone_on_with(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time allows two sequences now; the run that was killed had begun with three."""
    with open_gguf(tiny) as file:
        cache = StepCache.of(file, tiny, "mix")
    for n in (3, 9):
        cache.partial(n).mkdir()
    assert [cache.begun(n) for n in (1, 2, 3, 4, 6, 7)] == [1, 3, 3, 3, 9, 9]
    asked: list[Any] = []

    def calibrated(*arguments: Any, **options: Any) -> Calibration:
        asked.append(options)
        return replace(ramgguf.calibrate(*arguments, **options), n_resumed=512)

    monkeypatch.setattr(effort_module, "calibrate", calibrated)
    said: list[str] = []
    ramgguf.quantize(tiny, "45%", tmp_path / "a.gguf", effort="auto", announce=said.append)
    assert (asked[0]["n_sequences"], asked[0]["partial"]) == (3, cache.partial(3))
    assert "a run that was killed had read 512 of its tokens" in said
    assert cache.matrix(3).exists()
    assert not list(cache.folder.glob("*.partial"))
    assert cache.begun(3) == 3
