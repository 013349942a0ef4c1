"""The nouns, the contract and the one mean. Imports torch and nothing of the project but recipes."""
