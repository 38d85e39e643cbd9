"""One file a command of `slm`, and nothing else: its `Config`, `plan` (for --dry-run) and `run`.

The `Config` of evaluate stands in `scoring.evaluation`, which checks it. What several commands need lives in the other
folders of `recipes`. A new command is a file here and an entry of `recipes.cli.COMMANDS`; begin with `convert`, the
shortest.
"""
