"""Which errors say that the machine lacks something, and the remedies."""

import errno


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def lacking(error: Exception) -> tuple[str, str] | None:
    """Returns what the machine lacks and the remedy, or None for another error."""
    text = str(error).lower()
    memory = "out of memory" in text or "can't allocate memory" in text
    if isinstance(error, MemoryError) or memory:
        return "Out of memory", "Give a smaller --batch-size, or --dtype bfloat16"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "The disk is full", "Free space on it"
    if isinstance(error, OSError) and error.filename is not None:
        what = f"'{str(error.filename)[-200:]}' cannot be read or written: {error.strerror}"
        return what, "Correct the folder or its permissions"
    return None
