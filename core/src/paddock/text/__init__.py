"""Between text and token ids: tokenizer, chat templates, detokeniser, and the engine that speaks text."""
