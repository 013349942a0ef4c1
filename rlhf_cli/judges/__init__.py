"""Second opinions on pairs of responses, by a language model that is pinned, cached and paid for once."""
