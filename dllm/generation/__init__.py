"""Denoising: settings, the one loop, strategies, scorers, canvases, gaps to fill."""
