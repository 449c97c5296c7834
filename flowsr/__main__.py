"""`python -m flowsr` is `flowsr`."""

import sys

from flowsr.cli import main

sys.exit(main())
