"""What `slm compare` does: its keys (config.py), the cells and what tells them apart (cells.py), their stages and runs
(running.py), several cells at once (workers.py), fine-tunings of equal length (fairness.py), and one table of the
results (table.py), with the cells' learning curves (trainings.py) and notes (cell_notes.py). The command itself is
recipes/commands/compare.py.
"""
