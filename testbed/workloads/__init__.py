"""What is streamed: contexts with questions, synthetic workloads, encodings measured before. No torch here."""
