"""`python -m paliedge` is the command `paliedge`."""

from __future__ import annotations

from paliedge.cli import main

if __name__ == "__main__":
    main(prog_name="paliedge")
