"""`python -m stillblock` is the command line."""

import sys

from stillblock.cli import main

sys.exit(main())
