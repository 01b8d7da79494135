"""The mathematics of training: how text is corrupted, and what is learnt from it."""
