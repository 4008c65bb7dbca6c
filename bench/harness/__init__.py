"""Timing: cases, contenders, peers, the machine, records."""
