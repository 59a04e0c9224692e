"""python -m autohdr: the command, where a program such as torchrun wants a module."""

import sys

from autohdr.cli import main

sys.exit(main())
