"""Runs every condition on every case and model, and writes one record each."""
