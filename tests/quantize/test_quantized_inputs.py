"""Files rounded anew for their quantized inputs: better, of the same bytes, and resumable."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

import ramgguf
from ramgguf.core.errors import EngineError, PlanError
from ramgguf.core.progress import Silent
from ramgguf.evaluate import score_held_out
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.child import Child
from ramgguf.llama.layer_rounding_protocol import RoundLayer, SkipLayer
from ramgguf.plan.result import Plan, QuantizedInputs
from ramgguf.quantize import Quantized
from ramgguf.quantize.pipeline import NOT_CORRECTED, QuantizeOptions, as_planned, quantize_once
from ramgguf.quantize.placing import placed
from ramgguf.quantize.quantized_inputs import Rounding, rounded_layers
from ramgguf.quantize.verify import verify
from small_models import ARCHITECTURES, write_small_model
from tiny_models import write_tiny_model

INPUTS = QuantizedInputs(tokens="mix", n_sequences=15, n_ctx=128)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")


def _made(
    model: Path, *, scaled: bool = False, budget: str = "35%", allow_requantize: bool = False
) -> Quantized:
    """Return the model with error feedback from the tokens of INPUTS."""
    matrix, hessian, scales = (
        model.with_name(f"{model.stem}.{kind}.gguf") for kind in ("imatrix", "hessian", "scales")
    )
    ramgguf.calibrate(
        model, matrix, tokens=INPUTS.tokens, n_sequences=INPUTS.n_sequences, n_ctx=INPUTS.n_ctx,
        hessian=hessian, force=True,
    )  # fmt: skip
    if scaled:
        ramgguf.transform(model, scales, matrix, force=True)
    return ramgguf.quantize(
        model, budget, model.with_name(f"{model.stem}-fed.gguf"), effort="fast", encoder="gptq",
        imatrix=matrix, hessian=hessian, scales=scales if scaled else None, min_sqnr_db=0,
        allow_requantize=allow_requantize, force=True,
    )  # fmt: skip


def _rounding(model: Path) -> Rounding:
    return Rounding(INPUTS, model.with_suffix(".partial.gguf"), model.parent, 2)


def _rounded(model: Path, made: Quantized, rounding: Rounding) -> Quantized:
    """Return what was made, rounded for its quantized inputs, in a file that stays."""
    path = model.with_name(f"{model.stem}-rounded.gguf")
    with rounded_layers(model, made, rounding) as found:
        path.write_bytes(found.paths[0].read_bytes())
    assert not list(model.parent.glob("*.partial.gguf*"))
    return replace(found, paths=(path,))


def _klds(model: Path, *files: Path) -> list[float]:
    scores = score_held_out(list(files), model, n_ctx=128, max_rounds=4, seconds=None)
    return [sum(w.kld_sum for w in s.windows) / sum(w.n_tokens for w in s.windows) for s in scores]


@pytest.mark.parametrize("scaled", [False, True])
def test_the_file_loses_less_at_the_same_bytes_and_its_plan_has_its_errors(
    tiny: Path, *, scaled: bool
) -> None:
    made = _made(tiny, scaled=scaled)
    rounded = _rounded(tiny, made, _rounding(tiny))
    before, after = _klds(tiny, made.paths[0], rounded.paths[0])
    assert after < 0.85 * before
    assert rounded.n_bytes == made.n_bytes
    plan = rounded.plan
    assert plan.quantized_inputs == INPUTS
    assert plan.sha256() != made.plan.sha256()
    assert [a.format for a in plan.assignments] == [a.format for a in made.plan.assignments]
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    with open_gguf(tiny) as source, open_gguf(rounded.paths[0]) as written:
        file = as_planned(source, plan)
        assert verify(file, plan, written, threads=2, progress=Silent()) < 1e-9


def test_shards_are_copied_from_the_file_and_a_plan_alone_says_that_it_is_not_corrected(
    tiny: Path, tmp_path: Path
) -> None:
    rounded = _rounded(tiny, _made(tiny), _rounding(tiny))
    said: list[str] = []
    options = QuantizeOptions(announce=said.append, split_max_bytes=60_000)
    split = placed(tiny, rounded, tmp_path / "s.gguf", options)
    assert len(split.paths) > 1
    with open_gguf(split.paths[0]) as shards, open_gguf(rounded.paths[0]) as whole:
        for a, b in zip(shards.tensors, whole.tensors, strict=True):
            assert np.array_equal(shards.read_rows(a, 0, a.n_rows), whole.read_rows(b, 0, b.n_rows))
    assert not said
    plain = quantize_once(
        tiny, None, tmp_path / "plain.gguf", replace(options, split_max_bytes=None),
        from_plan=rounded.plan,
    )  # fmt: skip
    assert said == [NOT_CORRECTED]
    assert plain.plan.quantized_inputs is None
    assert plain.paths[0].read_bytes() == _made(tiny).paths[0].read_bytes()


@pytest.mark.parametrize("damage", [False, True])
def test_a_killed_run_is_gone_on_with_unless_its_blocks_have_changed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, *, damage: bool
) -> None:
    made, rounding = _made(tiny), _rounding(tiny)
    whole = _rounded(tiny, made, rounding).paths[0].read_bytes()
    ask, asked = Child.ask, []

    def first_layer_only(self: Child, request: Any, expected: Any) -> Any:
        asked.append(request)
        if isinstance(request, RoundLayer) and request.layer == 1 and len(asked) < 4:
            raise KeyboardInterrupt
        return ask(self, request, expected)

    monkeypatch.setattr(Child, "ask", first_layer_only)
    with pytest.raises(KeyboardInterrupt):
        _rounded(tiny, made, rounding)
    if damage:
        with open_gguf(rounding.partial) as file:
            at = file.tensor("blk.0.attn_q.weight").offset
        with rounding.partial.open("r+b") as out:
            out.seek(at)
            out.write(bytes(32))
    del asked[:]
    asked += [None] * 4
    again = _rounded(tiny, made, rounding)
    assert [type(r) for r in asked[5:]] == [SkipLayer, RoundLayer]
    assert again.paths[0].read_bytes() == whole


def test_another_plan_begins_anew(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounding = _rounding(tiny)
    with pytest.raises(KeyboardInterrupt), rounded_layers(tiny, _made(tiny), rounding):
        raise KeyboardInterrupt
    assert rounding.partial.exists()
    requests: list[object] = []
    ask = Child.ask

    def counted(self: Child, request: Any, expected: Any) -> Any:
        requests.append(request)
        return ask(self, request, expected)

    monkeypatch.setattr(Child, "ask", counted)
    made = _made(tiny, budget="45%")
    rounded = _rounded(tiny, made, rounding)
    assert not any(isinstance(r, SkipLayer) for r in requests)
    assert rounded.n_bytes == made.n_bytes
    assert [a.format for a in rounded.plan.assignments] == [a.format for a in made.plan.assignments]


def test_two_processes_do_not_round_the_same_file(tiny: Path) -> None:
    made, rounding = _made(tiny), _rounding(tiny)
    with rounded_layers(tiny, made, rounding) as found:
        before = found.paths[0].read_bytes()
        with (
            pytest.raises(PlanError, match="another process is writing it"),
            rounded_layers(tiny, made, rounding),
        ):
            pass
        assert found.paths[0].read_bytes() == before


def test_a_file_without_error_feedback_has_nothing_to_round(tiny: Path, tmp_path: Path) -> None:
    made = ramgguf.quantize(tiny, "50%", tmp_path / "s.gguf", effort="fast")
    with pytest.raises(EngineError, match="no weight is rounded with error feedback"):
        _rounded(tiny, made, _rounding(tiny))
    assert not list(tmp_path.glob("*.partial.gguf*"))


def test_a_source_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-q8.gguf", weight_type="Q8_0")
    made = _made(model, budget="70%", allow_requantize=True)
    with pytest.raises(EngineError, match="weights in F32, F16 or BF16, not in Q8_0"):
        _rounded(model, made, _rounding(model))


def _small(tmp_path: Path, name: str) -> tuple[Path, Quantized, Rounding]:
    """Return a small model of the architecture, what error feedback makes of it, and a rounding."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = write_small_model(tmp_path / f"{name}.gguf", architecture, tokenizer=True)
    matrix, hessian = tmp_path / "i.gguf", tmp_path / "h.gguf"
    ramgguf.calibrate(model, matrix, tokens="random", n_sequences=6, n_ctx=64, hessian=hessian)
    made = ramgguf.quantize(
        model, "35%", tmp_path / "q.gguf", effort="fast", encoder="gptq", imatrix=matrix,
        hessian=hessian, min_sqnr_db=0,
    )  # fmt: skip
    inputs = QuantizedInputs(tokens="random", n_sequences=6, n_ctx=64)
    return model, made, Rounding(inputs, tmp_path / "p.gguf", tmp_path)


def test_experts_stay_as_they_are(tmp_path: Path) -> None:
    model, made, rounding = _small(tmp_path, "qwen3moe")
    rounded = _rounded(model, made, rounding)
    with open_gguf(made.paths[0]) as before, open_gguf(rounded.paths[0]) as after:
        changed = {
            t.name
            for t in before.tensors
            if not np.array_equal(before.read_rows(t, 0, t.n_rows), after.read_rows(t, 0, t.n_rows))
        }
    assert {f"blk.{k}.attn_output.weight" for k in range(2)} <= changed
    assert not any("_exps" in name or "norm" in name for name in changed)


def test_layers_that_compute_something_else_by_themselves_are_refused(tmp_path: Path) -> None:
    """GPT-2 adds the positions before its first layer."""
    model, made, rounding = _small(tmp_path, "gpt2")
    with pytest.raises(EngineError, match="layer 1 by itself computes something else"):
        _rounded(model, made, rounding)
