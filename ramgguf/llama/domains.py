"""The package's texts as one model reads them: a corpus per domain, chats in its own template."""

from ramgguf.core.corpus import Corpus
from ramgguf.core.mix import Part, by_domain
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.chat_template import render


def domain_corpora(file: GGUFFile, part: Part) -> dict[str, Corpus]:
    """Return the texts of a part by domain, for the model in the file."""
    found = {}
    for domain, documents in by_domain(part).items():
        chats = iter(render(file, [d.turns for d in documents if d.turns]))
        rendered = [
            next(chats) if d.turns else (f"{d.text.rstrip()}\n\n", False) for d in documents
        ]
        has_control = any(control for _, control in rendered)
        text = "".join(text for text, _ in rendered)
        found[domain] = Corpus(f"{domain} ({part})", text, has_control_tokens=has_control)
    return found
