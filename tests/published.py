"""Perplexities published about RAM (baa.ai, 2026), as printed there, and where.

The articles call exp of the mean NLL over all tokens the "mean" perplexity: it is the corpus PPL
here. Sizes are decimal gigabytes.
"""

from ramgguf.evaluate.leaderboard import Aggregate

# "The metric everyone trusts / mean perplexity is lying": table of GLM-4.7-Flash
GLM_4_7_FLASH = (
    Aggregate("BF16", 58_200_000_000, corpus_ppl=11.344, median_ppl=8.706, n_outliers=5),
    Aggregate("RAM v1", 15_900_000_000, corpus_ppl=9.930, median_ppl=9.084, n_outliers=4),
    Aggregate("RAM", 15_800_000_000, corpus_ppl=9.427, median_ppl=9.210, n_outliers=0),
)

# the same article, Qwen3-30B-A3B; v1 is given as 16.4 GB, and 16 GB as 2.6 % smaller
QWEN3_30B_A3B = (
    Aggregate("16 GB", 16_000_000_000, corpus_ppl=8.930, median_ppl=8.971),
    Aggregate("19 GB", 19_000_000_000, corpus_ppl=8.782, median_ppl=8.798),
    Aggregate("v1", 16_400_000_000, corpus_ppl=8.924, median_ppl=8.974),
)

# MINT articles, Llama-4-Scout: plans for machines of 64 GB and 192 GB
LLAMA_4_SCOUT = (
    Aggregate("64 GB", 58_000_000_000, corpus_ppl=7.703, median_ppl=8.070),
    Aggregate("192 GB", 163_000_000_000, corpus_ppl=7.359, median_ppl=7.691),
)

# "When better is worse": matched sizes, GPTQ against RAM
QWEN2_57B_A14B = (
    Aggregate("GPTQ", 29_900_000_000, corpus_ppl=6.390, median_ppl=6.396),
    Aggregate("RAM", 29_900_000_000, corpus_ppl=6.329, median_ppl=6.356),
)
