"""The version of ramgguf; pyproject.toml has the same, and a test says so."""

VERSION = "0.1.0"
