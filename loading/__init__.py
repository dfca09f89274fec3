"""Loading: from disk to memory and back. Checkpoints, tokenizers, and what fits into a device's memory."""
