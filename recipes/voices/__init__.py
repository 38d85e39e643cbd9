"""The machine voices of `slm prepare-corpus`: the espeak-ng and flite engines, and how a line is spoken to a file.

Begin with `speaking`. `sentences.txt` holds everyday sentences for the corpus.
Nothing here needs torch: each voice speaks in a process of its own, which imports this folder anew.
"""
