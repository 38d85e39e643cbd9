"""What can be measured of a waveform, one file a measure or two; `registry` holds them by name, begin there.

A file that is put here is found by itself; code elsewhere calls `register_measure` when it is imported.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
