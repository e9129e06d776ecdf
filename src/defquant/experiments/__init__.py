"""Experiments: which networks to train, which measurements to make."""
