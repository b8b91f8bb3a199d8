"""From stored runs to tables, plots and a page; the model is never needed again.

    runs.py          folders -> runs, their settings, their predictions; what is unusable, and why
    measure.py       predictions -> every metric of the tables; the list of metrics
    significance.py  bootstrap over examples and seeds, intervals, paired differences
    collect.py       runs -> families of comparable rows
    tables.py        rows -> terminal, Markdown, LaTeX, CSV
    plots.py         rows -> PNG and PDF
    page.py          everything -> one HTML file

`scripts/report.py` is the command line.
"""
