"""Everything around the work of a recipe: run folders, restarts, pipelines, logs, trackers and the machine.

Begin with `run_folder`: what decides that a run may begin, goes on or is complete.
`processes` joins those of one run, `pipeline` runs recipes as stages, `lineage` reads back what a model came from.
"""
