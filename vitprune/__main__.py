"""`python -m vitprune`."""
import sys

from .cli import main

sys.exit(main())
