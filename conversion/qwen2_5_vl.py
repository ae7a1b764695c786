"""`python -m conversion.qwen2_5_vl QWEN VQ OUT`: `transformers-nextflow convert language-model`."""

import sys

from transformers_nextflow.conversion.language_model import main

if __name__ == "__main__":
    sys.exit(main())
