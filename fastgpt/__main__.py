"""`python -m fastgpt` is the command `fastgpt`, where that is not on the path.

Python then imports modules from the working directory before all others, which the command does not.
"""

import sys

from fastgpt.cli import main

sys.exit(main())
