"""Judges: recognisers that read waveforms, so that speech can be scored by its words.

`config` says which one, `judge` loads it and reads clips of any length, `readers` are the ways of decoding (`joint` and
`sphinx` two of them), `transcripts` keeps what was read. Begin with `judge`.
"""
