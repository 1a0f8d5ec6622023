"""From words on a command line to the objects of a run, or one sentence that says what is wrong with them."""
