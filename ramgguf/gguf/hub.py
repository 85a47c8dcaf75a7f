"""Models by any name: a file, a checkpoint's folder, an address on the Hugging Face hub.

An address is hf://ORG/REPO[@REVISION][/PATH.gguf], as huggingface_hub itself spells it. Files land
in the hub's cache; checkpoints are converted (ramgguf.gguf.conversion).

What the environment says (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN) is read by
huggingface_hub.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ramgguf.core.errors import CheckpointError, HubError
from ramgguf.core.values import HubFile
from ramgguf.gguf.checkpoint import CONFIG, Checkpoint, is_part
from ramgguf.gguf.conversion import convert, is_converted, origin_of_converted
from ramgguf.gguf.gguf_lora import merged_with
from ramgguf.gguf.lora import Adapter
from ramgguf.gguf.shards import shard_paths

# Paths fold the two slashes into one.
_SCHEME = re.compile(r"hf:/{1,2}")
# Revisions have no slash, but for those of pull requests and conversions.
_ADDRESS = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert/[\w.-]+|pr/\d+)|[^/]+))?"
    r"(?:/(?P<file>.*))?",
    re.DOTALL,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_NAMES = 12  # of files, in an error
# GGUF files beside a model's: projectors, importance matrices, vocabularies.
_NO_MODEL = re.compile(r"(^|/|[-._])(mmproj|imatrix|ggml-vocab)", re.IGNORECASE)
_TYPE = re.compile(
    r"(?<![a-z0-9])(bf16|f16|f32|fp16|fp32|mxfp4|nvfp4|(?:i?q|tq)\d(?:_[0-9a-z]+)*)(?![a-z0-9])",
    re.IGNORECASE,
)
Announce = Callable[[str], None]


def parse_address(model: str | Path) -> HubFile | None:
    """Return the file that an address names, None for a path; revision is main unless given.

    Raises HubError for an address that is none. One without a file has file "".
    """
    scheme = _SCHEME.match(str(model))
    if scheme is None:
        return None
    text = str(model)[scheme.end() :]
    found = _ADDRESS.fullmatch(text)
    if found is None or ".gguf@" in text:
        raise HubError(
            f"hf://{text} is no address of a model; expected hf://ORG/REPO or "
            "hf://ORG/REPO/FILE.gguf, with a revision hf://ORG/REPO@REVISION/FILE.gguf"
        )
    file = found["file"] or ""
    if any(part in ("", ".", "..") for part in file.split("/")[:-1]) or file.endswith("/.."):
        raise HubError(f"hf://{text} leads out of its repository; name a file in it")
    return HubFile(repo=found["repo"], revision=found["revision"] or "main", file=file)


def origin_of(path: Path) -> HubFile | None:
    """Return which file of the hub a path in its cache is, or was converted from (file "": a whole
    repository); None for any other path.
    """
    parts = path.absolute().parts
    for i in range(len(parts) - 3):
        kind, *repo = parts[i].split("--", 2)
        snapshot = parts[i + 1] == "snapshots" and _COMMIT.fullmatch(parts[i + 2])
        if kind == "models" and repo and snapshot:
            file = "/".join(parts[i + 3 :])
            return HubFile(repo="/".join(repo), revision=parts[i + 2], file=file)
    return origin_of_converted(path)


def beside(model: Path, name: str) -> Path:
    """Return the path under that name of what is made from a model: beside its file, or in the
    current folder for one from the hub and for a checkpoint.
    """
    is_fetched = parse_address(model) is not None or origin_of(model) is not None
    if is_fetched or is_converted(model) or model.is_dir():
        return Path(name)
    return model.with_name(name)


def local_path(
    model: str | Path,
    *,
    lora: str | Path | None = None,
    quiet: bool = False,
    announce: Announce = lambda _: None,
) -> Path:
    """Return the path of a model's GGUF file, whatever names the model.

    An address is fetched first, all shards along; of a repository without a file's name, the GGUF
    file of the highest precision, or the checkpoint. A checkpoint's folder is converted. lora is an
    adapter, merged into the model: a folder that peft saved, of a checkpoint; a GGUF file, of
    either. quiet shows no progress, announce gets a line for what was chosen or is made.

    Raises HubError when there is no such file, it cannot be had, or huggingface_hub is missing;
    CheckpointError for what cannot be converted.
    """
    named = None if lora is None else Path(lora)
    in_gguf = named if named is not None and not named.is_dir() else None
    adapter = Adapter.of(named) if named is not None and in_gguf is None else None
    wanted = parse_address(model)
    name = None
    if wanted is not None:
        path = _fetched(wanted, quiet=quiet, announce=announce)
        name = wanted.repo.rpartition("/")[2]
    else:
        path = Path(model)
    if path.is_dir() and not _holds_gguf_only(path):
        found = origin_of(path / CONFIG)
        origin = found and found.model_copy(update={"file": ""})
        path = convert(Checkpoint.of(path, name), adapter, origin=origin, announce=announce)
    elif adapter is not None:
        raise CheckpointError(
            f"{model}: is no checkpoint, and {named} is an adapter for one; name the checkpoint's "
            "folder, or convert the adapter (convert_lora_to_gguf.py of llama.cpp) and name the "
            "GGUF file as --lora"
        )
    return path if in_gguf is None else merged_with(path, in_gguf, announce)


def _holds_gguf_only(folder: Path) -> bool:
    names = [p.name for p in folder.iterdir()]
    return any(n.endswith(".gguf") for n in names) and CONFIG not in names


def _fetched(wanted: HubFile, *, quiet: bool, announce: Announce) -> Path:
    """Return the local path of a file on the hub, or of the folder of a checkpoint."""
    hub = _library()
    with _silenced(hub, bars=quiet):
        if not wanted.file:
            files = _files(hub, wanted)
            chosen = highest_precision(files)
            if chosen is None:
                if not any(f.endswith(".safetensors") and is_part(f) for f in files):
                    raise HubError(
                        f"{wanted.address}: has neither GGUF nor safetensors files in its root"
                    )
                announce(f"{wanted.address}: fetches its checkpoint")
                return _checkpoint(hub, wanted, files)
            announce(f"{wanted.address}: takes {chosen}, the highest precision that it has")
            wanted = wanted.model_copy(update={"file": chosen})
        if not wanted.file.endswith(".gguf"):
            raise HubError(f"{wanted.address} names no .gguf file; {_listing(hub, wanted)}")
        # The first file tells the commit, the other shards are that commit's.
        pinned = wanted
        for shard in shard_paths(Path(wanted.file)):
            path = _download(hub, pinned.model_copy(update={"file": shard.as_posix()}))
            pinned = origin_of(path) or pinned
    return path.with_name(Path(wanted.file).name)


def highest_precision(files: Iterable[str]) -> str | None:
    """Return the GGUF model of the most bits by its name, its first shard; None if there is none.

    Where a checkpoint is there as well, quantized GGUF files are passed over.
    """
    files = sorted(files)
    has_checkpoint = CONFIG in files and any(
        f.endswith(".safetensors") and is_part(f) for f in files
    )
    models = [
        (bits, f)
        for f in files
        if f.endswith(".gguf") and not _NO_MODEL.search(f)
        for bits in (_bits(f),)
        if bits >= 16 or not has_checkpoint
    ]
    most = max((bits for bits, _ in models), default=0)
    return next((f for bits, f in models if bits == most), None)


def _bits(file: str) -> float:
    """Return the bits of a weight by the type in a file's name, BF16 before F16; 0 for no type."""
    found = _TYPE.findall(file)
    if not found:
        return 0
    kind = found[-1].upper()
    if kind == "BF16":  # what F16 of such a model rounds or cuts off
        return 16.5
    size = "SML".find(kind[-1]) / 10 if kind[-1] in "SML" else 0
    digits = re.search(r"\d+", kind)
    return (int(digits[0]) if digits else 0) + size


def _checkpoint(hub: ModuleType, wanted: HubFile, files: Sequence[str]) -> Path:
    """Return the folder of a checkpoint in the cache, after fetching all that is converted."""
    parts = [f for f in files if is_part(f)]
    if any(re.fullmatch(r"model.*\.safetensors", f) for f in parts):  # others are in other layouts
        parts = [f for f in parts if f.startswith("model") or not f.endswith(".safetensors")]
    if CONFIG not in parts:
        raise HubError(f"{wanted.address}: has no {CONFIG}; name a .gguf file of it")
    parts.sort(key=lambda f: f != CONFIG)  # it tells the commit, the others are that commit's
    pinned = wanted
    for part in parts:
        path = _download(hub, pinned.model_copy(update={"file": part}))
        pinned = origin_of(path) or pinned
    return path.parent


def _files(hub: ModuleType, wanted: HubFile) -> list[str]:
    """Return the files of a repository; offline, those that its copy in the cache has."""
    if hub.constants.HF_HUB_OFFLINE:
        found = hub.try_to_load_from_cache(wanted.repo, CONFIG, revision=wanted.revision)
        folder = Path(found).parent if isinstance(found, str) else None
        if folder is None:
            raise HubError(
                f"{wanted.address}: HF_HUB_OFFLINE forbids to ask what it has, and its checkpoint "
                "is not in the cache; name a .gguf file"
            )
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    with _explained(hub, wanted):
        return list(hub.HfApi().list_repo_files(wanted.repo, revision=wanted.revision))


@contextmanager
def _silenced(hub: ModuleType, *, bars: bool) -> Iterator[None]:
    """Keep huggingface_hub from logging what is going to be an error's line, and from its bars."""
    verbosity = hub.utils.logging.get_verbosity()
    shown = bars and not hub.utils.are_progress_bars_disabled()
    hub.utils.logging.set_verbosity_error()
    if shown:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.logging.set_verbosity(verbosity)
        if shown:
            hub.utils.enable_progress_bars()


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils  # neither is there without being asked for
    except ImportError as e:
        raise HubError(
            f"huggingface_hub cannot be imported ({e}); pip install 'ramgguf[hub]'"
        ) from None
    library: ModuleType = huggingface_hub
    return library


def _download(hub: ModuleType, wanted: HubFile) -> Path:
    with _explained(hub, wanted):
        return Path(hub.hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))


@contextmanager
def _explained(hub: ModuleType, wanted: HubFile) -> Iterator[None]:
    """Raise HubError, which says what to do, for whatever huggingface_hub raises."""
    errors = hub.errors
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{wanted.address}: the repository is gated; accept its terms at "
            f"{hub.constants.ENDPOINT}/{wanted.repo} and log in with `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{wanted.address}: {hub.constants.ENDPOINT} has no repository {wanted.repo}, or a "
            "private one: log in with `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{wanted.address}: {wanted.repo} has no such revision") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as e:
        raise HubError(_unreachable(hub, wanted, e)) from None
    except errors.EntryNotFoundError:
        raise HubError(f"{wanted.address}: no such file; {_listing(hub, wanted)}") from None
    except (OSError, ValueError) as e:  # what the server answered, the disk, a name it refuses
        raise HubError(f"{wanted.address}: {_first_line(e)}") from None


def _unreachable(hub: ModuleType, wanted: HubFile, error: Exception) -> str:
    cache = hub.constants.HF_HUB_CACHE
    if hub.constants.HF_HUB_OFFLINE:
        return (
            f"{wanted.address}: is not in the cache {cache}, and HF_HUB_OFFLINE forbids to fetch "
            "it; unset that, or name a file"
        )
    return (
        f"{wanted.address}: {hub.constants.ENDPOINT} cannot be reached and the file is not in the "
        f"cache {cache} ({_first_line(error.__cause__ or error)})"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _listing(hub: ModuleType, wanted: HubFile) -> str:
    """Return which .gguf files the repository has, as far as it can be asked."""
    try:
        files = hub.HfApi().list_repo_files(wanted.repo, revision=wanted.revision)
    except Exception as e:  # whatever the HTTP library raises
        return f"which it has cannot be asked ({_first_line(e)})"
    names = sorted(f for f in files if f.endswith(".gguf"))
    if not names:
        return f"{wanted.repo} has no .gguf file at all"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{wanted.repo} has {', '.join(names[:_MOST_NAMES])}{more}"
