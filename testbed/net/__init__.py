"""Bytes between the two ends: messages, frames, sender, client."""
