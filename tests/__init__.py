"""The tests: the mathematics, the configuration, the chain and its faults."""
