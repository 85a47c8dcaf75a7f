"""Memory: what is planned is what llama.cpp really allocates, and plans fit it."""

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from typer.testing import CliRunner

import ramgguf
import tiny_models
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError, EngineError, PlanError
from ramgguf.core.units import parse_size
from ramgguf.deploy import MemoryLimit, MemoryRequest
from ramgguf.deploy.division_rooms import DivisionRooms
from ramgguf.deploy.footprint import CACHE_TYPES, Footprint, FootprintEstimator, parse_cache_types
from ramgguf.deploy.footprint_formula import ContextShape, cache_bytes, compute_bytes
from ramgguf.deploy.offload import place
from ramgguf.gguf.reader import open_gguf
from ramgguf.gguf.stub_model import stub_model
from ramgguf.llama.child import Child, ChildDiedError
from ramgguf.llama.sizes import Sizes, SizesOf
from ramgguf.measure.result import Measurement
from ramgguf.plan import PlanOptions, everything, plan
from ramgguf.plan.result import Division, MemoryUse, Plan
from ramgguf.report.memory import remarks
from small_models import (
    ARCHITECTURES,
    ATTENTION,
    DENSE,
    HEAD,
    TIED,
    UNTIED,
    WIDTH,
    Architecture,
    _common,
    _weights,
    planned_types,
    write_small_model,
)

pytest.importorskip("llama_cpp")


def _windowed(out: GGUFWriter) -> None:
    """Every second layer attends to everything, the others to 512 tokens."""
    _common(out)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)
    out.add_sliding_window(512)


_NORMS = _weights(post_attention_norm=(WIDTH,), post_ffw_norm=(WIDTH,))
WINDOWED = Architecture("gemma2", _windowed, lambda _: ATTENTION | DENSE | _NORMS, TIED)
SHAPES = (
    ContextShape(4096),
    ContextShape(1000, 1, "Q8_0", "Q8_0"),
    ContextShape(3000, 3, "Q8_0", "Q8_0"),
    ContextShape(2048, 2, "BF16", "BF16"),
)


@pytest.fixture(scope="module")
def sizer() -> Iterator[Child]:
    with Child("ramgguf.llama.sizes") as child:
        yield child


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    return write_small_model(folder / "llama.gguf", ARCHITECTURES[0])


@pytest.fixture(scope="module")
def measurement(llama: Path) -> Measurement:
    return ramgguf.measure(llama, threads=1)


def _really(sizer: Child, path: Path, shape: ContextShape) -> Sizes:
    """Return what llama.cpp takes when it loads the weights and allocates all buffers."""
    return sizer.ask(
        SizesOf(
            path=str(path),
            n_ctx=shape.n_ctx * shape.n_seq,
            n_seq=shape.n_seq,
            type_k=shape.type_k,
            type_v=shape.type_v,
            real=True,
        ),
        Sizes,
    )


def _shapes(architecture: Architecture) -> list[ContextShape]:
    """Return the contexts to try: llama.cpp's graph of T5 aborts with more than one sequence."""
    return [s for s in SHAPES if s.n_seq == 1 or not architecture.has_encoder]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, WINDOWED], ids=lambda a: a.name)
def test_planned_sizes_are_what_llama_cpp_allocates(
    architecture: Architecture, sizer: Child, tmp_path: Path
) -> None:
    source = write_small_model(tmp_path / "source.gguf", architecture)
    target = tmp_path / "target.gguf"
    types = planned_types(source, target)
    with open_gguf(source) as file, FootprintEstimator(file) as scale:
        for shape in _shapes(architecture):
            planned, real = scale.footprint(shape, types), _really(sizer, target, shape)
            assert planned.method == "llama.cpp"
            assert planned.use.weights == pytest.approx(real.weights, rel=0.02)
            assert planned.use.cache == pytest.approx(real.cache, rel=0.02)
            assert planned.compute == pytest.approx(real.compute, rel=0.02)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, WINDOWED], ids=lambda a: a.name)
def test_the_formula_knows_the_cache_and_roughly_the_graph(
    architecture: Architecture, sizer: Child, tmp_path: Path
) -> None:
    path = write_small_model(tmp_path / "model.gguf", architecture)
    with open_gguf(path) as file:
        for shape in _shapes(architecture):
            real = _really(sizer, path, shape)
            assert sum(cache_bytes(file, shape)) == pytest.approx(real.cache, rel=0.02)
            assert 0.6 < compute_bytes(file, shape) / real.compute < 1.8


def _fitted(measurement: Measurement, shape: ContextShape, limit: int) -> Plan:
    return plan(measurement, MemoryLimit(MemoryRequest(shape, limit)), min_sqnr_db=0)


def _limit(path: Path, shape: ContextShape, n_bytes: int) -> int:
    """Return the memory that leaves n_bytes for the weights."""
    with open_gguf(path) as file, FootprintEstimator(file) as scale:
        use = scale.footprint(shape, {}).use
    return use.total - use.weights + n_bytes


def test_a_stub_model_takes_no_disk_and_is_as_long_as_the_real_one(llama: Path) -> None:
    with open_gguf(llama) as file, stub_model(file, {"token_embd.weight": "Q4_0"}) as path:
        status = path.stat()
        embedding = file.tensor("token_embd.weight")
        assert status.st_size < file.n_bytes - embedding.n_bytes // 2
        assert 512 * status.st_blocks < status.st_size // 4
        with open_gguf(path) as stub:
            assert stub.tensor("token_embd.weight").type_name == "Q4_0"
    assert not path.exists()


@pytest.mark.parametrize("shape", [ContextShape(4096), ContextShape(2000, 3, "Q8_0", "Q8_0")])
def test_a_plan_uses_the_memory_it_is_given_and_no_more(
    shape: ContextShape, llama: Path, measurement: Measurement, tmp_path: Path
) -> None:
    limit = _limit(llama, shape, 1_300_000)
    made = _fitted(measurement, shape, limit)
    assert made.memory is not None
    assert made.memory.method == "llama.cpp"
    assert limit - 20_000 < made.memory.ram.total <= limit
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json").memory
    assert loaded == made.memory
    assert (loaded.n_ctx, loaded.n_seq, loaded.type_k) == (shape.n_ctx, shape.n_seq, shape.type_k)


def test_a_longer_context_leaves_less_and_a_smaller_cache_more(
    llama: Path, measurement: Measurement
) -> None:
    limit = _limit(llama, ContextShape(4096), 1_500_000)

    def n_bytes(shape: ContextShape) -> int:
        return _fitted(measurement, shape, limit).n_bytes

    plain = n_bytes(ContextShape(4096))
    assert n_bytes(ContextShape(4352)) < plain < n_bytes(ContextShape(4096, 1, "Q8_0", "Q8_0"))


def test_a_budget_caps_what_memory_leaves(llama: Path, measurement: Measurement) -> None:
    request = MemoryRequest(ContextShape(512), 10**9)
    made = plan(measurement, MemoryLimit(request, 1_200_000), min_sqnr_db=0)
    assert made.n_bytes <= made.budget == 1_200_000


def test_a_context_that_is_too_long_is_refused_with_the_longest_that_fits(
    llama: Path, measurement: Measurement
) -> None:
    limit = _limit(llama, ContextShape(6000), 1_000_000)
    with pytest.raises(BudgetError, match="largest context that fits is") as caught:
        plan(measurement, MemoryLimit(MemoryRequest(ContextShape(50_000), limit)), min_sqnr_db=0)
    message = str(caught.value)
    assert "--cache-type q8_0 saves" in message
    assert "raise the memory to at least" in message
    longest = int(message.partition("context that fits is ")[2].partition(";")[0])
    assert 4096 < longest < 8192


def test_the_longest_context_named_fits_and_the_next_one_does_not(
    llama: Path, measurement: Measurement
) -> None:
    options = PlanOptions(min_sqnr_db=0, pins=["weight=Q2_K"])
    smallest = plan(measurement, "100%", **options).n_bytes
    limit = _limit(llama, ContextShape(4096), smallest - 100_000)
    with pytest.raises(BudgetError, match="and the smallest plan is") as caught:
        plan(measurement, MemoryLimit(MemoryRequest(ContextShape(4096), limit)), **options)
    longest = int(str(caught.value).partition("context that fits is ")[2].partition(";")[0])
    assert plan(
        measurement, MemoryLimit(MemoryRequest(ContextShape(longest), limit)), **options
    ).memory
    with pytest.raises(BudgetError):
        plan(measurement, MemoryLimit(MemoryRequest(ContextShape(longest + 256), limit)), **options)


def test_what_is_advised_works_where_the_cpu_takes_a_tied_head_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of the CPU keep a copy of a quantized head in another layout, of F16 none."""
    for name, value in (("WIDTH", 256), ("FEED_FORWARD", 512), ("N_HEADS", 4)):
        monkeypatch.setattr(tiny_models, name, value)
    add = GGUFWriter.add_tensor

    def all_but_the_head(self: GGUFWriter, name: str, *more: Any, **named: Any) -> None:
        if name != "output.weight":
            add(self, name, *more, **named)

    monkeypatch.setattr(GGUFWriter, "add_tensor", all_but_the_head)
    path = tiny_models.write_tiny_model(
        tmp_path / "tied.gguf", weight_type="F16", extra_tokens=30004
    )
    measured = ramgguf.measure(path, formats=["Q4_0"], threads=1)

    def planned(n_ctx: int, limit: int) -> Plan:
        return plan(measured, MemoryLimit(MemoryRequest(ContextShape(n_ctx), limit)), min_sqnr_db=0)

    with pytest.raises(BudgetError) as smallest:
        plan(measured, 1, min_sqnr_db=0)
    limit = _limit(path, ContextShape(3500), smallest.value.smallest or 0)
    with pytest.raises(BudgetError) as caught:
        planned(4096, limit)
    said = str(caught.value)
    longest = int(said.partition("context that fits is ")[2].partition(";")[0])
    assert planned(longest, limit).memory
    with pytest.raises(BudgetError):
        planned(longest + 512, limit)
    enough = parse_size(said.partition("memory to at least ")[2].partition(";")[0])
    assert planned(4096, enough).memory
    with pytest.raises(BudgetError):
        planned(4096, int(0.985 * enough))


def test_what_llama_cpp_cannot_load_is_estimated_and_says_so(tmp_path: Path) -> None:
    architecture = ARCHITECTURES[0]
    unknown = Architecture("llamoid", architecture.describe, architecture.layer, UNTIED)
    path = write_small_model(tmp_path / "unknown.gguf", unknown)
    with open_gguf(path) as file, FootprintEstimator(file) as scale:
        footprint = scale.footprint(ContextShape(4096), {})
    assert footprint.method == "estimate"
    assert footprint.why_estimate == "stub.gguf: llama.cpp cannot load it"
    assert footprint.use.cache == 4096 * 2 * 2 * 2 * 128


def test_cache_types_that_llama_cpp_refuses_are_errors(tmp_path: Path) -> None:
    deepseek = next(a for a in ARCHITECTURES if a.name == "deepseek2")
    path = write_small_model(tmp_path / "mla.gguf", deepseek)
    with (
        open_gguf(path) as file,
        FootprintEstimator(file) as scale,
        pytest.raises(BudgetError, match="Q8_0 and Q4_0, though one of F16 would do"),
    ):
        scale.footprint(ContextShape(512, 1, "Q8_0", "Q4_0"), {})


def test_cache_types_are_one_or_two_of_those_llama_cpp_has() -> None:
    assert parse_cache_types("q8_0") == ("Q8_0", "Q8_0")
    assert parse_cache_types("q8_0, f16") == ("Q8_0", "F16")
    for bad in ("q4_k", "", "f16,f16,f16"):
        with pytest.raises(BudgetError, match="cache type"):
            parse_cache_types(bad)
    assert len(CACHE_TYPES) == 9


FOOTPRINT = Footprint(
    shape=ContextShape(1000),
    layer_weights=(100, 200, 300),
    layer_cache=(10, 0, 30),
    input_weights=50,
    output_weights=5,
    output_copy=50,
    compute=7,
    overhead=9,
    method="estimate",
)


def _division(n_gpu_layers: int) -> Division:
    return Division(n_gpu_layers=n_gpu_layers)


def test_layers_go_to_the_gpu_from_the_last_with_their_cache() -> None:
    assert place(FOOTPRINT, _division(0)).ram == FOOTPRINT.use
    assert place(FOOTPRINT, _division(0)).vram == MemoryUse()
    one = place(FOOTPRINT, _division(1))
    assert (one.vram.weights, one.vram.cache) == (5 + 50, 0)  # the output layer
    two = place(FOOTPRINT, _division(2))
    assert (two.vram.weights, two.vram.cache) == (5 + 50 + 300, 30)
    assert (two.ram.weights, two.ram.cache) == (50 + 100 + 200, 10)


def test_tied_embeddings_count_twice_when_everything_is_offloaded() -> None:
    placed = place(FOOTPRINT, _division(99))
    assert placed.division.n_gpu_layers == everything(FOOTPRINT.n_layers) == 4
    assert placed.ram.weights + placed.vram.weights == FOOTPRINT.use.weights + 50
    assert placed.ram.weights == 50


def test_a_plan_for_ram_and_gpu_fits_both(llama: Path, measurement: Measurement) -> None:
    shape = ContextShape(1024)
    for ngl in (None, 2):
        request = MemoryRequest(
            shape, _limit(llama, shape, 1_700_000), vram=508_500_000, n_gpu_layers=ngl
        )
        memory = plan(measurement, MemoryLimit(request), min_sqnr_db=0).memory
        assert memory is not None
        assert memory.vram is not None
        assert memory.vram_limit is not None
        assert memory.limit is not None
        assert memory.ram.total <= memory.limit
        assert memory.vram.total <= memory.vram_limit
        assert memory.n_gpu_layers is not None
        assert memory.n_gpu_layers > 0


def test_the_options_of_the_division_are_printed_and_those_of_old_plans_too(
    llama: Path, measurement: Measurement
) -> None:
    shape = ContextShape(1024)
    request = MemoryRequest(shape, _limit(llama, shape, 1_700_000), vram=508_500_000)
    made = plan(measurement, MemoryLimit(request), min_sqnr_db=0)
    assert made.division is not None
    assert made.memory is not None
    assert made.budget == made.n_bytes
    told = remarks(made.memory, made.division)
    assert told[0].endswith(f"-c 1024 -ngl {made.division.n_gpu_layers}")
    assert "the GPU's part is an estimate, not measured on a GPU" in told
    written = json.loads(made.to_json())
    assert written["division"]["n_gpu_layers"] == made.division.n_gpu_layers
    written["schema"] = "ramgguf.plan/2"
    written["split"] = written.pop("division")
    assert Plan.from_json(json.dumps(written)) == made
    del written["split"]  # as files were before that
    old = Plan.from_json(json.dumps(written))
    assert old.memory is not None
    assert remarks(old.memory, old.division) == told
    nothing = old.memory.model_copy(update={"n_gpu_layers": 0})
    assert remarks(nothing, None)[0].endswith("-ngl 0 --device none")


def test_with_all_layers_on_the_gpu_experts_may_still_stay_in_ram(tmp_path: Path) -> None:
    moe = next(a for a in ARCHITECTURES if a.name == "qwen3moe")
    path = write_small_model(tmp_path / "moe.gguf", moe)
    with open_gguf(path) as file, FootprintEstimator(file) as estimator:
        footprint = estimator.footprint(ContextShape(512), {})
        both = {"ram": 10**9, "vram": 10**9}
        for limits, n, expected in (
            (both, 99, [(3, 0), (3, 1), (3, 2)]),
            (both, 2, [(2, 0)]),
            ({**both, "ram": None}, None, [(3, 0)]),
            ({**both, "vram": None}, None, [(0, 0)]),
            (both, None, [(3, 0), (3, 1), (3, 2), (2, 0), (1, 0), (0, 0)]),
        ):
            request = MemoryRequest(ContextShape(512), **limits, n_gpu_layers=n)
            found = DivisionRooms(file, request).divisions(footprint)
            assert [(s.n_gpu_layers, s.n_cpu_moe) for s in found] == expected


def test_formats_of_the_cpu_s_side_that_do_not_fit_are_an_error_that_says_so(
    llama: Path, measurement: Measurement
) -> None:
    shape = ContextShape(1024)
    limit = _limit(llama, shape, 1_500_000)
    request = MemoryRequest(shape, limit, vram=10**9, n_gpu_layers=1, cpu_formats=("Q8_0",))
    with pytest.raises(BudgetError, match="--cpu-formats all fits"):
        plan(measurement, MemoryLimit(request), min_sqnr_db=0)
    assert plan(
        measurement, MemoryLimit(replace(request, cpu_formats=None)), min_sqnr_db=0
    ).division == Division(n_gpu_layers=1)


def test_a_frontier_with_a_gpu_says_the_division(
    llama: Path, measurement: Measurement, tmp_path: Path
) -> None:
    measurement.save(tmp_path / "m.rd.json")
    limit = _limit(llama, ContextShape(1024), 1_700_000)
    told = CliRunner().invoke(
        app,
        ["frontier", str(tmp_path / "m.rd.json"), "--min-sqnr", "0", "--memory", str(limit),
         "--vram", "508.5MB", "--context", "1024"],
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert re.search(r"llama\.cpp's options -c 1024 -ngl [1-3]\n", told.output)


def test_a_gpu_alone_takes_all_layers(measurement: Measurement) -> None:
    request = MemoryRequest(ContextShape(1024), None, vram=510_000_000)
    memory = plan(measurement, MemoryLimit(request), min_sqnr_db=0).memory
    assert memory is not None
    assert memory.vram is not None
    assert memory.n_gpu_layers == 3
    assert memory.vram.total <= 510_000_000


def test_a_model_that_was_moved_is_asked_for_and_another_one_refused(
    llama: Path, measurement: Measurement, tmp_path: Path
) -> None:
    moved = measurement.model_copy(
        update={"source": measurement.source.model_copy(update={"path": "/nowhere.gguf"})}
    )
    request = MemoryRequest(ContextShape(512), 10**9)
    with pytest.raises(PlanError, match="name it with --model"):
        plan(moved, MemoryLimit(request), min_sqnr_db=0)
    assert plan(moved, MemoryLimit(request, model=llama), min_sqnr_db=0).memory is not None
    other = write_small_model(tmp_path / "other.gguf", ARCHITECTURES[1])
    with pytest.raises(PlanError, match="is not the model that was measured"):
        plan(moved, MemoryLimit(request, model=other), min_sqnr_db=0)


def test_a_child_that_is_killed_is_an_error_that_names_the_signal(llama: Path) -> None:
    with Child("ramgguf.llama.sizes") as child:
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(ChildDiedError, match="signal SIGKILL") as caught:
            _really(child, llama, ContextShape(256))
        assert caught.value.code == -signal.SIGKILL


def test_a_failure_in_the_child_is_an_error_and_the_child_lives_on(llama: Path) -> None:
    with Child("ramgguf.llama.sizes") as child:
        with pytest.raises(EngineError, match=r"nowhere\.gguf: llama\.cpp cannot load it"):
            _really(child, Path("/nowhere.gguf"), ContextShape(256))
        assert _really(child, llama, ContextShape(256)).n_vocab == 320


def test_quantize_writes_a_file_that_fits_the_memory(llama: Path, tmp_path: Path) -> None:
    limit = _limit(llama, ContextShape(1024), 1_400_000)
    target = tmp_path / "out.gguf"
    command = ["quantize", str(llama), "-o", str(target), "--memory", str(limit), "--min-sqnr", "0"]
    done = CliRunner().invoke(
        app, [*command, "--context", "1024", "--threads", "1", "--effort", "fast"]
    )
    assert done.exit_code == 0, done.output
    for word in ("weights", "cache", "compute", "overhead", "margin", "-c 1024"):
        assert word in done.output
    assert 1_300_000 < target.stat().st_size < 1_430_000
    again = CliRunner().invoke(
        app, [*command, "--context", "1024", "--json", "--force", "--effort", "fast"]
    )
    memory = json.loads(again.stdout)["memory"]
    assert memory["limit"] == limit >= sum(memory["ram"].values())


def test_the_curve_marks_the_plan_that_fits_the_memory(
    llama: Path, measurement: Measurement, tmp_path: Path
) -> None:
    path = tmp_path / "m.rd.json"
    measurement.save(path)
    options = ["--memory", str(_limit(llama, ContextShape(1024), 1_400_000)), "--context", "1024"]
    done = CliRunner().invoke(app, ["curve", str(path), "--min-sqnr", "0", *options])
    assert done.exit_code == 0, done.output
    assert "margin" in done.output
    assert "-c 1024" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "1GB"], "--context"),
        (["--context", "100", "--budget", "1MB"], "only with --memory"),
        (["--memory", "1GB", "--fit", "--context", "9"], "either --memory or --fit"),
    ],
)
def test_options_about_memory_that_make_no_sense_are_usage_errors(
    options: list[str], message: str, llama: Path
) -> None:
    done = CliRunner().invoke(app, ["quantize", str(llama), *options])
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")
