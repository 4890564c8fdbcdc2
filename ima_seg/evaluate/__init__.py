"""Robustness reports: attacks on whole volumes, metrics with confidence intervals, one HTML file."""
