import sys

from egom2p.cli import main

sys.exit(main())
