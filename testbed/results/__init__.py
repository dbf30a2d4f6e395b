"""A run's files and what they say."""
