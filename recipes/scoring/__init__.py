"""What `slm evaluate`, `score` and `resynthesize` share: what is scored, by whom, and what is shown of it.

Begin with `evaluation` (what is asked for, checked) and `systems` (what is scored), which come of `recordings`,
`codec_systems` and `predictions`; of `slm score` with `text_scores`.
The measures themselves live in `eval`.
"""
