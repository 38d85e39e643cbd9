"""What the commands of text-aligned tokens share: a coded corpus's utterances as the model reads them
(`data`), what an SLM writes (`written`), and rebuilt speech as predictions (`predictions`).
"""
