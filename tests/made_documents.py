"""One small document of every kind, and what somebody may do to one: for tests and fuzzers."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import made_results
import ramgguf
import synthetic
from ramgguf.core.documents import Document, FrozenModel
from ramgguf.deploy.result import Answer, CheckResult, Speed, Spread
from ramgguf.evaluate.journal import FailureRecord, RunRecord, SequenceRecord
from ramgguf.evaluate.result import EvalResult, quantiles
from ramgguf.llama.protocol import encode_float32
from ramgguf.measure.result import Measurement
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.recipes import Recipe
from ramgguf.plan.result import FormatChange, MemoryUse, Plan
from ramgguf.refine.journal import Paired, RefineSettings, Trial
from ramgguf.sensitivity.journal import Settings
from ramgguf.sensitivity.result import ProbeTokens, Reading, Sensitivity, TensorSensitivity

Choose = Callable[[int], int]  # of so many

# What an edit puts in the place of a value.
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 1e308, "", "Q9_Z", "../../x", [], {}, [[]], "NaN", "[/x]",
    "a\n\x1b[2Jb", "\ud800", {"a\nb": 1},
)  # fmt: skip

_SOURCE = synthetic.SOURCE
_READING = Reading(name="blk.0.q", format="Q4_K", nmse=1e-3, kld=1e-4, standard_error=1e-5)
_TOKENS = ProbeTokens(kind="random", n_sequences=1, n_tokens=64, seed=0, sha256="0")


def measurement() -> Measurement:
    """Return one of a model of one layer."""
    return synthetic.measurement(n_layers=1)


def plan() -> Plan:
    """Return a plan of it."""
    return ramgguf.plan(measurement(), 1_000_000, min_sqnr_db=0)


def sensitivity() -> Sensitivity:
    """Return a small one, with a tensor that was read and one that was not."""
    tensor = TensorSensitivity(
        name="blk.0.q", role="attn_q", layer=0, n_weights=1024, alpha=0.1, relative_error=0.1,
        origin="measured", reading=_READING,
    )  # fmt: skip
    return Sensitivity(
        ramgguf_version="0.1.0",
        source=_SOURCE,
        encoder="rtn",
        engine="b1",
        tokens=_TOKENS,
        tensors=(tensor, tensor.model_copy(update={"name": "blk.1.q", "reading": None})),
    )


def result() -> EvalResult:
    """Return a small one, compared with a reference."""
    found = made_results.eval_result(
        "m", [8.0, 9.0, 400.0], reference=("base", [7.0, 8.0, 9.0]), kld=[0.1, 0.2, 0.3]
    )
    few = {"n_scored": 4, "n_same_top": 3, "token_kld": encode_float32(np.full(4, 0.5, np.float32))}
    sequences = [s.model_copy(update={**few, "nll_sum": 4 * s.mean_nll}) for s in found.sequences]
    update = {"sequences": tuple(sequences), "kld_quantiles": quantiles([0.1, 0.2])}
    return found.model_copy(update=update)


def check() -> CheckResult:
    """Return one of a model that passed."""
    spread = Spread(median=2.0, low=1.0, high=3.0, n=3)
    return CheckResult(
        ramgguf_version="0.1.0", path="m.gguf", n_bytes=1, name="m", n_ctx=64, type_k="f16",
        type_v="f16", n_threads=1, limit=10**9, limit_source="--memory", limit_method="rlimit",
        planned=MemoryUse(weights=1), planned_by="estimate", load_seconds=0.1, peak_bytes=10**8,
        speed=Speed(
            n_prompt=8, prompt=spread, generation=spread, first_token_seconds=spread, filling=2.0,
            generation_full=2.0,
        ),
        answers=(Answer(prompt="p", text="t", n_tokens=1, ended=True, signs=()),),
        known_ppl=8.0,
    )  # fmt: skip


def frontier() -> Frontier:
    """Return the curve of the measurement."""
    return ramgguf.curve(measurement(), min_sqnr_db=0)


def documents() -> tuple[Document, ...]:
    """Return a document of every kind."""
    planned = plan()
    return (
        measurement(),
        planned,
        sensitivity(),
        result(),
        Recipe.of_plan(planned, "p.json"),
        frontier(),
        check(),
    )


def _lines(*records: FrozenModel) -> tuple[str, ...]:
    return tuple(record.model_dump_json() for record in records)


def journals() -> dict[str, tuple[str, ...]]:
    """Return the lines of a journal of every kind, by the command that writes it."""
    scored = result()
    sequence = SequenceRecord(
        run="r", index=0, score=scored.sequences[0], seconds=1.0, decode_seconds=0.5
    )
    blank = scored.model_copy(update={"sequences": (), "kld_quantiles": None})
    settings = Settings(
        source=_SOURCE, encoder="rtn", tokens=_TOKENS, ids=((1, 2),), names=("blk.0.q",),
        promise="p", notes=(),
    )  # fmt: skip
    refining = RefineSettings(
        plan_sha256="0", budget=1, tokens="random", seed=0, ids=(((1, 2),),), promise="p"
    )
    change = FormatChange(name="blk.0.q", before="Q4_K", after="Q5_K")
    paired = Paired(change=-0.1, error=0.01)
    trial = Trial(swap=(change,), proposing=paired, accepting=None, taken=False)
    return {
        "eval": _lines(
            RunRecord(run="r", result=blank), sequence, FailureRecord(run="r", message="m")
        ),
        "sensitivity": _lines(settings, _READING),
        "refine": _lines(refining, trial),
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in items:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += places(item, (*path, key))
    return found


def edited(text: str, choose: Choose, odd: Sequence[Any] = ODD) -> str:
    """Return the JSON object with a value changed, left out, repeated or added."""
    value = json.loads(text)
    found = places(value)
    if not found:
        return text
    path = found[choose(len(found))]
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    what = choose(4)
    if what == 0 and isinstance(parent, dict):
        parent["x\n\x1b[2J"] = odd[choose(len(odd))]
    elif what == 1 and isinstance(parent, dict):
        del parent[path[-1]]
    elif what == 1:
        parent.append(parent[path[-1]])
    else:
        parent[path[-1]] = odd[choose(len(odd))]
    return json.dumps(value)
