"""Maximum likelihood and maximum a posteriori: plain LoRA, the baseline of every other method.

Both minimise the mean negative log-likelihood of the answer. MAP adds a Gaussian prior on the
adapter as AdamW's decoupled weight decay (arXiv 1711.05101): `--opt-wd`, by default 1e-5, the value
of the published runs (numerically next to nothing; later work uses 1e-2). MLE has none.
"""

from __future__ import annotations

from modelwrappers.wrapperbase import WrapperBase


class MAP(WrapperBase):
    """Point estimate of the adapter; named `map` or, without weight decay, `mle`."""

    @classmethod
    def check_arguments(cls, args) -> None:
        if args.modelwrapper == "map" and args.opt_wd is None:
            args.opt_wd = 1e-5
