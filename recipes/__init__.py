"""What a user runs: the commands, their configurations and their run folders."""
