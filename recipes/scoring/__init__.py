"""What `slm evaluate`, `score`, `compare` and `resynthesize` share: what is scored, by whom, and what is shown of it.

Begin with `evaluation` (what is asked for, checked) and `systems` (every source of audio or text that is scored); of
`slm score` with `text_scores`.
The measures themselves live in `eval`.
"""
