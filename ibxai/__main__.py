"""`python -m ibxai`."""

import sys

from ibxai.cli import main

sys.exit(main())
