"""How much energy the machine takes: measured where there is a counter of it, else modelled."""
