"""`python -m transformers_nextflow` is the console command `transformers-nextflow`."""

import sys

from .cli import main

sys.exit(main())
