"""What a calibration found, in words."""

from rich.console import Console

from ramgguf.calibrate.activations import Calibration
from ramgguf.core.units import format_bytes, format_count, format_seconds


def print_calibration(found: Calibration, out: Console) -> None:
    """Print what was written, what it cost, and which weights had no input."""
    rate = (found.n_tokens - found.n_resumed) / found.seconds
    out.print(
        f"{found.outputs.imatrix}: importance of the inputs of "
        f"{format_count(found.n_entries, 'weight')} from {format_count(found.n_tokens, 'token')}, "
        f"in {format_seconds(found.seconds)} ({rate:,.0f} tokens/s)",
        soft_wrap=True,
    )
    if found.n_resumed:
        out.print(f"a run that was killed had read {found.n_resumed} of the tokens")
    if found.stand_in:
        out.print(f"a stand-in in {found.stand_in} read the tokens, not the model itself")
    if found.n_unused:
        out.print(
            f"{format_count(found.n_unused, 'expert')} saw no token: given the mean of the others"
        )
    if found.missed:
        first = ", ".join(found.missed[:3])
        more = f" and {len(found.missed) - 3} more" if len(found.missed) > 3 else ""
        out.print(f"no matrix multiplication was seen of {first}{more}", soft_wrap=True)
    path = found.outputs.hessian
    if path is not None:
        size = format_bytes(path.stat().st_size)
        out.print(f"{path}: XᵀX of {format_count(found.n_grams, 'input')} ({size})", soft_wrap=True)


def summary(found: Calibration) -> dict[str, object]:
    """Return what --json prints."""
    hessian = found.outputs.hessian
    return {
        "imatrix": str(found.outputs.imatrix),
        "n_entries": found.n_entries,
        "n_sequences": found.n_sequences,
        "n_tokens": found.n_tokens,
        "n_resumed": found.n_resumed,
        "n_unused_experts": found.n_unused,
        "missed": list(found.missed),
        "hessian": str(hessian) if hessian else None,
        "n_grams": found.n_grams,
        "stand_in": found.stand_in,
        "seconds": found.seconds,
    }
