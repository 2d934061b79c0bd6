"""Microbenchmarks: one operation a file, each with the very kernel that the real MoE layer runs."""
