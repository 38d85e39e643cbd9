"""Metadata of a training's settings, by which a run folder knows what a resumed run may set otherwise."""

# Changes how a step is computed or what is logged, but no result.
ADJUSTABLE = {"adjustable": True}
# May be raised: the training then goes on, that of a complete run too.
EXTENDABLE = {"extendable": True}
