"""`python -m fastgpt` is the command `fastgpt`."""

import sys

from fastgpt.cli import main

sys.exit(main())
