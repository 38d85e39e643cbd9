"""The LLM that speaks: how its ids stand for speech (`vocabulary`), coded corpora, what it can be asked (`tasks`), how
it is loaded and grown (`model`), trained (`training`) and generated from (`generation`, by the rules of
`decoding`). `trained_on` is what a model remembers of its training's utterances.

This package knows nothing of the tokenizer, of scores or of the recipes: it takes codes and texts.
"""
