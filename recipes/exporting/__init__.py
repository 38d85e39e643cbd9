"""What `slm export` writes beside the weights: the model card, the check against the source, the discriminators.

Begin with `card`. `versa` writes the lists that `slm export-versa` gives to VERSA.
What a model came from is read by `recipes.runs.lineage`.
"""
