"""MaMMUT: one text tower that reads each text twice, for the text feature and as the decoder of captions."""
