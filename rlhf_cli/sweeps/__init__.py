"""Sweeps: many runs by one command, what was asked of them, how far they came, and who carries them out."""
