"""Data in: collections with judgements, the built-in corpus, training triples, expansions."""
