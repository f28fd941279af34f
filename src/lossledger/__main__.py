"""`python -m lossledger` does what `lossledger` does, also where the script is not on the path."""

from __future__ import annotations

from lossledger.cli import main

if __name__ == "__main__":
    main()
