"""Where scores come from when the chain's own reward model is not, or not alone, what gives them."""
