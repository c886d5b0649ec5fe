"""Benchmarks: each is a command that prints a ratio measured within one run."""
