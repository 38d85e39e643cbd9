"""The LLM that speaks: speech vocabulary, sequences, coded corpora, fine-tuning, generation."""
