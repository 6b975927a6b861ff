"""Does this machine do what this repository claims? Parts that prove it, each by itself, and one report."""
