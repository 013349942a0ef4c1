"""From run directories to one page for a browser, which fetches nothing."""
