"""`python -m conversion.tokenflow CHECKPOINT.pt OUT`: `transformers-nextflow convert tokenflow`."""

import sys

from transformers_nextflow.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "tokenflow", *sys.argv[1:]]))
