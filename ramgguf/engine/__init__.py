"""llama.cpp, through llama-cpp-python: `llama` runs it in this process, `client` in a child."""
