"""What several tests share: tiny models, planted answers, counters."""
