"""The checks that every wrapped model must pass, used by `hooked-vlm check` and the tests."""
