"""Network, processes and experiments: the room that brings traces, codecs and policies together."""
