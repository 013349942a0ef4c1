"""Rows become prompts, pairs and demonstrations: one file per dataset, and the embedded corpora."""
