"""How the figures of papers are drawn and judged: one module per kind."""
