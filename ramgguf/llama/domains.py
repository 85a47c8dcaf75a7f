"""The package's texts as one model reads them: a corpus per domain, chats in its own template."""

from ramgguf.core.corpus import Corpus
from ramgguf.core.mix import Document, Part, by_domain
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.chat_template import render


def domain_corpora(file: GGUFFile, *parts: Part) -> dict[str, Corpus]:
    """Return the texts of some parts by domain, for the model in the file."""
    found: dict[str, list[Document]] = {}
    for part in parts:
        for domain, documents in by_domain(part).items():
            found.setdefault(domain, []).extend(documents)
    name = " and ".join(parts)
    return {domain: _corpus(file, f"{domain} ({name})", found[domain]) for domain in found}


def _corpus(file: GGUFFile, name: str, documents: list[Document]) -> Corpus:
    chats = iter(render(file, [d.turns for d in documents if d.turns]))
    rendered = [next(chats) if d.turns else (f"{d.text.rstrip()}\n\n", False) for d in documents]
    starts, at = [], 0
    for (text, _), document in zip(rendered, documents, strict=True):
        starts.append((at, document.source))
        at += len(text.encode())
    return Corpus(
        name,
        "".join(text for text, _ in rendered),
        has_control_tokens=any(control for _, control in rendered),
        documents=tuple(starts),
    )
