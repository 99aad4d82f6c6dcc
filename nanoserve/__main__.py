"""``python -m nanoserve``: the command line."""

import sys

from nanoserve.cli import main

sys.exit(main())
