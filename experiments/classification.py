"""`python -m experiments.classification --help`"""

import sys

import rotjax
from experiments.command import main

if __name__ == "__main__":
    sys.exit(main(rotjax.Classification))
