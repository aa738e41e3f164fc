"""Generating with a trained model, in process."""
