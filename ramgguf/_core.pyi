"""Types of the native core."""

# --- kernels ---
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...

# --- gguf ---

# --- logits ---
