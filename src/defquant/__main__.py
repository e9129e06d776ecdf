"""`python -m defquant`, as `torchrun -m defquant train ...` needs it."""

import sys

from defquant.cli import main

sys.exit(main())
