"""One file per algorithm or family: the page to hold beside the paper. Imports core and nothing else."""
