"""The shapes model: its synthetic scenes, its tokenizer, its training and its held-out score."""
