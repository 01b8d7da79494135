"""The Transformer of every family: its layers, how published folders map to it, its tokenizer and caches."""
