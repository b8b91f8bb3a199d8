"""From probabilities to what people do with them: sets, answers or none, what to label next.

    conformal.py     sets of classes that hold the label as often as was asked for
    selective.py     answers only where the error rate among the answered is bounded
    acquisition.py   the rows whose labels would teach the most
    information.py   entropies and mutual information of posterior draws
    intervals.py     exact intervals for the figures of all of them
    checks.py        what they take, and what they say of anything else

Plain numpy over stored predictions: no model is needed, and no torch. docs/decisions.md says what
each number promises, and under which conditions.
"""
