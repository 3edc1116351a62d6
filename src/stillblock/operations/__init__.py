"""The verbs: each plans first, as a frozen value, then runs; none knows a terminal or a socket."""
