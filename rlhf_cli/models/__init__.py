"""Loading policies, putting a scalar head on a trunk, tokenizers; always in Hugging Face layout."""
