"""`python -m companion checkup ...`: see `companion.report.command`."""

import sys

from companion.report.command import main

if __name__ == "__main__":
    sys.exit(main())
