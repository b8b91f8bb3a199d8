"""Several command lines on every rank of one process group: `torchrun tests/ranks.py CASES.json`.

A case is {"flags": [...], "fsdp": bool}; with "signal": N the second rank gets SIGTERM, alone, in
the update after N. Starting a process costs ten seconds of imports, a tiny
run a tenth of one.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate.state import PartialState
from torch.distributed.tensor import DTensor

import main
from modelwrappers.engine.training import Loop
from modelwrappers.wrapperbase import WrapperBase

# A run ends by leaving its process group; here the next case needs it.
PartialState.destroy_process_group = lambda self, group=None: None


def fit_and_compare(self, *args, **kwargs):
    """After training, the parameters of all ranks are the same to the last bit."""
    fit(self, *args, **kwargs)
    for name, parameter in self.state_parameters():
        everywhere = self.accelerator.gather(parameter.detach()[None])
        assert all(torch.equal(everywhere[0], other) for other in everywhere), name


def settle_and_look(self):
    """With FSDP the frozen base is in parts, and nothing else is."""
    settle(self)
    if os.environ["ACCELERATE_USE_FSDP"] == "true":
        whole = {name for name, _ in self.state_parameters()}
        for name, parameter in self.named_parameters():
            assert isinstance(parameter, DTensor) == (name not in whole), name
            if name not in whole and parameter.shape[0] > 1:
                assert parameter.to_local().numel() < parameter.numel(), name


def update_and_signal(self, batches):
    if case.get("signal") == self.step and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(self, batches)


update, Loop.update = Loop.update, update_and_signal
fit, WrapperBase.fit = WrapperBase.fit, fit_and_compare
settle, WrapperBase.settle = WrapperBase.settle, settle_and_look

for case in json.loads(Path(sys.argv[1]).read_text()):
    os.environ["ACCELERATE_USE_FSDP"] = str(case["fsdp"]).lower()
    code = main.run(case["flags"])
    if code != (143 if "signal" in case else 0):
        sys.exit(code or 1)
