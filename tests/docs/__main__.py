"""Write the parts anew, or say which are not as they would be written: ``--check``."""

import sys
import warnings

from tests.docs.parts import PARTS, on_page, write

warnings.simplefilter("ignore")
if "--check" not in sys.argv:
    write()
elif stale := [name for name, (_, part) in PARTS.items() if part() != on_page(name)]:
    sys.exit(f"{', '.join(stale)}: `make docs-tables` writes what is so now.")
