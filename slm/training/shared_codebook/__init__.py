"""Speech and its text in the same discrete units, learnt beside an LLM's answers: the shared codebook (`codebook`),
which sequences have both (`pairs`), and what is added to fine-tuning (`trainer`, asked for by `config`).

Begin with `trainer`.
"""
