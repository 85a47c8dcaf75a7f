"""Files that people give in place of a GGUF file, and what to do about each."""

import re
from pathlib import Path

_CHECKPOINT = "name the folder of the checkpoint, with its config.json"
_PICKLED = "save the checkpoint as safetensors (save_pretrained does) and name its folder"
_HEADS = (
    (re.compile(rb"version https://git-lfs\.github\.com/spec"),
     "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (re.compile(rb"\s*(<!doctype html|<html|<\?xml)", re.IGNORECASE),
     "is a web page; download the file itself, or name it as hf://ORG/REPO/FILE.gguf"),
    (re.compile(rb".{8}\{\"", re.DOTALL), f"is a safetensors file; {_CHECKPOINT}"),
    (re.compile(rb"PK\x03\x04"), f"is a ZIP archive, as PyTorch writes; {_PICKLED}"),
    (re.compile(rb"\x80[\x02-\x05]"), f"is a pickle, as PyTorch writes; {_PICKLED}"),
    (re.compile(rb"gg(ml|mf|jt|la)|(lm|fm|tj|al)gg"),
     "is a model of before GGUF; convert it with an older llama.cpp, or download it as GGUF"),
    (re.compile(rb"\s*[{\[]"), "is JSON; name a GGUF file"),
)  # fmt: skip
_URL = re.compile(r"https?:/{1,2}")  # paths fold two slashes into one
# A page, or a file, of a model on the hub, as a browser shows its address.
_HUB_PAGE = re.compile(
    r"https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:resolve|blob|tree|raw)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+\.gguf))?)?"
    r"/?(?:[?#].*)?"
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def not_gguf(data: bytes) -> str | None:
    """Return what a file is that begins with data, if it is a known kind other than GGUF."""
    return next((is_other for head, is_other in _HEADS if head.match(data)), None)


def folder(path: Path) -> str:
    """Return what to do with a folder."""
    names = sorted(p.name for p in path.iterdir())
    if models := [n for n in names if n.lower().endswith(".gguf")]:
        return f"is a folder; name a file in it: {', '.join(models[:8])}"
    if any(n.endswith(".bin") for n in names):
        return f"is a folder of pickles, as PyTorch writes; {_PICKLED}"
    return "is a folder with neither a .gguf file nor a checkpoint (config.json, safetensors)"


def missing(path: Path) -> str | None:
    """Return what to write in place of a path that does not exist, if it looks like an address."""
    text = str(path)
    if page := _HUB_PAGE.fullmatch(text):
        revision = "" if page["revision"] in (None, "main") else f"@{page['revision']}"
        file = f"/{page['file']}" if page["file"] else ""
        return f"is an address, not a file; write hf://{page['repo']}{revision}{file}"
    if _URL.match(text):
        return "is an address, not a file; download it, or name it as hf://ORG/REPO"
    if _REPOSITORY.fullmatch(text) and not path.parent.exists():
        return f"is no file; for a repository on the hub write hf://{text}"
    return None
