"""The LLM that speaks, as a model.

Loaded and saved (`modeling`), grown by the rows of new tokens (`speech_rows`), by tables and heads of further books
(`further_books`) and of several tokens at once (`multi_token`), which are `parts` of ours inside it; tuned by adapters
(`lora`) or with layers kept as they were (`freezing`); fed features in the place of codes (`continuous`).
"""
