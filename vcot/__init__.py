"""Teaches small vision-language models to reason better from AI feedback, and measures honestly whether it worked.

The names of the Python API are listed in `__init__.pyi` and described in docs/notebook.md. Each is imported when it is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
