"""The state machine of a transfer: no I/O, no clock."""
