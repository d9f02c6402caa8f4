"""Published pictures that a user has on disk, read as stimuli."""
