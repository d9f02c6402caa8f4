"""The checks that every wrapped model must pass, by `hooked-vlm check` and in the tests."""
