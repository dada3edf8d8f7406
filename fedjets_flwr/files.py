"""Files and the ways to name them."""

import os

StrPath = str | os.PathLike[str]
"""How a user may name a file or a folder."""
