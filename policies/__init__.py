"""Which level comes next: the policy contract, the policies, throughput estimators and the exact oracle."""
