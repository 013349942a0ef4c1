"""The measurement contract: KL, reward and gold with their errors. Neither trains nor draws."""
