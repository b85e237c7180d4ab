"""Measuring mechanisms against each other: workloads, timing, quality."""
