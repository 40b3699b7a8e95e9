"""Encoding a corpus, indexes, search, fusion, hard negatives."""
