"""`python -m trocar.cli`: the command line without an installed script."""

import sys

from trocar.cli.app import main

sys.exit(main())
