"""`python -m conversion.qwen2_5_vl QWEN VQ OUT`: `transformers-nextflow convert language-model`."""

import sys

from transformers_nextflow.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "language-model", *sys.argv[1:]]))
