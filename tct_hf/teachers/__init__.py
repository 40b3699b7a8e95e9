"""Everything that can score a batch of queries and passages."""
