"""Tells people what is wrong: each cause once, to each receiver, also across restarts.

    on_alert(key, firing, …) ──▶ book.py (incidents) ──▶ notices ──▶ courier.py ──▶ receivers.py

The book decides what is one incident and when it is over; a courier a receiver sends its notices in
their order, again and again until they are taken.
"""
