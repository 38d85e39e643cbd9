"""What `slm transcribe` and `slm synthesize` share: the model with its tokenizer, and the predictions they write.

Begin with `setup`. `tasks` says what is asked; `long_recordings` and `long_texts` cut what is longer than a model was
trained on; `batches` deals the work to processes and keeps what is done; `predictions` and `transcripts` are written;
`keys` are those that both commands have; `named_files` ends a command whose files could not all be used.
Of `slm synthesize` alone: its keys (`synthesis_config`), the texts that it is to say (`texts_to_say`), what becomes of
each (`scripts`), what the model is asked for it (`speech_requests`, `prosody`), sound from codes (`speech_files`,
`streaming`, `acoustic`: in the voice of a recording); `speech_checks` looks for text that was not spoken.
"""
