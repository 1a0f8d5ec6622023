"""Places as texts (LocCa): the box of a thing that is named, and the name of the thing in a box."""
