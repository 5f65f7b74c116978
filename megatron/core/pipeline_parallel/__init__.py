"""Pipeline parallelism: communication between stages and the order in which they work."""
