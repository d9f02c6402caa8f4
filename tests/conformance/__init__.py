"""The conformance suite: every architecture, law by law."""
