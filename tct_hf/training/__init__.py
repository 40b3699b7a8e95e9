"""Loss, trainer, saving, streaming."""
