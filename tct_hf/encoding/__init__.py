"""How texts become vectors: students, ColBERTs, checkpoints, conversion."""
