"""Volumes as people store them: found, checked, read, written. Knows neither nnU-Net nor MONAI."""
