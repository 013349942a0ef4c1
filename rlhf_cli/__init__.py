"""rlhf-cli: one command from preference data to a KL-reward frontier."""

__version__ = "0.1.0"
