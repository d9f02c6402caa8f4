"""Runs the command line `hooked-vlm` as `python -m hooked_vlm.cli`."""

from hooked_vlm.cli import main


if __name__ == "__main__":
    main()
