"""Several command lines on every rank of one process group: `torchrun tests/ranks.py CASES.json`.

Starting a process costs ten seconds of imports, a tiny run a tenth of one.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from accelerate.state import PartialState

import main

# A run ends by leaving its process group; here the next case needs it.
PartialState.destroy_process_group = lambda self, group=None: None

for flags in json.loads(Path(sys.argv[1]).read_text()):
    code = main.run(flags)
    if code:
        sys.exit(code)
