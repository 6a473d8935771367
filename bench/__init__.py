"""Benchmarks and checks on real weights, behind `skipjack bench`."""
