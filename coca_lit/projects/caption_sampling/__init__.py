"""Of the captions of an image one, several or merged ones in a step (FLAIR, TIPSv2)."""
