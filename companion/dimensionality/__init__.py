"""TODO theme sentence."""
