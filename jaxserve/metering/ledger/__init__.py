"""Where what requests cost is written down, once each, for good.

    Entry, Line ─▶ Ledger.add ─▶ rows ─▶ database: SQLite or PostgreSQL, one schema
                   Ledger.report ◀─ query            (sums by hour and by day beside the rows)

`book` has the `Ledger`, `rows` how an entry becomes integers, `schema` the tables and their
history, `query` what can be asked, `database` with `sqlite` and `postgres` what differs.
"""
