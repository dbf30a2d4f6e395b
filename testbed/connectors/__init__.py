"""Doors from our link into the caches of engines: one file, or a few with its name, for each engine."""
