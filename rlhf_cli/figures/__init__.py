"""From run directories to figures; needs neither torch nor a web service."""
