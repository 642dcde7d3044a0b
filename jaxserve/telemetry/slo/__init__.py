"""Service level objectives: what was promised, whether it is kept, and when somebody must know.

    objective.py  reads "p99 ttft < 100 ms"      indicator.py  what that looks at, and for whom
    judge.py      one request → its verdict      book.py       verdicts → counts in time (series.py)
    burn.py       counts → burn rates → alerts   state.py      the counts outlive the server
    report.py     /slo    metrics.py, rules.py   Prometheus
    compliance.py all of it, driven by the observer

Every request is judged by itself against each objective it falls under; nothing is computed from
buckets of a histogram.
"""
