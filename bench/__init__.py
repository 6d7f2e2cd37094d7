"""Benchmarks: each runs its peer in the same process and writes bench/results/*.json."""
