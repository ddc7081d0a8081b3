"""What a rewrite costs, and what the one graph costs to run. `make bench` runs every one."""
