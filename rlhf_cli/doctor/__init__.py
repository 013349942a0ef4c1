"""`rlhf doctor`: what this machine has, and what stands in the way of a run on it."""
