"""A join and the attention that reads it, found in the one graph and written as one operator."""
