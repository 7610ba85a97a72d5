"""A torch × xformers × triton × CUDA matrix, turned into container images that are proven, then published."""
