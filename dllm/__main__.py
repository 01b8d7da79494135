"""python -m dllm: the same as the command `dllm`."""

import sys

from dllm.cli import main

sys.exit(main())
