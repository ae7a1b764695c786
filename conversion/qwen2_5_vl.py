"""`python -m conversion.qwen2_5_vl QWEN VQ OUT`: [`conversion.language_model`] under its first source's name."""

import sys

from .language_model import main

if __name__ == "__main__":
    sys.exit(main())
