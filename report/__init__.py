"""From stored runs to tables, plots and a page; the model is never needed again.

    runs.py            folders -> runs and their settings; what is unusable, and why
    predictions.py     files -> draws, checked
    measure.py         predictions -> every metric of the tables; the list of metrics
    significance.py    bootstrap over examples and seeds, intervals, paired differences
    decided.py         predictions and calibration rows -> sets and selective answers
    power.py           how large a difference has to be to be found
    rows.py            what a report holds: results, rows, families
    collect.py         runs -> families of comparable rows
    tables.py          rows -> terminal, Markdown, LaTeX, CSV
    seeds.py           rows -> for how many seeds one is better
    cost.py            rows -> seconds and memory
    decided_tables.py  the cells of sets and selective answers, for all of these
    plots.py           rows -> PNG and PDF
    page.py            everything -> one HTML file

`scripts/report.py` is the command line.
"""
