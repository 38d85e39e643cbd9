"""The machine voices of `slm prepare-corpus`: `espeak`, `flite` and `piper`, and how a line is spoken.

Begin with `speaking`. `sentences.txt` holds everyday sentences for the corpus.
Nothing here needs torch: each voice speaks in a process of its own, which imports this folder anew.
"""
