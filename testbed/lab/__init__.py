"""The lab: students write one policy file and see at once how it does. No root, no GPU, no torch."""
