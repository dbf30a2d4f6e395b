"""Data of the synthetic workloads (testbed.synthetic): models and contexts, compute profiles, measured ladders."""
