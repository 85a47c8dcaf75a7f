"""What commands write beside their result: plans, and lines for llama-quantize."""

from pathlib import Path

from ramgguf.cli import options as opt
from ramgguf.core.errors import PlanError
from ramgguf.core.files import write_atomically
from ramgguf.plan.result import Plan
from ramgguf.report.tensor_types import imatrix_note, tensor_types


def export_plan(
    plan: Plan, path: Path | None, types_path: Path | None, terminal: opt.Terminal
) -> None:
    """Write the plan, and its lines for llama-quantize, where that was asked for."""
    if path is not None:
        plan.save(path)
    export_types(tensor_types(plan), types_path, terminal)


def export_types(lines: str, path: Path | None, terminal: opt.Terminal) -> None:
    """Write the lines if that was asked for, and say what llama-quantize needs besides."""
    if path is None:
        return
    write_atomically(path, lines.encode(), error=PlanError)
    if note := imatrix_note(lines):
        terminal.announce(f"note: {note}")
