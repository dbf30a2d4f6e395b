"""The live dashboard: what a run is doing now, and a finished run played again."""
