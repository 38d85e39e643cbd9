"""The command `slm`: recipes that train, run and score speech language models.

Begin with `cli`, which lists the commands; each is one file in `commands/`, with a `Config`, `plan` and `run`.
What several commands need lives in the other folders; `config` reads their YAML files, which lie in `configs/`.
"""
