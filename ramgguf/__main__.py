"""`python -m ramgguf` is the command."""

from ramgguf.cli import main

main()
