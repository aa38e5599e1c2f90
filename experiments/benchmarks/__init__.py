"""Benchmarks: memory, throughput, profiles, input rate."""
