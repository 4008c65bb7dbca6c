"""Measurement: cases, contenders, peers, the machine, records and their comparison."""
