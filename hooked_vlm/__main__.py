"""`python -m hooked_vlm` is the command line `hooked-vlm`."""

from hooked_vlm.cli import main


if __name__ == "__main__":
    main()
