"""llama.cpp in child processes: the only importer of llama_cpp."""
