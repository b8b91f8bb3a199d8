"""Several command lines on every rank of one process group: `torchrun tests/ranks.py CASES.json`.

Starting a process costs ten seconds of imports, a tiny run a tenth of one.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate.state import PartialState

import main
from modelwrappers.wrapperbase import WrapperBase

# A run ends by leaving its process group; here the next case needs it.
PartialState.destroy_process_group = lambda self, group=None: None


def fit_and_compare(self, *args, **kwargs):
    """After training, the parameters of all ranks are the same to the last bit."""
    fit(self, *args, **kwargs)
    for name, parameter in self.state_parameters():
        everywhere = self.accelerator.gather(parameter.detach()[None])
        assert all(torch.equal(everywhere[0], other) for other in everywhere), name


fit, WrapperBase.fit = WrapperBase.fit, fit_and_compare

for flags in json.loads(Path(sys.argv[1]).read_text()):
    code = main.run(flags)
    if code:
        sys.exit(code)
