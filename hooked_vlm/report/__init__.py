"""From results to figures and pages, and to what a run leaves on disk."""
