"""From predicted probabilities to decisions: sets with a coverage, answers with a bounded error
rate, and which rows to label next.

Numpy only: what these functions take is what a run's predictions or `posterior.answer` hold.
"""
