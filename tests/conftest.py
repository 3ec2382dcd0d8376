"""Every test compiles anew, and leaves nothing in the user's cache, unless it asks for a cache."""

from __future__ import annotations

import os

os.environ["REWRITER_CACHE_DIR"] = "off"
