"""What stays on disk: keys, run directories, metrics. Standard library and filelock only."""
