"""The command `slm`: recipes that train, run and score speech language models.

Begin with `command_list`, which lists the commands by topic, and `cli`, which runs them; each is one file in
`commands/`, with a `Config`, `plan` and `run`. What several commands need lives in the other folders; `config` reads
their YAML files, which lie in `configs/`.
"""
