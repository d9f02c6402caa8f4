"""What cannot be served, and why: the only place where architectures are named."""

NOT_SERVED: dict[str, str] = {}
