"""One file a command of `slm`, and nothing else: its `Config`, `plan` (for --dry-run) and `run`.

The `Config` of a large command stands in the folder of what it is made of, such as `finetuning.config`. What several
commands need lives in the other folders of `recipes`. A new command is a file here and an entry of
`recipes.command_list`; begin with `convert`, the shortest.
"""
