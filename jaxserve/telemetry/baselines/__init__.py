"""What is normal for this server, and whether it still is so: baselines and shifts from them.

    records, steps ──▶ series.py (samples) ──▶ detector.py (shift?) ──▶ watch.py (which, how much)

`segments` looks at a finished history instead: where did it change?
"""
