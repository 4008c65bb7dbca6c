"""Benchmarks against the best peers, from a checkout:  python -m bench --help"""
