"""The receiving process: a session driven in real time, and the engine that computes."""
