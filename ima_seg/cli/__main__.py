"""``python -m ima_seg.cli``, for torchrun."""

import sys

from ima_seg.cli import main

if __name__ == "__main__":
    sys.exit(main())
