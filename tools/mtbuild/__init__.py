"""Turns a torch × xformers × triton × CUDA matrix into container images that are proven before they are published."""
