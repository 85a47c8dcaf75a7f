"""Where outputs go: refused before any work, or named after what is in them."""

import re
from pathlib import Path

from ramgguf.core.errors import GGUFError
from ramgguf.core.files import refuse_existing, require_disk_space
from ramgguf.gguf.hub import beside
from ramgguf.gguf.shards import model_stem
from ramgguf.plan.result import Plan


def check_destination(output: Path, must_be_new: bool, n_bytes: int) -> None:
    """Raise GGUFError before any work when the output exists or cannot fit the disk.

    n_bytes is the most that it can have.
    """
    if must_be_new:
        refuse_existing(output, force=False, error=GGUFError)
    require_disk_space(output.parent, n_bytes, error=GGUFError)


def default_output(model: Path, plan: Plan) -> Path:
    """Return the path that says the plan's bits per weight: smol768-ram-4.41bpw.gguf.

    It is beside the model, or in the current folder for a model from the hub.
    """
    stem = re.sub(r"[-.](f32|f16|bf16)$", "", model_stem(model), flags=re.IGNORECASE)
    return beside(model, f"{stem}-ram-{plan.bpw:.2f}bpw.gguf")
