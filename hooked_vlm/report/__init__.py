"""Makes figures, report pages and saved results from the results of experiments."""
