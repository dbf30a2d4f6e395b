"""Entropy coders over shared tables: rANS and arithmetic coding, each in numba and Triton with one bitstream."""
