"""The emulated link: namespaces, Mininet topology, trace replay, impairments, and the proof of its fidelity."""
