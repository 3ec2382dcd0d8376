"""One file per target, each with a function `target() -> Target`."""
