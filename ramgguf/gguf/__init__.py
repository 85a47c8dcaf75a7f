"""GGUF files: header, reader, writer, shards, the hub, and the table of tensors."""
