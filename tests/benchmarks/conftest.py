"""Makes `import benchmarks` find the package at the root, which is not installed.

The root stays off sys.path for everything else: there `kernels/` would look like somebody else's package. The entry
`tests` of sys.path holds this folder, also called `benchmarks`, but a folder without `__init__.py` gives way to a
package wherever on the path that is; and once it is imported, its modules are found through it.
"""

import importlib
import sys
from pathlib import Path

before = list(sys.path)
sys.path.append(str(Path(__file__).parents[2]))
try:
    importlib.import_module("benchmarks")
finally:
    sys.path[:] = before
