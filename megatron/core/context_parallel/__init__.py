"""Context parallelism: ranks that each hold a part of every sequence."""
