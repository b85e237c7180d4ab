"""One file a system: the examples that the conformance suite runs."""
