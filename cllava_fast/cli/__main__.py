import sys

from cllava_fast.cli import main

sys.exit(main())
