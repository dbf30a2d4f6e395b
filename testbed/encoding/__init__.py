"""Contexts to encoded chunks: calibration, encoding, and what a codec does to a model."""
