"""Six projects of a package that is no part of coca_lit: one of each kind."""
