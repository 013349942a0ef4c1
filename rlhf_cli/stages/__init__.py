"""The loops, each one screen: sft, reward, rl, and the evaluation they share."""
