"""Tensor types of forks of llama.cpp: known by name and size, so that their files can be read.

Nothing here encodes or decodes them, and stock llama.cpp refuses a file that has one.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ForkType:
    """A type of a fork: its rows are whole blocks, and row_bytes more for the row itself."""

    id: int
    name: str
    block_weights: int
    block_bytes: int
    row_bytes: int


# ik_llama.cpp, commit 8337e4cd (August 2026): ids are those of enum ggml_type in
# ggml/include/ggml.h, sizes those of type_traits in ggml/src/ggml.c. Types _R4, _R8 and so on have
# that many rows interleaved. 31 to 33 were llama.cpp's own, too, until late 2024.
# fmt: off
_IK_LLAMA = (
    (31, "Q4_0_4_4", 32, 18, 0), (32, "Q4_0_4_8", 32, 18, 0), (33, "Q4_0_8_8", 32, 18, 0),
    (97, "Q8_0_X4", 32, 34, 0), (98, "Q8_1_X4", 32, 36, 0), (99, "Q8_2_X4", 32, 36, 0),
    (133, "Q6_0", 32, 26, 0), (134, "IQ1_BN", 64, 13, 2), (135, "IQ2_BN", 64, 16, 4),
    (136, "Q8_K64", 64, 68, 0), (137, "IQ2_K", 256, 76, 0), (138, "IQ3_K", 256, 110, 0),
    (139, "IQ4_K", 256, 144, 0), (140, "IQ5_K", 256, 176, 0), (141, "IQ6_K", 256, 212, 0),
    (144, "IQ4_KS", 256, 136, 4), (145, "IQ2_KS", 256, 70, 2), (146, "IQ4_KSS", 256, 128, 4),
    (147, "Q8_K16", 64, 64, 20), (148, "Q8_K32", 256, 296, 0), (149, "Q8_KR8", 256, 296, 0),
    (150, "Q8_K128", 128, 140, 0), (151, "Q8_KV", 32, 32, 8), (152, "IQ5_KS", 256, 168, 4),
    (153, "IQ2_KT", 256, 68, 4), (154, "IQ3_KT", 256, 100, 4), (155, "IQ4_KT", 256, 128, 4),
    (156, "IQ3_KS", 256, 102, 2), (157, "IQ2_KL", 256, 86, 2), (158, "IQ1_KT", 256, 56, 4),
    (202, "Q4_0_R8", 32, 18, 0), (206, "Q5_0_R4", 32, 22, 0), (208, "Q8_0_R8", 32, 34, 0),
    (210, "Q2_K_R4", 256, 84, 0), (211, "Q3_K_R4", 256, 110, 0), (212, "Q4_K_R4", 256, 144, 0),
    (213, "Q5_K_R4", 256, 176, 0), (214, "Q6_K_R4", 256, 210, 0),
    (216, "IQ2_XXS_R4", 256, 66, 0), (217, "IQ2_XS_R4", 256, 74, 0),
    (218, "IQ3_XXS_R4", 256, 98, 0), (219, "IQ1_S_R4", 32, 6, 2),
    (220, "IQ4_NL_R4", 32, 18, 0), (221, "IQ3_S_R4", 256, 110, 0),
    (222, "IQ2_S_R4", 256, 82, 0), (223, "IQ4_XS_R8", 256, 136, 0),
    (229, "IQ1_M_R4", 32, 7, 2), (230, "BF16_R16", 1, 2, 0), (233, "Q6_0_R4", 32, 26, 0),
    (335, "IQ2_BN_R4", 64, 16, 4), (337, "IQ2_K_R4", 256, 76, 0),
    (338, "IQ3_K_R4", 256, 110, 0), (339, "IQ4_K_R4", 256, 144, 0),
    (340, "IQ5_K_R4", 256, 176, 0), (344, "IQ4_KS_R4", 256, 136, 4),
    (352, "IQ5_KS_R4", 256, 168, 4), (353, "MXFP4_R8", 32, 17, 0),
    (397, "Q8_K_R16", 256, 258, 0), (398, "Q8_KV_R8", 32, 32, 4),
    (399, "Q8_K_R8", 256, 258, 0),
)
# fmt: on
FORK = "ik_llama.cpp"
FORK_TYPES: Mapping[int, ForkType] = {row[0]: ForkType(*row) for row in _IK_LLAMA}
