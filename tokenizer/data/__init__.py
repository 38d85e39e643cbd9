"""From manifests, folders, Parquet files and hub data sets to training crops.

`utterances.py` holds the types, `manifest.py` reads sources (with `layouts.py` and `tables.py`; `streams.py` row by
row), `audio.py` and `pieces.py` decode; `mixing.py` orders recordings and `crops.py` cuts them: begin there.
`augmentation.py` varies a recording's speed, level and noise; `characters.py` says which character is spoken when.
"""
