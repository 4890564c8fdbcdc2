"""Data sets: the phantom, the conversion of Decathlon tasks, and the recipes that describe both."""
