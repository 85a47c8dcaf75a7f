"""The projector that was planned together with a model: refused before any work, or written."""

from dataclasses import replace
from pathlib import Path

from ramgguf.core.errors import GGUFError, PlanError
from ramgguf.core.files import require_distinct
from ramgguf.gguf.hub import local_path
from ramgguf.plan import JointLimit, SizeLimit
from ramgguf.plan.result import Plan
from ramgguf.quantize.output_paths import check_destination, default_output
from ramgguf.quantize.pipeline import Quantized, QuantizeOptions, quantize_once


def check_projector(
    limit: int | str | SizeLimit | None,
    from_plan: Plan | None,
    output: Path | None,
    *,
    output_of_model: Path | None,
    force: bool,
) -> None:
    """Raise, before any work, where a projector is to be written and cannot be.

    That is where its output exists, or none was planned: neither by a limit nor in a ready plan.
    """
    source = limit.projector.source if isinstance(limit, JointLimit) and limit.projector else None
    if from_plan is not None and from_plan.mmproj is not None:
        source = from_plan.mmproj.source
    if source is None:
        if output is not None:
            raise PlanError(
                f"{output}: no projector is planned, so that nothing would be written there; a "
                "limit of memory plans one from its measurement"
            )
        return
    path = local_path(source.path)
    if not path.exists():
        raise PlanError(f"{path}: the projector that was planned is not there")
    require_distinct(output_of_model, output, error=GGUFError)
    most = path.stat().st_size
    check_destination(output or path, output is not None and not force, most)


def with_projector(made: Quantized, output: Path | None, options: QuantizeOptions) -> Quantized:
    """Return what was made, and the projector of its plan, written and verified.

    The plan's record of memory, which says how to run the two, gets the projector's path.
    """
    plan = made.plan.mmproj
    assert plan is not None
    source = local_path(plan.source.path)
    path = output or default_output(source, plan)
    plain = QuantizeOptions(
        force=options.force, verify=options.verify, threads=options.threads,
        progress=options.progress, announce=options.announce,
    )  # fmt: skip
    written = quantize_once(source, None, path, plain, from_plan=plan)
    memory = made.plan.memory
    if memory is not None:
        beside = tuple(
            use.model_copy(update={"path": str(path)}) if use.kind == "mmproj" else use
            for use in memory.beside
        )
        memory = memory.model_copy(update={"beside": beside})
    update = {"memory": memory, "mmproj": written.plan}
    return replace(made, plan=made.plan.model_copy(update=update), mmproj=written)
