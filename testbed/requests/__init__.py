"""Many requests in time: in the simulator, and by real receivers over an emulated link."""
