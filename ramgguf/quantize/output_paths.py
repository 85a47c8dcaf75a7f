"""Where outputs go: refused before any work, or named after what is in them."""

import os
import re
from itertools import chain, count
from pathlib import Path

from ramgguf.core.errors import GGUFError
from ramgguf.core.files import refuse_existing, require_disk_space
from ramgguf.core.inputs import reading
from ramgguf.gguf.hub import beside
from ramgguf.gguf.shards import model_stem, shard_paths
from ramgguf.plan.result import Plan


def check_destination(output: Path, must_be_new: bool, n_bytes: int) -> None:
    """Raise GGUFError before any work when the output exists or cannot fit the disk.

    n_bytes is the most that it can have.
    """
    if must_be_new:
        refuse_existing(output, force=False, error=GGUFError)
    require_disk_space(output.parent, n_bytes, error=GGUFError)


def require_output(
    model: Path, output: Path | None, *, force: bool, n_bytes: int, splits: bool = False
) -> Path:
    """Return the folder that the output goes to, behind a link too, where it may be written.

    n_bytes is the most that it can have. For what takes long: asked before any work, it raises
    GGUFError where the output, or a shard of it, exists and may not be replaced, or the disk is too
    small.
    """
    reading(model)
    target = output or beside(model, model.name)
    if output is not None:
        refuse_shard_name(output)
        refuse_existing(output, force=force, error=GGUFError)
        if splits and not force and (shards := shards_of(output)):
            raise GGUFError(f"{shards[0]}: exists; use --force to replace it")
        target = output.resolve()
    require_disk_space(target.parent, n_bytes, error=GGUFError)
    return target.absolute().parent


def shards_of(output: Path) -> list[Path]:
    """Return the files that have names of the output's shards."""
    pattern = re.compile(rf"{re.escape(output.stem)}-\d{{5}}-of-\d{{5}}\.gguf")
    return sorted(p for p in output.parent.glob("*.gguf") if pattern.fullmatch(p.name))


def default_output(model: Path, plan: Plan) -> Path:
    """Return the path that says the plan's bits per weight: smol768-ram-4.41bpw.gguf.

    It is beside the model, or in the current folder for a model from the hub.
    """
    stem = re.sub(r"[-.](f32|f16|bf16)$", "", model_stem(model), flags=re.IGNORECASE)
    return beside(model, f"{stem}-ram-{plan.bpw:.2f}bpw.gguf")


def free_output(model: Path, plan: Plan, *, force: bool) -> Path:
    """Return the default name of the plan's output, with a number where that is taken and may not
    be replaced: what took hours to make is not refused for its name.
    """
    first = default_output(model, plan)
    if force:
        return first
    names = chain([first], (first.with_stem(f"{first.stem}-{n}") for n in count(2)))
    return next(path for path in names if not os.path.lexists(path) and not shards_of(path))


def refuse_shard_name(output: Path) -> None:
    """Raise GGUFError where the output has the name of one shard of several."""
    if len(shard_paths(output)) > 1:
        raise GGUFError(
            f"{output}: is the name of a shard, and readers would ask for the others; name the "
            f"whole, {model_stem(output)}.gguf, with --split-max-size if there shall be shards"
        )
