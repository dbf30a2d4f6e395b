"""Running a model and decoding on a device."""
